"""Validation during training: it changes no number of the training, keeps the best weights, and ends a run that idles."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.settings import SamplingSettings
from diffalign.training.average import averaged
from diffalign.training.validation import Validation, best_of, score_of
from helpers import toy
from helpers.files import json_lines
from helpers.tiny_training import Source, config_for

SECTION: dict[str, Any] = {
    "every": 2,
    "prompts": "p.txt",
    "seeds": 2,
    "steps": 2,
    "guidance_scale": 2.0,
    "batch_size": 3,
}


class Brightness:
    def measure(self, images: list[Image.Image], prompts: list[str], facts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"mean": torch.tensor([float(np.asarray(i).mean()) / 255 for i in images])}


def test_on_a_genuine_model_training_is_the_same_with_and_without(tmp_path: Path, sdxl_dir: Path) -> None:
    prompts = [PromptRow("a red cube"), PromptRow("two dogs")]
    for name in ("without", "with"):
        backbone = load_backbone(sdxl_dir)
        source = Source(backbone)
        options: dict[str, Any] = {"optimizer": {"lr": 0.02}, "validation": SECTION}
        config = config_for(sdxl_dir, tmp_path / name, 4, **options)
        config = config.model_copy(update={"train": config.train.model_copy(update={"ema_decay": 0.5})})
        encoded = backbone.encode_guided([p.prompt for p in prompts])
        expected = base_images(backbone, config, prompts) if name == "with" else None
        backbone.drop_encoders(keep_vae=True)
        section = config.validation
        drawn = SamplingSettings(section.steps, section.guidance_scale, height=64, width=64)
        validation = Validation(backbone, section, prompts, encoded, {"brightness": Brightness()}, drawn, config.seed)
        given = {"validation": validation} if name == "with" else {}
        toy.train(config, backbone=backbone, source=source, say=lambda _: None, **given)
        if expected is not None:
            assert json_lines(tmp_path / "with/validation.jsonl")[0]["scores"]["brightness.mean"] == expected
    assert (tmp_path / "with/metrics.jsonl").read_bytes() == (tmp_path / "without/metrics.jsonl").read_bytes()
    # Tensor by tensor: safetensors writes the entries of its metadata in any order.
    a, b = (load_file(tmp_path / name / "weights/pytorch_lora_weights.safetensors") for name in ("with", "without"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    made = json_lines(tmp_path / "with/validation.jsonl")
    assert [r["step"] for r in made] == [0, 2, 4] and made[0]["scores"] != made[1]["scores"] != made[2]["scores"]
    with Image.open(tmp_path / "with/samples/step-00000002.png") as grid:
        assert grid.size == (128, 64)
    assert (tmp_path / "with/best/pytorch_lora_weights.safetensors").is_file()


def base_images(backbone: Any, config: Any, prompts: list[PromptRow]) -> list[float]:
    """The score of the untrained model's images, drawn with its text encoders through the plain path."""
    from diffalign.draws import draw

    means = []
    for p, row in enumerate(prompts):
        seeds = [int(draw(config.seed, "validation", inner=p, member=k).integers(2**32)) for k in range(2)]
        images = [
            backbone.sample([row.prompt], [s], steps=2, guidance_scale=2.0, height=64, width=64)[0] for s in seeds
        ]
        means.append(round(float(np.mean([np.asarray(i).mean() / 255 for i in images])), 6))
    return [pytest.approx(m, abs=2e-3) for m in means]  # a batch of three rounds a level otherwise


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_encoded_prompts_draw_the_same_image(family: str, request: pytest.FixtureRequest) -> None:
    length = {"max_sequence_length": 12} if family == "sd3" else {}
    backbone = load_backbone(request.getfixturevalue(f"{family}_dir"), **length)
    options: dict[str, Any] = {"steps": 2, "guidance_scale": 2.0, "height": 64, "width": 64, "output_type": "pt"}
    plain = backbone.sample(["a red cube", "snow"], [1, 2], negative_prompt="blur", **options)
    encoded = backbone.encode_guided(["a red cube", "snow"], "blur")
    backbone.drop_encoders(keep_vae=True)
    with backbone.borrowed_vae():
        assert torch.equal(backbone.sample_encoded(encoded, [1, 2], **options), plain)
    backbone.drop_encoders()
    with pytest.raises(DiffalignError, match="keep it with keep_vae"), backbone.borrowed_vae():
        pass


def run(run_dir: Path, script: dict[int, float], said: list[str] | None = None, **sections: Any) -> None:
    config = toy.toy_config(run_dir, **sections)
    backbone = toy.ToyBackbone()
    validation = toy.Scripted(backbone, config.validation, [], {}, {}, 8, 0, script)
    say = (lambda _: None) if said is None else said.append
    toy.train(config, backbone=backbone, source=toy.ToySource(), say=say, validation=validation)


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": {"every": 2, "keep": 9}, "validation": SECTION}
    run(tmp_path, {0: 9.0, 2: 0.1, 4: 0.5, 6: 0.5, 8: 0.2}, **options)
    best, last = (load_file(tmp_path / d / "weights.safetensors") for d in ("best", "weights"))
    fourth = load_file(tmp_path / "checkpoints/step-00000004/policy.safetensors")
    assert torch.equal(best["up"], fourth["up"]) and not torch.equal(best["up"], last["up"])


def test_patience(tmp_path: Path) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"validation": {**SECTION, "patience": 2}, "train": {"steps": 12}}
    script = {2: 0.1, 4: 0.5, 6: 0.4, 8: 0.3, 10: 0.9}
    run(tmp_path, script, said, **options)
    assert [r["step"] for r in json_lines(tmp_path / "metrics.jsonl")][-1] == 8
    assert any("stopped at step 8; best/ is step 4" in line for line in said)
    assert (tmp_path / "checkpoints/step-00000008").is_dir()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(tmp_path, script, **options)  # the same command again has nothing to do
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run(tmp_path, script, **{**options, "validation": {**SECTION, "patience": None}})
    assert [r["step"] for r in json_lines(tmp_path / "metrics.jsonl")][-1] == 12


def test_a_resumed_run_has_the_same_validations(tmp_path: Path) -> None:
    script = {step: np.sin(step) for step in range(2, 14)}
    run(tmp_path / "a", script, validation=SECTION)
    run(tmp_path / "b", script, validation=SECTION, train={"steps": 4})
    with (tmp_path / "b/validation.jsonl").open("a") as stream:
        stream.write('{"step": 6, "scores": {"r.c": [7.0, 7.0]}}\n{"step"')  # after the checkpoint: cut
    run(tmp_path / "b", script, validation=SECTION)
    for file in ("metrics.jsonl", "validation.jsonl", "health.json", "best/weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    with pytest.raises(DiffalignError, match=r"validation\.seeds was 2"):
        run(tmp_path / "b", script, validation={**SECTION, "seeds": 3}, train={"steps": 14})


def test_choosing() -> None:
    made = [
        {"step": s, "scores": {"a.b": [v, None]}} for s, v in ((0, 9.0), (10, 1.0), (20, 3.0), (30, 3.0), (40, 2.0))
    ]
    assert best_of(made) == (20, 2) and best_of(made[:1]) == (0, 0)
    assert score_of({"step": 1, "scores": {"a.b": [1.0, None, 2.0], "c.d": [0.0]}}) == 1.5
    with pytest.raises(DiffalignError, match=r"no image could be scored by a\.b"):
        score_of({"step": 1, "scores": {"a.b": [None]}})


def test_the_average_is_put_in_and_out_bit_for_bit() -> None:
    policy = {"w": torch.nn.Parameter(torch.tensor([0.1, 0.7]))}
    with averaged(policy, {"w": torch.tensor([1.0, 2.0])}):
        assert policy["w"].tolist() == [1.0, 2.0]
    assert torch.equal(policy["w"], torch.tensor([0.1, 0.7]))
    with averaged(policy, None):
        assert torch.equal(policy["w"], torch.tensor([0.1, 0.7]))


def test_selection_prompts_are_refused_in_an_evaluation(tmp_path: Path) -> None:
    from diffalign.config import resolved_yaml
    from diffalign.stages import evaluate

    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    config = toy.toy_config(tmp_path, validation={**SECTION, "prompts": str(tmp_path / "p.txt")})
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    wanted: Any = SimpleNamespace(weights=tmp_path / "weights", prompts="q.txt")
    with pytest.raises(DiffalignError, match="1 of 2 prompts chose this run's weights by validation, such as 'a cat'"):
        evaluate._refuse_selection_prompts(wanted, [PromptRow("a cat"), PromptRow("a cow")])
    evaluate._refuse_selection_prompts(wanted, [PromptRow("a cow")])
