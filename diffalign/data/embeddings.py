"""Prompt embeddings: each distinct prompt is encoded once into memory-mapped files, or at every step.

    prompts-<key>/<name>.bf16    the values of all prompts, one after another, without a header
    prompts-<key>/index.json     the prompts' hashes, and the place and shape of each array

Zeros at the end of rows and columns are not stored; reading puts them back, so the model sees every number. For SD3
without T5 they are most of an embedding: 256 of 333 tokens, and half the width of the others. Other padding is stored,
because these models attend to it: SD1.5, SDXL and SD3 encode CLIP's padding to 77 tokens and T5's to its full length
without a mask, as FLUX does, and their trunks have no mask either. bfloat16 because T5's outputs exceed float16's
range; it rounds to 2^-9 of a value.

A prompt is encoded alone, not in a batch, whose size would decide its last bits: the embedding depends on the prompt
only.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffalign.data.protocols import PromptEncoder
from diffalign.files import check_space
from diffalign.progress import Say

UNCONDITIONAL = "unconditional"
"""What the index calls the row that takes the place of a dropped prompt; no prompt's hash is of this length."""


def encoded(backbone: PromptEncoder, prompt: str | None) -> dict[str, Tensor]:
    """Return everything that the model needs of one prompt, or of none (None), each [...] bfloat16 on the CPU."""
    found = backbone.encode_unconditional() if prompt is None else backbone.encode_prompts([prompt])
    return {name: values[0].to(torch.bfloat16) for name, values in found.items()}


class LivePrompts:
    """Embeddings made when asked for (`data.cache: latents` or `off`); the text encoders stay in memory.

    `unconditional`: what a dropped prompt is replaced by, which is what sampling steers away from; [1, ...] each.
    """

    def __init__(self, backbone: PromptEncoder) -> None:
        self.backbone = backbone
        self.unconditional = {name: values[None].float() for name, values in encoded(backbone, None).items()}

    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of B prompts, each [B, ...] float32."""
        once = {prompt: encoded(self.backbone, prompt) for prompt in dict.fromkeys(prompts)}
        return {name: torch.stack([once[p][name] for p in prompts]).float() for name in self.unconditional}


class PromptStore:
    """The cached embeddings, memory-mapped; `batch` and `unconditional` as in `LivePrompts`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / "index.json").read_text())
        self._at = {digest: n for n, digest in enumerate(index["prompts"])}
        self._arrays = {
            name: _Ragged(folder / f"{name}.bf16", tuple(entry["full"]), [tuple(s) for s in entry["shapes"]])
            for name, entry in index["arrays"].items()
        }
        self.unconditional = self._rows([self._at[UNCONDITIONAL]])

    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of B cached prompts, each [B, ...] float32."""
        return self._rows([self._at[prompt_digest(prompt)] for prompt in prompts])

    def _rows(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: torch.stack([array.read(row) for row in rows]).float() for name, array in self._arrays.items()}

    @classmethod
    def write(cls, folder: Path, prompts: Sequence[str], backbone: PromptEncoder, say: Say) -> None:
        """Encode the distinct `prompts`, and what replaces a dropped one, into `folder`."""
        distinct: list[str | None] = [*dict.fromkeys(prompts), None]
        check_space(folder, prompt_bytes(prompts, backbone), "the cache of prompt embeddings")
        full: dict[str, list[int]] = {}
        shapes: dict[str, list[tuple[int, ...]]] = {}
        parts = {}
        try:
            for prompt in distinct:
                for name, values in encoded(backbone, prompt).items():
                    if name not in parts:
                        parts[name] = (folder / f"{name}.bf16").open("wb")
                        full[name], shapes[name] = list(values.shape), []
                    kept = trimmed(values)
                    shapes[name].append(tuple(kept.shape))
                    parts[name].write(_bits(kept).tobytes())
        finally:
            for part in parts.values():
                part.close()
        arrays = {name: {"full": full[name], "shapes": shapes[name]} for name in sorted(parts)}
        digests = [UNCONDITIONAL if prompt is None else prompt_digest(prompt) for prompt in distinct]
        index = {"prompts": digests, "arrays": arrays}
        (folder / "index.json").write_text(json.dumps(index))
        say(f"cached embeddings of {len(distinct) - 1} prompts")


def prompt_bytes(prompts: Sequence[str], backbone: PromptEncoder) -> int:
    """Return the size of the cached embeddings in bytes; encodes one prompt to learn its shape."""
    distinct = list(dict.fromkeys(prompts))
    of_one = sum(trimmed(values).numel() for values in encoded(backbone, distinct[0] if distinct else None).values())
    return 2 * (len(distinct) + 1) * of_one


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


class _Ragged:
    """Arrays of different shapes in one flat file, read back at their full shape."""

    def __init__(self, path: Path, full: tuple[int, ...], shapes: list[tuple[int, ...]]) -> None:
        self.full, self.shapes = full, shapes
        self.starts = np.concatenate([[0], np.cumsum([int(np.prod(shape)) for shape in shapes])])
        self.flat = np.memmap(path, np.int16, mode="r")

    def read(self, row: int) -> Tensor:
        values = np.array(self.flat[self.starts[row] : self.starts[row + 1]])
        kept = torch.from_numpy(values).view(torch.bfloat16).view(self.shapes[row])
        whole = torch.zeros(self.full, dtype=torch.bfloat16)
        whole[tuple(slice(0, n) for n in kept.shape)] = kept
        return whole


def _bits(values: Tensor) -> np.ndarray:
    """Return bfloat16 values, which numpy does not have, as int16 with the same bits."""
    return values.contiguous().view(torch.int16).numpy()


def prompt_digest(prompt: str) -> str:
    """Return the hash by which a prompt is found in the index."""
    return hashlib.blake2b(prompt.encode(), digest_size=12).hexdigest()
