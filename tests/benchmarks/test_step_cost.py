"""What a step of the published sizes asks of a GPU: bounds that a change may lower and not raise."""

from __future__ import annotations

import pytest
import torch

# As counted when each bound was last lowered: four pairs at 1024 px, LoRA of rank 16, bfloat16.
BOUNDS = {
    "sdxl": {"kernels": 8_821, "casts": 17, "host reads": 0, "gigabytes moved": 617, "gigabytes saved": 44.9},
    "sd35": {"kernels": 5_563, "casts": 15, "host reads": 0, "gigabytes moved": 794, "gigabytes saved": 44.3},
}


@pytest.mark.parametrize("model", BOUNDS)
def test_a_step_costs_no_more_than_its_bounds(model: str) -> None:
    from shared.step_cost import step_cost

    cost = step_cost(model, 4, None)
    figures = cost.figures()
    assert {name: value for name, value in figures.items() if value > BOUNDS[model][name]} == {}
    # A count that missed a phase, or attention, would pass any bound.
    assert set(cost.by_phase) == {"reference", "policy", "backward"} and min(cost.by_phase.values()) > 1000
    attention = {"sdxl": 140, "sd35": 37}[model]  # SD3.5's first 13 of 24 layers have two
    assert cost.operators["_scaled_dot_product_flash_attention"] == 2 * attention


def test_operators_are_counted_by_what_they_do() -> None:
    """A view and an allocation are free; a product reads two tensors and writes one; a cast and a read are named."""
    from shared.step_cost import StepCost, _Counting

    cost = StepCost()
    x, w = torch.ones(4, 8), torch.ones(2, 8)
    with _Counting(cost):
        y = x @ w.t()
        y.view(2, 4).transpose(0, 1)
        torch.empty(100)
        y.to(torch.bfloat16)
        float(y[0, 0])
    assert dict(cost.operators) == {"mm": 1, "_to_copy": 1, "_local_scalar_dense": 1}
    assert (cost.kernels, cost.casts, cost.host_reads) == (3, 1, 1)
    assert cost.moved == 4 * (4 * 8 + 2 * 8 + 4 * 2) + (4 + 2) * 4 * 2 + 4


def test_kept_activations_are_those_of_autograd() -> None:
    """Checkpointing keeps the inputs of blocks and what lies outside them."""
    from shared import random_models
    from shared.step_cost import step_cost

    kept = {}
    for checkpointing in (False, True):
        backbone = random_models.backbone(
            "small-sd35", "meta", torch.bfloat16, gradient_checkpointing=checkpointing
        )  # fmt: skip
        backbone.add_lora(16, 16.0)
        backbone.trunk.train()
        kept[checkpointing] = step_cost("small-sd35", 1, torch.bfloat16, backbone).saved
    assert 0 < kept[True] < 0.6 * kept[False]
