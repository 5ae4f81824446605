"""The commands and files that a page of the documentation shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "integrations" / "README.md",
    # config.md is generated, and shows no commands to type
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "config.md"),
]
PROGRAMS = (
    "diffalign", "make", "pip", "sbatch", "srun", "accelerate", "torchrun", "kubectl", "docker", "apptainer", "python",
    "hf", "export",
)  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n?)+", re.MULTILINE)
INLINE = re.compile(r"`(diffalign [^`]+)`")
NAMED_FILE = re.compile(r"`([\w./-]+\.(?:yaml|py))`[^`]{0,60}?:?\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command as a page shows it. words: without comments; block: whether it stands on a line of its own."""

    page: Path
    text: str
    words: tuple[str, ...]
    block: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text}"

    @property
    def synopsis(self) -> bool:
        """Whether it shows options in brackets, and is nothing to type."""
        return any(word.startswith("[") or word == "|" for word in self.words)


def commands(page: Path) -> list[Command]:
    """Return the commands of a page: those of its blocks in their order, then those within sentences and tables."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for language, body in BLOCK.findall(text) if language in ("", "bash", "sh", "console")]
    rest = BLOCK.sub("", text)
    blocks += [re.sub(r"^ {4}", "", body, flags=re.MULTILINE) for body in INDENTED.findall(rest)]
    found = [Command(page, line, words, True) for block in blocks for line, words in _lines(block)]
    inline = [(line.replace("\n", " "), tuple(shlex.split(line))) for line in INLINE.findall(rest)]
    # Words alone, such as `diffalign data export`, name a verb and are no command to type.
    typed = [(line, words) for line, words in inline if words[-1] != "-r" and not all(map(str.isalpha, words))]
    return found + [Command(page, line, words, False) for line, words in typed if len(words) > 2]


def _lines(block: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for line in block.replace("\\\n", " ").splitlines():
        # A row of a table, such as "make the car red,a.png", is no command.
        if line.split(" ")[0] in PROGRAMS and not re.match(r"make [^#]*,", line):
            yield line, tuple(shlex.split(line, comments=True))


def files(page: Path) -> dict[str, str]:
    """Return the files whose whole text a page shows: a name in a sentence, and the block that follows."""
    return dict(NAMED_FILE.findall(page.read_text(encoding="utf-8")))
