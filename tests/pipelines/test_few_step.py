"""Few-step samplers against their equations and against diffusers' pipelines; roles of student, teacher and fake."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.few_step import FewStep, Sampler, call_options, few_step, student_scheduler
from diffalign.pipelines.process import Flow


def test_cps_lies_between_euler_and_renoise() -> None:
    process = Flow()
    x, v, z = (torch.tensor(a).view(1, 2, 1, 1) for a in ([1.2, -0.3], [0.8, -1.1], [0.5, -0.5]))
    times = torch.tensor([0.9, 0.75, 0.0])

    def run(sampler: Any, eta: float = 1.0) -> tuple[list[float], float, list[float]]:
        student = FewStep(process, times, sampler, eta)
        mean, rho = student.transition(x, v, 0)
        return mean.flatten().tolist(), float(rho), student.advance(x, v, 0, z).flatten().tolist()

    mean, rho, sample = run("cps", 0.9)
    assert rho == pytest.approx(0.740766, abs=1e-6)
    assert mean == pytest.approx([0.270177, 0.124396], abs=1e-6)
    assert sample == pytest.approx([0.64056, -0.245987], abs=1e-6)
    assert run("cps", 0.0)[0] == pytest.approx([1.08, -0.135], abs=1e-6)
    assert run("euler")[0] == pytest.approx([1.08, -0.135], abs=1e-6) and run("euler")[1] == 0.0
    assert run("renoise")[0] == pytest.approx([0.12, 0.1725], abs=1e-6)
    assert run("renoise")[2] == pytest.approx([0.495, -0.2025], abs=1e-6) == run("cps", 1.0)[2]
    last, rho_last = FewStep(process, times, "cps", 0.9).transition(x, v, 1)
    assert float(rho_last) == 0.0 and last.flatten().tolist() == pytest.approx([0.6, 0.525], abs=1e-6)


@pytest.mark.parametrize(
    ("shift", "steps", "grid"),
    [
        (3.0, 4, [1, 0.9, 0.75, 0.5]),
        (5.0, 4, [1, 0.9375, 0.833333, 0.625]),
        (1.0, 4, [1, 0.75, 0.5, 0.25]),
        (3.0, 2, [1, 0.75]),
        (3.0, 1, [1]),
    ],
)
@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_a_flow_is_shifted_once(shift: float, steps: int, grid: list[float], sampler: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = student_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), steps, sampler)
    student = few_step(Flow(shift), scheduler, steps, sampler, 1.0, None)
    # diffusers' last time is itself shifted, which moves the ones between by a few thousandths
    assert student.times.tolist() == pytest.approx([*grid, 0.0], abs=4e-3)
    assert float(student.times[0]) == pytest.approx(1.0) and float(student.times[-2]) == pytest.approx(
        grid[-1], abs=1e-6
    )


def test_sdxl_times_are_those_of_dmd2(sdxl_dir: Path) -> None:
    backbone = load_backbone(sdxl_dir)
    samplers: tuple[Sampler, ...] = ("renoise", "euler")
    for sampler in samplers:
        four = student_scheduler(backbone.pipeline.scheduler, 4, sampler)
        assert few_step(backbone.process, four, 4, "renoise", 1.0, None).times.tolist() == [999, 749, 499, 249, -1]
    one = student_scheduler(backbone.pipeline.scheduler, 1, "renoise", [399.0])
    assert few_step(backbone.process, one, 1, "renoise", 1.0, [399.0]).times.tolist() == [399, -1]
    assert call_options(one, [399.0]) == {"timesteps": [399]} and call_options(one, None) == {}
    with pytest.raises(DiffalignError, match="falling times"):
        student_scheduler(backbone.pipeline.scheduler, 2, "renoise", [399.0, 999.0])


OTHER_BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name -> family, the base model's scheduler, its settings; a student takes over none of them
    "sdxl": ("sdxl", "EulerDiscreteScheduler", {}),
    "sdxl-clipped": ("sdxl", "DDIMScheduler", {"clip_sample": True, "thresholding": True}),
    "sdxl-karras": ("sdxl", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "sdxl-dpmpp": ("sdxl", "DPMSolverMultistepScheduler", {"thresholding": True, "use_karras_sigmas": True}),
    "sd3": ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "sd3-stochastic": ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    "sd3-karras": ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}),
}


@pytest.mark.parametrize("base", OTHER_BASES)
@pytest.mark.parametrize("sampler", ["renoise", "euler"])
@pytest.mark.parametrize("steps", [4, 3])
def test_the_saved_pipeline_samples_as_training_rolls_out(
    base: str, sampler: Any, steps: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Plain diffusers, from the folder, with nothing but the number of steps and guidance 0; 3 does not divide 1000."""
    import diffusers
    from diffusers import DiffusionPipeline

    family, kind, options = OTHER_BASES[base]
    backbone = load_backbone(request.getfixturevalue(f"{family}_dir"))
    common = dict(backbone.pipeline.scheduler.config) if family == "sdxl" else {}
    backbone.pipeline.scheduler = getattr(diffusers, kind).from_config({**common, **options})
    backbone.pipeline.scheduler = student_scheduler(backbone.pipeline.scheduler, steps, sampler)
    student = few_step(backbone.process, backbone.pipeline.scheduler, steps, sampler, 1.0, None)
    backbone.pipeline.save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    size = {} if family == "sdxl" else {"max_sequence_length": backbone.sampling_options()["max_sequence_length"]}
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(6)  # the SD3 pipeline hands its scheduler no generator: re-noising draws from the global one
    found = pipeline(
        "a red cube", num_inference_steps=steps, guidance_scale=0.0, generator=generator, output_type="latent", **size
    ).images.float()

    generator, later = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    conditioning = backbone.encode_prompts(["a red cube"])
    x = torch.randn(found.shape, generator=generator)
    later = generator if backbone.scheduler_seeded else later
    with torch.no_grad():
        for index in range(steps):
            prediction = backbone.predict(x, student.at(index, x), conditioning)
            noise = torch.randn(x.shape, generator=later) if sampler == "renoise" and index < steps - 1 else None
            x = student.advance(x, prediction, index, noise)
    np.testing.assert_allclose(x.numpy(), found.numpy(), atol=2e-4 * float(found.abs().max()))


def test_more_steps_than_the_student_has_are_refused_by_lcm(sdxl_dir: Path) -> None:
    backbone = load_backbone(sdxl_dir)
    scheduler = student_scheduler(backbone.pipeline.scheduler, 4, "renoise")
    with pytest.raises(ValueError, match="original_steps"):
        scheduler.set_timesteps(50)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_student_teacher_and_fake_are_apart(family: str, kind: str, request: pytest.FixtureRequest) -> None:
    backbone = load_backbone(request.getfixturevalue(f"{family}_dir"))
    if kind == "lora":
        backbone.add_lora(2, 2.0)
    else:
        backbone.enable_full()
    backbone.add_fake(seed=1)
    student, fake = backbone.trainable("student"), backbone.trainable("fake")
    assert len(student) == len(fake) > 0 and not {id(p) for p in student.values()} & {id(p) for p in fake.values()}
    assert all(p.requires_grad for p in (*student.values(), *fake.values()))
    conditioning = backbone.encode_prompts(["a"])
    x, t = torch.randn(1, backbone.latent_channels, 8, 8), torch.tensor([0.5 if family == "sd3" else 500.0])

    def predict(role: str) -> torch.Tensor:
        with torch.no_grad(), backbone.role(role):
            return backbone.predict(x, t, conditioning)

    before = predict("teacher")
    assert torch.equal(predict("student"), before) and torch.equal(predict("fake"), before)
    with torch.no_grad():
        for parameter in fake.values():
            parameter.add_(0.05)
    assert not torch.equal(predict("fake"), before)
    assert torch.equal(predict("student"), before) and torch.equal(predict("teacher"), before)

    # A graph of the student keeps its gradients while the others run; none reaches the fake, and the other way round.
    out = backbone.predict(x, t, conditioning).square().mean()
    predict("teacher"), predict("fake")
    out.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.values())
    assert all(p.grad is None for p in fake.values())
    for parameter in student.values():
        parameter.grad = None
    with backbone.role("fake"):
        backbone.predict(x, t, conditioning).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in fake.values())
    assert all(p.grad is None for p in student.values())
    with pytest.raises(RuntimeError, match="one fake"):
        backbone.add_fake()


def test_an_aligned_lora_is_teacher_student_and_fake(sd3_dir: Path, tmp_path: Path) -> None:
    aligned = load_backbone(sd3_dir)
    aligned.add_lora(2, 2.0)
    with torch.no_grad():
        for parameter in aligned.trainable().values():
            parameter.add_(0.05)
    aligned.save_weights(tmp_path)
    conditioning = aligned.encode_prompts(["a"])
    x, t = torch.randn(1, 16, 8, 8), torch.tensor([0.5])
    backbone = load_backbone(sd3_dir)
    base = backbone.predict(x, t, conditioning)
    backbone.add_lora(2, 2.0, init=tmp_path)
    backbone.add_fake()
    with torch.no_grad():
        expected = aligned.predict(x, t, conditioning)
        for role in ("student", "teacher", "fake"):
            with backbone.role(role):
                torch.testing.assert_close(backbone.predict(x, t, conditioning), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(base, expected, atol=1e-3)
    trained = {**backbone.trainable("student"), **backbone.trainable("fake")}
    assert all(p.requires_grad for p in trained.values())
    frozen = [n for n, p in backbone.trunk.named_parameters() if not p.requires_grad]
    assert any(".reference." in name for name in frozen) and not set(frozen) & set(trained)


def test_no_fake_before_it_is_added(sd3_dir: Path) -> None:
    backbone = load_backbone(sd3_dir)
    with pytest.raises(RuntimeError, match="tune the policy first"):
        backbone.add_fake()
    backbone.add_lora(2, 2.0)
    with pytest.raises(RuntimeError, match="no fake network"), backbone.role("fake"):
        pass
