"""Groups that are larger than memory: the step in passes of a few images has the gradient of the step at once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from diffalign.config import TrainConfig
from diffalign.errors import DiffalignError
from diffalign.objectives import OBJECTIVES, DiffusionDPO, DisCO, RankDPO
from diffalign.pipelines import load_backbone
from diffalign.pipelines.image_passes import in_passes
from diffalign.training.device import Share
from diffalign.training.preference.draws import make_draws
from diffalign.training.preference.gradient import StepGradient
from diffalign.training.preference.step import preference_step
from helpers import toy
from helpers.processes import command, finish, torchrun
from helpers.tiny_training import Source, config_for

SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {}, "dpo": {"beta": 20.0, "anchor": 0.5}, "disco": {"beta": 20.0, "trust": 1.0, "radius": 1e-6},
    "ddo": {"beta": 20.0}, "simpo": {"beta": 5.0, "anchor": 0.5}, "group_dpo": {"omega": 20.0},
    "nft": {"normalise": "l1"}, "awm": {"anchor": 0.1},
}  # fmt: skip


def run(
    run_dir: Path, name: str, images: int | None, backbone: Any = None, said: list[str] | None = None, **sections: Any
) -> list[dict[str, float]]:
    train_section = {"steps": 10, "images_per_pass": images, **sections.pop("train", {})}
    plain = toy.toy_config(run_dir, train=train_section, **sections).model_dump(mode="json")
    objective = {"name": name, **SETTINGS.get(name, {"beta": 20.0})}
    config = TrainConfig.model_validate({**plain, "objective": objective})
    say = (lambda _: None) if said is None else said.append
    toy.train(config, backbone=backbone or toy.ToyBackbone(), source=toy.labelled(name), say=say)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same(rows: list[dict[str, float]], whole: list[dict[str, float]]) -> None:
    assert [row.keys() for row in rows] == [row.keys() for row in whole]
    assert rows[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
    for key in whole[0]:
        values = [row[key] for row in whole]
        size = max(abs(value) for value in values)
        assert [row[key] for row in rows] == pytest.approx(values, rel=1e-4, abs=1e-4 * size), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_alike(name: str, tmp_path: Path) -> None:
    """K = 4, two micro-batches a step, one and three images at a time: three leave a remainder."""
    whole = run(tmp_path / "whole", name, None, train={"micro_batch": 2})
    assert whole[0]["grad_norm"] > 0
    for images in (1, 3):
        assert_same(run(tmp_path / str(images), name, images, train={"micro_batch": 2}), whole)


def gradients(backbone: Any, config: Any, objective: Any, images: int | None, autocast: bool = False) -> list[Tensor]:
    source = Source(backbone)
    batch = source.batch([0, 1])
    draws = make_draws(config, backbone.process, 1, [0, 1], batch.group_ids, batch.latents.shape)
    parameters = list(backbone.trainable().values())
    for parameter in parameters:
        parameter.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = preference_step(
            config, objective, backbone, batch, draws, source.unconditional, None, images_per_pass=images
        )
    result.output.loss.sum().backward()
    assert all(p.grad is not None for p in parameters)
    return [p.grad for p in parameters if p.grad is not None]


@pytest.mark.parametrize(
    ("family", "kind", "checkpointing"),
    [("sd3", "lora", True), ("sdxl", "lora", False), ("sd15", "full", False), ("flux", "lora", False)],
)
def test_genuine_models_have_the_same_gradient(
    family: str, kind: str, checkpointing: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{family}_dir")
    backbone = load_backbone(folder, gradient_checkpointing=checkpointing)
    config = config_for(folder, tmp_path, 1)
    if kind == "full":
        backbone.enable_full()
    else:
        backbone.add_lora(4, 4.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the reference, where most gaps are 0
        for parameter in backbone.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    for objective in (RankDPO(50.0), DisCO(50.0, radius=0.0), DiffusionDPO(50.0, anchor=0.5)):
        whole = gradients(backbone, config, objective, None)
        size = max(float(g.abs().max()) for g in whole)
        for images in (1, 4):
            for a, b in zip(gradients(backbone, config, objective, images), whole, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * size)
    # In bfloat16 casts of the weights are shared between passes; the sum of gradients is rounded at other places.
    half, whole = (gradients(backbone, config, RankDPO(50.0), images, autocast=True) for images in (2, None))
    flat, other = (torch.cat([g.flatten() for g in gs]) for gs in (half, whole))
    assert float((flat - other).norm() / other.norm()) < 0.05


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 256), nn.Linear(256, 8)

    def forward(self, x: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return x + self.down((self.up(x + conditioning["prompt"]) + t[:, None]).tanh())


def kept_bytes(network: Wide, images: int | None) -> int:
    """What a forward pass of 12 samples holds for its backward."""
    sizes: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def pack(values: Tensor) -> Tensor:
        if values.untyped_storage().data_ptr() not in own:
            sizes[values.untyped_storage().data_ptr()] = values.untyped_storage().nbytes()
        return values

    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        out = in_passes(network, x, torch.rand(12), {"prompt": torch.ones(12, 8)}, images)
        loss = (out.mean(dim=1) ** 2).sum()
    loss.backward()
    return sum(sizes.values())


def test_only_one_pass_is_kept_and_the_others_run_twice() -> None:
    network, calls = Wide(), []
    network.register_forward_pre_hook(lambda module, args: calls.append((len(args[0]), torch.is_grad_enabled())))
    whole = kept_bytes(network, None)
    assert calls == [(12, True)]
    calls.clear()
    assert kept_bytes(network, 4) < 0.45 * whole
    assert calls == [(4, True)] * 5  # three, then the first two again
    calls.clear()
    assert kept_bytes(network, 1) < 0.2 * whole
    assert len(calls) == 23
    calls.clear()
    with torch.no_grad():
        in_passes(network, torch.zeros(5, 8), torch.zeros(5), {"prompt": torch.ones(5, 8)}, 2)
    assert calls == [(2, False), (2, False), (1, False)]


class Small(toy.ToyBackbone):
    """A GPU that holds the activations of `room` images."""

    room = 8

    def predict(
        self, noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor], module: nn.Module | None = None
    ) -> Tensor:
        if torch.is_grad_enabled() and len(noisy) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")
        return super().predict(noisy, t, conditioning, module)


def test_a_group_that_does_not_fit_goes_on_in_passes(tmp_path: Path) -> None:
    """The second micro-batch of a step fails: the step begins anew, and what the first one had left counts once."""
    whole = run(tmp_path / "whole", "rankdpo", None, train={"micro_batch": 2})
    said: list[str] = []
    backbone = Small()
    backbone.room, calls = 8, []

    class Shrinking(Small):
        def predict(self, noisy: Tensor, *rest: Any, **options: Any) -> Tensor:
            if torch.is_grad_enabled():
                calls.append(len(noisy))
                self.room = 8 if len(calls) < 6 else 7  # the third step's second micro-batch
            return super().predict(noisy, *rest, **options)

    rows = run(tmp_path / "small", "rankdpo", None, Shrinking(), said, train={"micro_batch": 2})
    assert calls[:6] == [8] * 6 and calls[6] == 1
    assert_same(rows, whole)
    assert [line for line in said if "do not fit" in line] == [
        "step 3: the images of 2 groups do not fit into the GPU's memory; from here on one image at a time, with the same "
        "gradient (train.images_per_pass=1 begins so)"
    ]


def test_where_not_even_one_image_fits(tmp_path: Path) -> None:
    backbone = Small()
    backbone.room = 0
    with pytest.raises(
        DiffalignError, match=r"step 1: not even one image fits .*\(CUDA out of memory\); set model.grad"
    ):
        run(tmp_path, "dpo", None, backbone)


def test_several_processes_are_told_the_key() -> None:
    """One process cannot begin its step anew while the others wait for its gradients."""
    fields = dict.fromkeys(StepGradient.__dataclass_fields__, None)
    model = SimpleNamespace(gradient_checkpointing=False)
    fields |= {"share": Share(range(2), 2), "accelerator": SimpleNamespace(num_processes=2)}
    fields |= {"config": SimpleNamespace(model=model), "backbone": SimpleNamespace(checkpointing=False)}
    gradient = StepGradient(**fields)
    with pytest.raises(DiffalignError, match="step 5: the images of 2 groups .*set train.images_per_pass=1 and run"):
        gradient._make_room(4, "CUDA out of memory")
    model.gradient_checkpointing = "auto"
    with pytest.raises(DiffalignError, match=r"step 5: .*set model.gradient_checkpointing=true and run"):
        gradient._make_room(4, "CUDA out of memory")


def test_auto_checkpointing_comes_before_passes(tmp_path: Path) -> None:
    """Blocks keep less first, and images go one at a time where that is not enough either."""
    whole = run(tmp_path / "whole", "rankdpo", None, train={"micro_batch": 2})
    said: list[str] = []

    class Tight(Small):
        """Holds 8 images with gradient checkpointing and 7 without, and 1 from the fourth step on."""

        checkpointing: Any = False
        seen: ClassVar[list[tuple[int, Any]]] = []

        def checkpoint(self, kind: Any) -> None:
            self.checkpointing = kind

        def predict(self, noisy: Tensor, *rest: Any, **options: Any) -> Tensor:
            if torch.is_grad_enabled():
                self.seen.append((len(noisy), self.checkpointing))
                self.room = (8 if self.checkpointing else 7) if len(self.seen) < 8 else 1
            return super().predict(noisy, *rest, **options)

    auto = {"model": {"path": "toy", "gradient_checkpointing": "auto"}}
    rows = run(tmp_path / "tight", "rankdpo", None, Tight(), said, train={"micro_batch": 2}, **auto)
    assert Tight.seen[:8] == [(8, False), *[(8, True)] * 7] and Tight.seen[8] == (1, True)
    assert_same(rows, whole)
    assert [line.partition("memory; ")[2] for line in said if "do not fit" in line] == [
        "from here on with gradient checkpointing, with the same gradient (model.gradient_checkpointing=true begins so)",
        "from here on one image at a time, with the same gradient (train.images_per_pass=1 begins so)",
    ]


def test_two_processes_in_passes_keep_what_one_process_reads(tmp_path: Path) -> None:
    """Two of DDP, in passes, against one process at once; then one process takes the reference from the store of the two."""
    sections = {"train": {"images_per_pass": 1}, "objective": {"name": "gdro", "beta": 20.0}}
    kept = sections | {"reference": {"store": str(tmp_path / "kept"), "keep": "predictions"}}
    line = [*command(tmp_path / "two", 10, 4, 1), "0", json.dumps(kept)]
    finish([*torchrun(), *line])
    two = [json.loads(row) for row in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    config = toy.toy_config(
        tmp_path / "one", objective={"name": "dpo"}, train={"steps": 10, "groups_per_step": 4, "micro_batch": 1}
    ).model_dump(mode="json")
    rows = {}
    for name, change in (("one", {}), ("reading", {"reference": kept["reference"]})):
        images = 1 if name == "reading" else None
        changed = {**config, **change, "objective": sections["objective"], "run_dir": str(tmp_path / name)}
        changed["train"] = {**config["train"], "images_per_pass": images}
        toy.train(
            TrainConfig.model_validate(changed), backbone=toy.ToyBackbone(), source=toy.ToySource(), say=lambda _: None
        )
        rows[name] = [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    for name in ("one", "reading"):
        assert_same(two, rows[name])
    names = {path.name for path in (tmp_path / "kept").glob("step-*")}
    assert {f"step-00000001-00000003-{process}.safetensors" for process in (0, 1)} <= names
    assert rows["reading"][0]["drift"] == 0.0 and len(list((tmp_path / "kept").glob("step-*"))) == len(names)
