"""The step on genuine (tiny, random) diffusers models: against the equations written out, and against its own past."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.draws import draw, normal
from diffalign.pipelines import load_backbone
from diffalign.training.order import groups_for_step
from helpers import toy
from helpers.tiny_training import TRAJECTORIES, Source, config_for


def drawn(config: Any, source: Source, process: Any, step: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """(group, noise, time) of a step, from the documented keys of the draws."""
    out = []
    for slot, group in enumerate(groups_for_step(4, 2, step, config.seed)):
        name = {"step": step, "inner": slot, "group": source.group_ids[group]}
        noise = torch.from_numpy(normal(draw(config.seed, "noise", **name), (1, *source.latents.shape[2:])))
        out.append((group, noise, torch.tensor(draw(config.seed, "time", **name).random(), dtype=torch.float64)))
    return out


def sdxl_prediction(unet: Any, x: torch.Tensor, t: torch.Tensor, source: Source, group: int) -> torch.Tensor:
    size = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    added = {"text_embeds": source.conditioning["pooled_prompt_embeds"][group : group + 1], "time_ids": size}
    return unet(x, t, source.conditioning["prompt_embeds"][group : group + 1], added_cond_kwargs=added).sample


def sd3_prediction(transformer: Any, x: torch.Tensor, t: torch.Tensor, source: Source, group: int) -> torch.Tensor:
    return transformer(
        x,
        encoder_hidden_states=source.conditioning["prompt_embeds"][group : group + 1],
        pooled_projections=source.conditioning["pooled_prompt_embeds"][group : group + 1],
        timestep=1000 * t,
    ).sample


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_second_step_equals_the_equations(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """-log sigmoid(-beta/2 [(e_w - e_w_ref) - (e_l - e_l_ref)]), written out with diffusers' modules and schedulers."""
    from diffusers import DDPMScheduler, SD3Transformer2DModel, UNet2DConditionModel

    folder = request.getfixturevalue(f"{family}_dir")
    backbone = load_backbone(folder)
    source = Source(backbone)
    config = config_for(folder, tmp_path, 2, optimizer={"lr": 0.02})
    toy.train(config, backbone=backbone, source=source, say=lambda _: None)
    measured = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    # The policy after one step is needed for the second loss: train one step alone.
    first = load_backbone(folder)
    toy.train(
        config_for(folder, tmp_path / "first", 1, optimizer={"lr": 0.02}),
        backbone=first,
        source=source,
        say=lambda _: None,
    )
    kind, name = (UNet2DConditionModel, "unet") if family == "sdxl" else (SD3Transformer2DModel, "transformer")
    reference = kind.from_pretrained(folder, subfolder=name).eval()
    losses = []
    with torch.no_grad(), first.role("policy"):
        for group, noise, u in drawn(config, source, backbone.process, 1):
            images = source.latents[group][[1, 2]]  # winner, loser
            errors = {}
            for label, model in (("policy", first.trunk), ("reference", reference)):
                if family == "sdxl":
                    t = (u * 1000).floor().long()[None]
                    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
                    noisy = [scheduler.add_noise(x[None], noise, t) for x in images]
                    predictions = [sdxl_prediction(model, x, t, source, group) for x in noisy]
                    targets = [noise, noise]
                else:
                    t = u.float()[None]
                    noisy = [(1 - t) * x[None] + t * noise for x in images]
                    predictions = [sd3_prediction(model, x, t, source, group) for x in noisy]
                    targets = [noise - x[None] for x in images]
                errors[label] = [float((p - y).square().mean()) for p, y in zip(predictions, targets, strict=True)]
            d_w, d_l = (errors["policy"][i] - errors["reference"][i] for i in (0, 1))
            losses.append(math.log1p(math.exp(0.5 * 200.0 * (d_w - d_l))))
    assert measured[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert measured[1]["loss"] != pytest.approx(math.log(2), rel=1e-4)
    assert measured[1]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_trajectory_is_the_committed_one(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Loss and gradient norm of a short run. They change only with the mathematics; DIFFALIGN_UPDATE=1 writes them anew."""
    folder = request.getfixturevalue(f"{family}_dir")
    backbone = load_backbone(folder)
    config = config_for(folder, tmp_path, 6, optimizer={"lr": 1e-3})
    toy.train(config, backbone=backbone, source=Source(backbone), say=lambda _: None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trajectory = {name: [row[name] for row in rows] for name in ("loss", "grad_norm")}
    path = TRAJECTORIES / f"{family}_dpo.json"
    if os.environ.get("DIFFALIGN_UPDATE"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(trajectory, indent=1) + "\n")
    committed = json.loads(path.read_text())
    for name, values in trajectory.items():
        assert values == pytest.approx(committed[name], rel=1e-4), name


def test_full_fine_tuning_trains_every_weight(tmp_path: Path, sd3_dir: Path) -> None:
    backbone = load_backbone(sd3_dir)
    plain = config_for(sd3_dir, tmp_path, 2, optimizer={"lr": 1e-3}).model_copy(
        update={"tune": toy.toy_config(tmp_path, tune={"kind": "full"}).tune}
    )
    before = {k: v.clone() for k, v in backbone.trunk.state_dict().items()}
    toy.train(plain, backbone=backbone, source=Source(backbone), say=lambda _: None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["margin"] == 0.0 and rows[1]["drift"] > 0
    moved = [k for k, v in backbone.trunk.state_dict().items() if not torch.equal(v, before[k])]
    assert len(moved) > 0.8 * len(list(backbone.trunk.parameters()))
    assert (tmp_path / "weights" / "transformer" / "config.json").is_file()
