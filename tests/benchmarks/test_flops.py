"""What the speed benchmark counts: FLOPs of the published sizes, and of the phases of a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def _shape(*sizes: int) -> torch.Tensor:
    return torch.empty(*sizes, device="meta", dtype=torch.bfloat16)


def test_a_forward_at_1024_px_has_the_known_flops() -> None:
    """6.76 TFLOP for SDXL and 11.25 for SD3.5-Medium, as others report; 2.57 and 2.24 thousand million weights."""
    from shared.random_models import trunk
    from shared.step_phases import counted

    unet, transformer = (trunk(name, "meta", torch.bfloat16) for name in ("sdxl", "sd35"))
    added = {"text_embeds": _shape(1, 1280), "time_ids": _shape(1, 6)}
    with torch.no_grad():
        sdxl = counted(lambda: unet(_shape(1, 4, 128, 128), _shape(1), _shape(1, 77, 2048), added_cond_kwargs=added))
        sd35 = counted(lambda: transformer(_shape(1, 16, 128, 128), _shape(1, 333, 4096), _shape(1, 2048), _shape(1)))
    assert sdxl / 1e12 == pytest.approx(6.76, abs=0.005)
    assert sd35 / 1e12 == pytest.approx(11.25, abs=0.005)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (unet, transformer)]
    assert sizes == [2_567_463_684, 2_243_171_520]


def test_attention_is_counted_on_a_cpu() -> None:
    """Two products of [L, D] and [D, L] a head, two FLOPs a multiply-add; backward has four of them and computes one anew."""
    from shared.step_phases import counted

    batch, heads, length, width = 2, 3, 16, 8
    q, k, v = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))
    one = 2 * batch * heads * length * length * width
    out: list[torch.Tensor] = []
    assert counted(lambda: out.append(F.scaled_dot_product_attention(q, k, v))) == 2 * one
    assert counted(lambda: out[0].sum().backward()) == 5 * one


def test_a_step_is_cut_into_phases() -> None:
    from shared.step_phases import flops_by_phase, peaks_by_phase

    trunk = nn.Linear(32, 16, bias=False)
    optimizer = torch.optim.SGD(trunk.parameters(), lr=0.1)
    x = torch.randn(8, 32)

    def step(without_gradient: int) -> None:
        with torch.no_grad():
            for _ in range(without_gradient):
                trunk(x)
        trunk(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one = 2 * 8 * 32 * 16
    with flops_by_phase([trunk], references=1) as found:
        step(3)
    assert {name: value for name, value in found.items() if value} == {
        "inversion": 2 * one, "reference": one, "policy": one, "backward": one,
    }  # fmt: skip
    with peaks_by_phase([trunk], cuda=False) as peaks:
        step(1)
    # The output, 8 x 16 float32, is in every phase; the gradient of the weight, 32 x 16, joins it in backward.
    assert peaks["reference"] == 8 * 16 * 4
    assert peaks["backward"] >= 32 * 16 * 4


def test_what_the_counter_missed_is_counted_with_one_group() -> None:
    from training_throughput import counted_flops

    from shared.timed_training import Cell, measured

    cell = Cell("small-sd35", "dpo", "lora", 256, 2, 2, {})
    whole = measured(cell, "cpu", 0, 0)["flops"]
    assert counted_flops(cell, "cpu", whole) is whole
    ended_early = {name: value for name, value in whole.items() if name not in ("backward", "update")}
    assert counted_flops(cell, "cpu", ended_early) == whole


def test_a_checkpointed_step_needs_what_a_plain_one_needs() -> None:
    """A UNet's first blocks have no gradient and are not computed again, so a whole forward would be too much to take off."""
    from shared.timed_training import Cell, measured, model_flops

    needed = {}
    for checkpointing in (False, True):
        settings = {"model.gradient_checkpointing": True} if checkpointing else {}
        cell = Cell("small-sdxl", "dpo", "lora", 128, 2, 2, settings)
        flops = measured(cell, "cpu", 0, 0)["flops"]
        needed[checkpointing] = model_flops(cell, flops)
        if checkpointing:
            assert sum(flops.values()) - flops["policy"] < 0.99 * needed[True] < 0.99 * sum(flops.values())
    assert needed[True] == pytest.approx(needed[False], rel=1e-3)


def test_a_grid_resumes_with_the_rows_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training_throughput as throughput

    calls: list[str] = []

    def row(cell: Any, *_: Any) -> dict[str, Any]:
        calls.append(str(cell))
        names = ("model", "objective", "tune", "side", "groups", "images", "settings")
        line: dict[str, Any] = {name: vars(cell)[name] for name in names}
        if len(calls) == 2:
            return {**line, "failed": "out of memory"}
        rates = dict.fromkeys(("seconds", "steps_per_second", "images_per_second", "predicted_peak_gib"), 1.0)
        unknown = dict.fromkeys(("model_teraflops_per_second", "fraction_of_ceiling"))
        return {**line, **rates, **unknown, "teraflop": {}, "peak_gib": {"policy": 1.0}}

    monkeypatch.setattr(throughput, "row", row)
    monkeypatch.setattr(throughput, "matmul_ceiling", lambda *_: 1e12)
    throughput.grid("cpu", True, 1, "small-sdxl dpo lora 256px", tmp_path)
    first = list(calls)
    assert len(first) == len(set(first)) > 3
    throughput.grid("cpu", True, 1, "small-sdxl dpo lora 256px", tmp_path, resume=True)
    assert calls[len(first) :] == [first[1]]  # only what failed
    throughput.grid("cpu", True, 1, "small-sdxl dpo lora 256px", tmp_path, seconds=-1.0)
    assert len(calls) == len(first) + 1
