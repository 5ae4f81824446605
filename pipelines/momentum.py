"""A LoRA beyond the last one: what momentum across rounds starts from."""

from pathlib import Path

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.files import make_folder
from diffalign.files.tensors import damaged, read_metadata, read_tensors
from diffalign.pipelines.lora_file import LORA_FILE, lora_file
from diffalign.pipelines.save_lora import as_trained, as_written, write_tensors


def extrapolate(
    now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor] | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Return (A, B) of rank r with B A nearest to (1 + m) B A - m B' A' of one layer; A [r, ...], B [out, r, ...].

    Nearest by the singular values: two LoRAs of rank r differ by rank 2 r, and the next round trains one of rank r again.
    `before` None stands for no change yet, so the result is (1 + m) B A exactly.
    """
    a, b = now
    if before is None:
        return a, b * (1 + momentum)
    rank = a.shape[0]
    wide = torch.cat([(1 + momentum) * b.flatten(1), -momentum * before[1].flatten(1)], dim=1).double()  # [out, 2 r]
    tall = torch.cat([a.flatten(1), before[0].flatten(1)]).double()  # [2 r, in]
    # The product's singular values from the two thin factors, without ever forming [out, in].
    q_out, r_out = torch.linalg.qr(wide)
    q_in, r_in = torch.linalg.qr(tall.T)
    u, s, vt = torch.linalg.svd(r_out @ r_in.T)
    root = s[:rank].sqrt()
    up = q_out @ u[:, :rank] * root
    down = root[:, None] * (vt[:rank] @ q_in.T)
    if up.shape[1] < rank:  # a layer narrower than the rank
        up = torch.nn.functional.pad(up, (0, rank - up.shape[1]))
        down = torch.nn.functional.pad(down, (0, 0, 0, rank - down.shape[0]))
    return down.to(a.dtype).reshape(a.shape).contiguous(), up.to(b.dtype).reshape(b.shape).contiguous()


def extrapolate_lora(now: Path, before: Path | None, momentum: float, out: Path) -> None:
    """Write into `out` the LoRA that lies `momentum` times the last change beyond `now` (Nesterov's step, as in Accelerated
    Preference Optimization, arXiv 2410.06293, there on the policy's log-likelihoods; on the weights is ours).

    All three are relative to the same base. Raises DiffalignError where the two LoRAs do not have the same layers and rank.
    """
    tensors, metadata = _read(now)
    earlier = None if before is None else _read(before)[0]
    if earlier is not None and {k: v.shape for k, v in earlier.items()} != {k: v.shape for k, v in tensors.items()}:
        raise DiffalignError(f"{now} and {before} are LoRAs of other layers or ranks; momentum needs the same")
    found = dict(tensors)
    for name in (n for n in tensors if ".lora_A." in n):
        other = name.replace(".lora_A.", ".lora_B.")
        last = None if earlier is None else (earlier[name], earlier[other])
        found[name], found[other] = extrapolate((tensors[name], tensors[other]), last, momentum)
    make_folder(out)
    write_tensors(out / LORA_FILE, as_written(found, metadata), metadata)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors as trained, and the metadata. Raises DiffalignError for a damaged file."""
    path = lora_file(folder)
    metadata = read_metadata(path)
    try:
        return as_trained(read_tensors(path), metadata)[0], metadata
    except ValueError as error:
        raise damaged(path, error) from error
