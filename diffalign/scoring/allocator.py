"""The C library's memory, kept instead of given back and asked for again with every batch."""

import ctypes
import platform

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 1 GiB; does nothing on another C library.

    By default large blocks go back to the system when they are freed. Batches of pictures and activations are such blocks,
    and the page faults of getting them anew took a sixth of the CPU time that scoring spends. Not more memory is held than
    was in use at once.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_ARENA_MAX, 2)
