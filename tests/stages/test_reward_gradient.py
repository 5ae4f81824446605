"""`diffalign reward-gradient` on genuine (tiny, random) checkpoints: the sampler, the decoder, the run, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.config import load_reward_gradient_config
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.rewards import load_reward
from diffalign.stages.reward_gradient import check_differentiable, gradient_scores
from diffalign.training.prompt_source import PromptSource
from diffalign.training.reward_gradient.draws import make_gradient_draws, span_of
from diffalign.training.reward_gradient.step import UnrolledSampler, reward_gradient_step
from helpers.command_line import run

PROMPTS = "a red cube\ntwo dogs\na cat left of a cup\nsnow\n"


def config(folder: Path, model: Path, more: str = "") -> Path:
    """Keys in `more` take the place of those here."""
    (folder / "prompts.txt").write_text(PROMPTS)
    keys = {line.split(":")[0] for line in more.splitlines()}
    lines = [
        f"run_dir: {folder / 'run'}",
        "device: cpu",
        f"model: {{path: {model}}}",
        f"prompts: {folder / 'prompts.txt'}",
        "resolution: 64",
        "tune: {rank: 2, alpha: 2.0}",
        "sampler: {steps: 4, guidance_scale: 3.0}",
        "rewards: [{name: sharpness}]",
        "tracking: {trackers: []}",
        "train: {steps: 2, images_per_step: 2, threads: 1}",
        "checkpoint: {every: 1}",
        "optimizer: {lr: 0.01}",
    ]
    path = folder / "c.yaml"
    path.write_text("\n".join([*(line for line in lines if line.split(":")[0] not in keys), more]) + "\n")
    return path


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "z_image", "qwen_image", "qwen_image_21"])
def test_training_sees_the_images_that_sampling_gives(family: str, request: pytest.FixtureRequest) -> None:
    """The unrolled sampler against the diffusers pipeline: with guidance, Qwen-Image's own of it, and times by FLUX's size."""
    backbone: Any = load_backbone(request.getfixturevalue(f"{family}_dir"))
    scale, seeds = (3.5 if family == "flux" else 4.0), [3, 4]
    texts = PROMPTS.splitlines()[:2]
    expected = backbone.sample(texts, seeds, steps=5, guidance_scale=scale, height=64, width=64, output_type="latent")
    source = PromptSource(backbone, [PromptRow(text) for text in texts], cache=True)
    empty = {name: value.expand(2, *value.shape[1:]) for name, value in source.unconditional.items()}
    sampler = UnrolledSampler(backbone, backbone.sampling_times(5, 64, 64), source.batch([0, 1]), empty, scale)
    shape = (1, backbone.latent_channels, 64 // backbone.vae_scale_factor, 64 // backbone.vae_scale_factor)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    rolled = sampler.roll(backbone.process.initial(noise), 5)
    torch.testing.assert_close(rolled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_through_a_real_trunk_and_decoder(kind: str, tmp_path: Path, sd3_dir: Path) -> None:
    """Checkpointing of sampler, trunk and decoder changes no gradient; every weight has one; the drift starts at 0."""
    found = []
    for checkpointed in (True, False):
        more = f"method: {{name: draft, last: 3}}\ndrift: {{weight: 0.1}}\ntune: {{kind: {kind}}}\n" + (
            "" if checkpointed else "decoder: {checkpointing: false}\n"
        )
        settings = load_reward_gradient_config(
            config(tmp_path, sd3_dir, more), [f"sampler.checkpointing={str(checkpointed).lower()}"]
        )
        backbone: Any = load_backbone(sd3_dir, gradient_checkpointing=checkpointed)
        if kind == "lora":
            backbone.add_lora(2, 2.0, seed=0)
        else:
            backbone.enable_full()
        backbone.trunk.train()
        rows = [PromptRow(text) for text in PROMPTS.splitlines()]
        scores = gradient_scores(settings, backbone, rows, {"sharpness": load_reward("sharpness")})
        source = PromptSource(backbone, rows, cache=True)
        draws = make_gradient_draws(settings, 0, [0, 1], ["a", "b"], (backbone.latent_channels, 8, 8))
        output = reward_gradient_step(
            settings, backbone, backbone.sampling_times(4, 64, 64), source.batch([0, 1]), source.unconditional, draws,
            span_of(settings, 0), [0, 1], scores,
        )  # fmt: skip
        assert output.metrics["drift"].tolist() == [0.0, 0.0]
        output.loss.sum().backward()
        found.append({name: p.grad for name, p in backbone.trainable().items()})
    checkpointed_, plain = found
    assert all(gradient is not None for gradient in plain.values())
    assert any(bool(gradient.abs().max() > 0) for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed_[name], gradient, rtol=0, atol=0, msg=name)


def test_half_precision_loses_no_gradient(tmp_path: Path, sd3_dir: Path) -> None:
    """Casts of weights that autocast kept from the roll-out, which has no gradient, must not serve the steps that learn."""
    settings = load_reward_gradient_config(config(tmp_path, sd3_dir, "method: {name: draft, last: 2}"))
    rows = [PromptRow(text) for text in PROMPTS.splitlines()]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        backbone: Any = load_backbone(sd3_dir, dtype=dtype)
        backbone.add_lora(2, 2.0, seed=0)
        with torch.no_grad():
            for name, parameter in backbone.trainable().items():
                # B = 0 leaves A without a gradient; now both have one.
                parameter.add_(0.1 if "lora_B" in name else 0.0)
        backbone.trunk.train()
        scores = gradient_scores(settings, backbone, rows, {"sharpness": load_reward("sharpness")})
        source = PromptSource(backbone, rows, cache=True)
        draws = make_gradient_draws(settings, 0, [0, 1], ["a", "b"], (backbone.latent_channels, 8, 8))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = reward_gradient_step(
                settings, backbone, backbone.sampling_times(4, 64, 64), source.batch([0, 1]), source.unconditional,
                draws, span_of(settings, 0), [0, 1], scores,
            )  # fmt: skip
        assert output.loss.dtype == output.image.dtype == torch.float32
        assert output.metrics["drift"].min() > 0
        output.loss.sum().backward()
        assert all(p.grad is not None for p in backbone.trainable().values())
        found.append(torch.cat([p.grad.flatten() for p in backbone.trainable().values()]))
    assert float(torch.nn.functional.cosine_similarity(*found, dim=0)) > 0.95


def test_a_few_steps_raise_the_reward_of_the_embedded_model(tmp_path: Path) -> None:
    """On prompts that are not trained on, by the pipeline itself."""
    more = (
        "model: {path: shapes-sd3, max_sequence_length: 12}\nprompts: testbed:train\nsampler: {steps: 4, guidance_scale: 3.0}\n"
        "tune: {rank: 8, alpha: 8.0}\nmethod: {name: draft}\noptimizer: {lr: 0.003}\n"
        "train: {steps: 12, images_per_step: 4, threads: 1}\ncheckpoint: {every: 12}\n"
        "validation: {every: 12, prompts: testbed:validation, n: 12, batch_size: 12, rewards: [{name: sharpness}]}"
    )
    assert run("reward-gradient", config(tmp_path, tmp_path, more)) == 0
    before, after = (
        torch.tensor(json.loads(line)["scores"]["sharpness.sharpness"])
        for line in (tmp_path / "run/validation.jsonl").read_text().splitlines()
    )
    gain = after - before
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5 and gain.mean() > 0.1


def test_decoding_in_tiles_keeps_the_gradient(tmp_path: Path, sdxl_dir: Path) -> None:
    backbone: Any = load_backbone(sdxl_dir, dtype=torch.bfloat16)
    rows = [PromptRow("snow")]
    latents = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    slopes = []
    for tiling in (False, True):
        settings = load_reward_gradient_config(
            config(tmp_path, sdxl_dir, f"decoder: {{tiling: {str(tiling).lower()}}}")
        )
        scores = gradient_scores(settings, backbone, rows, {"sharpness": load_reward("sharpness")})
        assert backbone.pipeline.vae.dtype == torch.float32
        backbone.pipeline.vae.disable_tiling()  # as a validation leaves it
        leaf = latents.clone().requires_grad_()
        scores(leaf, [0])["sharpness"].sum().backward()
        assert leaf.grad is not None and bool((leaf.grad.flatten(2).abs().amax(2) > 0).all())
        slopes.append(leaf.grad)
    near = torch.nn.functional.cosine_similarity(*(s.flatten() for s in slopes), dim=0)
    assert 0.5 < float(near) < 0.9999  # tiles are blended, so not quite the same


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("sdxl", "method: {name: refl, between: [2, 3]}\nrewards: [{name: sharpness, form: relu, threshold: 9.0}]\n"),
        (
            "sd3",
            "method: {name: draft, last: 2}\ndrift: {weight: 0.1}\n"
            "validation: {every: 1, prompts: PROMPTS, rewards: [{name: jpeg_compressibility}, {name: sharpness}]}\n",
        ),
        ("flux", "method: {name: draft_lv}\nsampler: {steps: 3, guidance_scale: 3.5}\ntune: {rank: 2, alpha: 2.0}\n"),
        ("z_image", "method: {name: draft, last: 1}\nsampler: {steps: 2, guidance_scale: 3.0}\n"),
        ("qwen_image", "method: {name: draft, last: 1}\nsampler: {steps: 2, guidance_scale: 3.0}\n"),
        ("qwen_image_21", "method: {name: draft, last: 1}\nsampler: {steps: 2, guidance_scale: 3.0}\n"),
    ],
)
def test_a_run_on_every_family(
    family: str, more: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    model = request.getfixturevalue(f"{family}_dir")
    path = config(tmp_path, model, more.replace("PROMPTS", str(tmp_path / "prompts.txt")))
    assert run("reward-gradient", path, "--dry-run") == 0 and not (tmp_path / "run").exists()
    assert "steps with a gradient: " in capsys.readouterr().out
    assert run("reward-gradient", path) == 0
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["drift"] == 0.0 < rows[1]["drift"]
    assert {"loss", "reward", "grad_norm", "lr", "judged_step", "gradient_steps"} <= set(rows[0])
    assert "reward-gradient" in (folder / "README.md").read_text() and (folder / "report.html").is_file()
    before = (folder / "metrics.jsonl").read_bytes()
    assert run("reward-gradient", path) == 0 and (folder / "metrics.jsonl").read_bytes() == before  # complete
    if "validation" in more:
        judged = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        assert [row["step"] for row in judged] == [0, 1, 2] and (folder / "best").is_dir()
        report = (folder / "report.html").read_text()
        assert "Validation: sharpness" in report and "1 x sharpness" in report
    # A resumed run is the straight one, bit for bit.
    if family == "sd3":
        assert run("reward-gradient", path, "train.steps=1", f"run_dir={tmp_path / 'again'}") == 0
        assert run("reward-gradient", path, f"run_dir={tmp_path / 'again'}") == 0
        assert (tmp_path / "again/metrics.jsonl").read_bytes() == before
        a, b = (load_file(tmp_path / d / "checkpoints/step-00000002/policy.safetensors") for d in ("run", "again"))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert run("export", folder, "--out", tmp_path / "out") == 0
        assert "load_lora_weights" in (tmp_path / "out/README.md").read_text()
        (tmp_path / "others.txt").write_text("a blue ball\nrain\n")
        common = ["seeds=1", "steps=2", "height=64", "width=64", "reward={name: sharpness}"]
        assert run("eval", folder, f"prompts={tmp_path / 'others.txt'}", *common) == 0
        capsys.readouterr()
        assert run("eval", folder, f"prompts={tmp_path / 'prompts.txt'}", *common) == 2
        assert "chose this run's weights by validation" in capsys.readouterr().err
    # The weights load into a plain backbone and change what it draws.
    backbone: Any = load_backbone(model)
    options: dict[str, Any] = {"steps": 3, "guidance_scale": 3.5, "height": 64, "width": 64, "output_type": "latent"}
    bare = backbone.sample(["snow"], [1], **options)
    backbone.load_weights(folder / "weights")
    assert not torch.equal(backbone.sample(["snow"], [1], **options), bare)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("method: {name: refl, between: [2, 4]}", r"two rising numbers of 0 to 3 are needed, not \[2, 4\]"),
        ("method: {name: refl, between: [3, 2]}", "two rising numbers"),
        ("method: {name: draft, last: 5}", "the sampler has 4 steps"),
        ("method: {name: alignprop, last: [0, 3]}", r"two rising numbers of 1 to sampler.steps=4"),
        ("method: {name: reflo}", "unknown method reflo; did you mean refl"),
        ("method: {name: draft, depth: 2}", "unknown key method.depth"),
        ("rewards: [{name: sharpness, form: relu}]", "form=relu and a threshold go together"),
        ("rewards: [{name: sharpness, threshold: 1.0}]", "form=relu and a threshold go together"),
        ("rewards: [{name: sharpness}, {name: sharpness}]", "named twice"),
        ("rewards: []", "rewards"),
        ("validation: {every: 1}", "none are given"),
        ("train: {images_per_step: 4, micro_batch: 3}", "does not divide train.images_per_step=4"),
        ("tune: {kind: full, targets: [to_q]}", "targets choose where a LoRA goes"),
        ("optimizer: {warmup_steps: 400}", "does not end within train.steps=2"),
        ("drift: {wieght: 1.0}", "did you mean weight"),
    ],
)
def test_mistakes_in_the_config(more: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=said) as caught:
        load_reward_gradient_config(config(tmp_path, tmp_path, more))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["shapes_sd3_reward_gradient", "sdxl_refl", "sd3_draft"])
def test_recipes_follow_rewards_that_have_a_gradient(recipe: str) -> None:
    settings = load_reward_gradient_config(recipe)
    check_differentiable(settings)
    assert settings.validation.rewards[0].name not in {term.name for term in settings.rewards}


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_a_reward_without_a_gradient_is_refused_before_anything_is_loaded(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, tmp_path / "no-such-model", "rewards: [{name: jpeg_compressibility}]")
    assert run("reward-gradient", path, *arguments) == 2
    error = capsys.readouterr().err
    assert "jpeg_compressibility is not differentiable" in error and "sharpness" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_model_that_takes_its_scale_must_be_given_it(
    tmp_path: Path, flux_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("reward-gradient", config(tmp_path, flux_dir)) == 2
    assert "set both to the same value" in capsys.readouterr().err
    assert run("reward-gradient", config(tmp_path, flux_dir, "sampler: {guidance_scale: 3.5}\nresolution: 72\n")) == 2
    assert "needs a multiple of 16" in capsys.readouterr().err


def test_an_unknown_reward_names_its_neighbour(
    tmp_path: Path, sdxl_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("reward-gradient", config(tmp_path, sdxl_dir, "rewards: [{name: sharpnes}]")) == 2
    assert "did you mean 'sharpness'" in capsys.readouterr().err
