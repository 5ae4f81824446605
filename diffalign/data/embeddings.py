"""Prompt embeddings: each distinct prompt is encoded once into memory-mapped files, or at every step.

    prompts-<key>/00000.safetensors   records (records.py), one a prompt: what the model needs of it, bfloat16 (or float32)
    prompts-<key>/index.json          the prompts' hashes, and the full shape of each array

Zeros at the end of rows and columns are not stored; reading puts them back, so the model sees every number. For SD3
without T5 they are most of an embedding: 256 of 333 tokens, and half the width of the others. Other padding is stored,
because these models attend to it: SD1.5, SDXL and SD3 encode CLIP's padding to 77 tokens and T5's to its full length
without a mask, as FLUX does, and their trunks have no mask either. bfloat16 because T5's outputs exceed float16's
range; it rounds to 2^-9 of a value. `data.cache_dtype: float32` keeps what was encoded.

A prompt is encoded alone, not in a batch, whose size would decide its last bits: the embedding depends on the prompt
only.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffalign.data.protocols import PromptEncoder
from diffalign.data.records import INDEX, MEND, Record, Records, finished_index, make_records, share
from diffalign.files import reading
from diffalign.progress import ImageProgress, Say

UNCONDITIONAL = "unconditional"
"""What the index calls the row that takes the place of a dropped prompt; no prompt's hash is of this length."""


def encoded(backbone: PromptEncoder, prompt: str | None, exact: bool) -> dict[str, Tensor]:
    """Return everything that the model needs of one prompt, or of none (None), each [...] on the CPU.

    exact: in float32, else in bfloat16.
    """
    found = backbone.encode_unconditional() if prompt is None else backbone.encode_prompts([prompt])
    return {name: values[0].to("cpu", torch.float32 if exact else torch.bfloat16) for name, values in found.items()}


class LivePrompts:
    """Embeddings made when asked for (`data.cache: latents` or `off`); the text encoders stay in memory.

    `unconditional`: what a dropped prompt is replaced by, which is what sampling steers away from; [1, ...] each.
    """

    def __init__(self, backbone: PromptEncoder, exact: bool = False) -> None:
        self.backbone, self.exact = backbone, exact
        self.unconditional = {name: values[None].float() for name, values in encoded(backbone, None, exact).items()}

    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of B prompts, each [B, ...] float32."""
        once = {prompt: encoded(self.backbone, prompt, self.exact) for prompt in dict.fromkeys(prompts)}
        return {name: torch.stack([once[p][name] for p in prompts]).float() for name in self.unconditional}


class PromptStore:
    """The cached embeddings, memory-mapped; `batch` and `unconditional` as in `LivePrompts`."""

    def __init__(self, folder: Path) -> None:
        """Open a finished cache. Raises DiffalignError where it is not finished or damaged."""
        self.folder = folder
        index = finished_index(folder)
        with reading(folder / INDEX, mend=MEND):
            self._at = {digest: n for n, digest in enumerate(index["prompts"])}
            self._full = {name: tuple(full) for name, full in index["full"].items()}
            self._records = Records(folder, index)
            row = self._at[UNCONDITIONAL]
        self.unconditional = self._rows([row])

    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of B cached prompts, each [B, ...] float32."""
        return self._rows([self._at[prompt_digest(prompt)] for prompt in prompts])

    def _rows(self, rows: list[int]) -> dict[str, Tensor]:
        records = [self._records.read(row) for row in rows]
        return {name: torch.stack([_whole(r[name], full) for r in records]) for name, full in self._full.items()}

    @classmethod
    def make(cls, folder: Path, prompts: Sequence[str], backbone: PromptEncoder, say: Say, exact: bool = False) -> None:
        """Encode the distinct `prompts`, and what replaces a dropped one, into `folder`, together with other processes."""
        distinct = _distinct(prompts)

        def record(number: int) -> Record:
            return {name: trimmed(values) for name, values in encoded(backbone, distinct[number], exact).items()}

        digests = [UNCONDITIONAL if prompt is None else prompt_digest(prompt) for prompt in distinct]
        full = {name: list(values.shape) for name, values in sorted(encoded(backbone, distinct[0], exact).items())}
        show = ImageProgress(say, every=60.0, unit="prompts", closing=False).named("encoding prompts")
        if mine := make_records(folder, len(distinct), record, {"prompts": digests, "full": full}, show):
            say(f"cached embeddings of {share(mine, len(distinct))} prompts, the dropped one included")


def prompt_bytes(prompts: Sequence[str], backbone: PromptEncoder, exact: bool = False) -> int:
    """Return the size of the cached embeddings in bytes; encodes one prompt to learn its shape."""
    distinct = _distinct(prompts)
    one = [trimmed(values) for values in encoded(backbone, distinct[0], exact).values()]
    return len(distinct) * sum(values.numel() * values.element_size() for values in one)


def trimmed(values: Tensor) -> Tensor:
    """Return `values` [..., L, D] without the zeros at the end of the last two axes; vectors unchanged."""
    if values.dim() < 2:
        return values
    kept = values
    for axis in (-2, -1):
        other = [d for d in range(values.dim()) if d != values.dim() + axis]
        used = torch.nonzero((values != 0).sum(dim=other))
        kept = kept.narrow(axis, 0, int(used[-1]) + 1 if len(used) else 1)
    return kept


def _whole(kept: Tensor, full: tuple[int, ...]) -> Tensor:
    """Return values at their full shape, float32, with the zeros that `trimmed` took away."""
    whole = torch.zeros(full)
    whole[tuple(slice(0, n) for n in kept.shape)] = kept.float()
    return whole


def _distinct(prompts: Sequence[str]) -> list[str | None]:
    """Return each prompt once, and None for a dropped one."""
    return [*dict.fromkeys(prompts), None]


def prompt_digest(prompt: str) -> str:
    """Return the hash by which a prompt is found in the index."""
    return hashlib.blake2b(prompt.encode(), digest_size=12).hexdigest()
