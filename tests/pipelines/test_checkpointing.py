"""Gradient checkpointing: random generators are left alone without dropout, and attention can be spared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.pipelines import load_backbone
from diffalign.pipelines.checkpointing import checkpoint_function, draws_dropout


class Block(nn.Module):
    """A layer, and dropout where p is over 0."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(8, 8), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer(x)).square()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_generators_are_saved_for_dropout_alone(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block, x = Block(p), torch.randn(4, 8)
    found = []
    saved: list[int] = []
    state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: saved.append(1) or state())
    for checkpointed in (False, True):
        torch.manual_seed(1)
        out = checkpoint_function(block, True)(block, x) if checkpointed else block(x)
        torch.rand(3)  # another draw between forward and backward
        out.sum().backward()
        found.append([weight.grad.clone() for weight in block.parameters() if weight.grad is not None])
        block.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) == 2
    assert draws_dropout(block) == bool(saved) == (p > 0)


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_attention_is_not_computed_again(sd3_dir: Path) -> None:
    counts = {}
    kinds: tuple[Any, ...] = (False, "attention", True)
    for kind in kinds:
        backbone = load_backbone(sd3_dir, gradient_checkpointing=kind)
        backbone.add_lora(2, 2)
        backbone.trunk.train()
        noisy = torch.randn(2, backbone.latent_channels, 8, 8)
        conditioning = backbone.encode_prompts(["a", "b"])
        out = backbone.predict(noisy, torch.tensor([0.7, 0.2]), conditioning)
        with Operators() as seen:
            out.square().mean().backward()
        counts[kind] = seen.counts
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert counts["attention"][attention] == counts[False][attention] == 0 < counts[True][attention]
    assert counts[False]["gelu"] == 0 < counts["attention"]["gelu"] == counts[True]["gelu"]
