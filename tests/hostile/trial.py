"""What a trial is: hostile input from a seeded generator, and the rules that must hold whatever it is."""

from __future__ import annotations

import contextlib
import io
import os
import random
import time
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.cli import app
from diffalign.errors import DiffalignError

Trial = Callable[[random.Random, Path], str]
"""One trial of a class: (generator, empty folder) -> what failed, "" if all held."""

SECRET = "SECRET-of-somebody"
CPU_SECONDS = 60.0
LONGEST_LINE = 20_000
BIDI = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
FRAGMENTS = [
    "", " ", "\0", "\x1b[2J", "\x1b]0;x\x07", "\r", "\n", "\t", "\u202e", "\u2028", "\ufeff", "\x9b", "../../evil",
    "/etc/passwd",
    "~/x", "..", ".", "a/b", "a\\b", "C:\\x", "$(ls)", "`ls`", "{{7*7}}", "<script>alert(1)</script>", "'\";--", "%s%n", "%00",
    "9" * 400, "-" + "9" * 400, "1e999", "NaN", "Infinity", "-0", "null", "true", "[]", "{}", "[" * 200, "{\"a\":" * 200,
    "[" * 5000, "&a [*a]", "*x", "!!python/object/apply:os.system [x]", "!!timestamp x", "\\ud800", "größe 大 🐈", "x" * 300,
    "x" * 70_000, "é" * 200, "=", ",", ";", "\"", "'", "\"\"\"", "#", ": ", "- ", "? ", "|", ">", "image", "sha256",
    "prompt", "reason",
]  # fmt: skip


def text(rng: random.Random, longest: int = 3) -> str:
    """Return a few hostile or ordinary fragments in a row."""
    return "".join(
        rng.choice([*FRAGMENTS, "cat", "a b", chr(rng.randrange(0x20, 0xD7FF))]) for _ in range(rng.randint(1, longest))
    )


def file_name(rng: random.Random, suffix: str = ".png") -> str:
    """Return a hostile name that a file can have on this system."""
    name = (
        text(rng)
        .replace("/", "_")
        .replace("\0", "")
        .encode("utf-8", "replace")[:180]
        .decode("utf-8", "ignore")
        .strip(".")
        or "a"
    )
    return f"{name}{rng.randrange(1000)}{suffix}"


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes with a few of them flipped, cut, doubled, replaced or added."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
        how = rng.randrange(6)
        if how == 0 and changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        elif how == 1:
            del changed[at : min(end, at + 50)]
        elif how == 2:
            del changed[at:]
        elif how == 3:
            changed[at:at] = changed[at : min(end, at + 200)]
        elif how == 4:
            changed[at:at] = rng.choice(FRAGMENTS).encode("utf-8", "replace")[:6000]
        else:
            changed[at : at + 4] = rng.randbytes(4)
    return bytes(changed)


def command(*words: object) -> tuple[int | None, str, str, str]:
    """Run `diffalign` in this process; return (exit code, stdout, stderr, the exception that came out, or "")."""
    out, err = io.StringIO(), io.StringIO()
    code: int | None = None
    problem = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            app([str(word) for word in words], prog_name="diffalign")
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
            if isinstance(error, KeyboardInterrupt):
                raise
    return code, out.getvalue(), err.getvalue(), problem


def printed_fault(shown: str) -> str:
    """Return what is wrong with a text on the terminal, "" if nothing."""
    for character in set(shown):
        if character in "\n\t":
            continue
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in BIDI:
            return f"prints {character!r}"
    longest = max(map(len, shown.split("\n")), default=0)
    return f"prints a line of {longest} characters" if longest > LONGEST_LINE else ""


def verb_fault(*words: object, codes: tuple[int, ...] = (0, 2, 3)) -> str:
    """Run a verb, and return which rule it broke: no traceback, an exit code that fits, one line for an error, clean text."""
    started = time.process_time()
    code, out, err, problem = command(*words)
    name = " ".join(str(word) for word in words[:2])
    if problem:
        return f"{name}: {problem[:300]}"
    if code not in codes:
        return f"{name}: exit code {code}: {err[-300:]}"
    if code == 2 and [line.startswith("error: ") for line in err.splitlines()].count(True) != 1:
        return f"{name}: exit code 2 with {err[-300:]!r}"
    if (taken := time.process_time() - started) > CPU_SECONDS:
        return f"{name}: {taken:.0f} s of CPU time"
    return printed_fault(out) or printed_fault(err)


def call_fault(call: Callable[[], Any]) -> str:
    """Run a function of Python, and return which rule it broke: it ends, or raises DiffalignError of one line."""
    started = time.process_time()
    try:
        call()
    except DiffalignError as error:
        if "\n" in str(error):
            return f"more than one line: {str(error)[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    taken = time.process_time() - started
    return f"{taken:.0f} s of CPU time" if taken > CPU_SECONDS else ""


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every regular file below a folder, links not followed."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if path.is_file() and not path.is_symlink():
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def leak_fault(folder: Path, *texts: str) -> str:
    """Return which file below a folder holds somebody's secret, "" if none does."""
    held = [name for name, data in files_below(folder).items() if SECRET.encode() in data]
    return (
        f"{held[0]!r} holds the secret" if held else next((f"{t[:50]!r} is printed" for t in texts if SECRET in t), "")
    )
