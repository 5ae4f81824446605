"""Prompt files: one prompt a line (.txt), or one JSON object a line (.jsonl) with a "prompt" and, for GenEval, its facts."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError


@dataclass(frozen=True)
class PromptRow:
    """A prompt and whatever a reward may need to know about it."""

    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_id(self) -> str:
        """Short hash of the prompt's text."""
        return hashlib.blake2b(self.prompt.encode(), digest_size=8).hexdigest()


def _from_json(line: str, where: str) -> PromptRow:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DiffalignError(f'{where}: not JSON ({error}); every line must be one object with a "prompt"') from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise DiffalignError(f'{where}: no "prompt"; every line must be one object with a non-empty "prompt"')
    return PromptRow(row["prompt"], {k: v for k, v in row.items() if k != "prompt"})


def read_prompts(path: Path | str) -> list[PromptRow]:
    """The prompts of a .txt or .jsonl file; blank lines are skipped. Raises DiffalignError with file and line."""
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise DiffalignError(f"prompts {path}: unknown kind of file; use .txt (a prompt a line) or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DiffalignError(f"prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DiffalignError(f"prompts {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_from_json(line, f"{path}:{number}") if path.suffix == ".jsonl" else PromptRow(line.strip()))
    if not rows:
        raise DiffalignError(f"prompts {path}: the file holds no prompt")
    return rows
