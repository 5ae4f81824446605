"""Say in one line how many prompts are longer than a model reads, whichever model it is."""

from collections.abc import Mapping, Sequence
from typing import Protocol


class PromptReader(Protocol):
    """A reward, or a model that draws or is trained."""

    @property
    def longest(self) -> int:
        """The number of tokens of a prompt that it reads; 0: all."""
        ...

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many distinct prompts are longer."""
        ...


def cut_lines(readers: Mapping[str, PromptReader], prompts: Sequence[str | None]) -> list[str]:
    """Return a line for each reader (name -> reader) that reads some of the prompts in part only."""
    given = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    counts = {name: reader.count_cut(given) for name, reader in readers.items()}
    return [
        f"{name} reads {readers[name].longest} tokens of a prompt: {count} of {len(given)} prompts are longer and were cut"
        for name, count in counts.items()
        if count
    ]
