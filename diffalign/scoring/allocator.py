"""Make the C library keep freed memory, instead of returning it and asking for it again with every batch."""

import ctypes
import platform

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 1 GiB; do nothing on another C library.

    By default large blocks return to the system when they are freed. Batches of images and activations are such blocks,
    and the page faults of allocating them again took a sixth of the CPU time of scoring. The process holds no more
    memory than it once used.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_ARENA_MAX, 2)
