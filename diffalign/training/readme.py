"""The README.md of a run directory: what was trained, which file is what, how the weights are used."""

from __future__ import annotations

from diffalign.config import BackboneRunConfig, DistillConfig, JudgeConfig, RewardGradientConfig, TrainConfig
from diffalign.files.published import load_base

TRAIN = """# {name}

`{base}` fine-tuned with diffalign: objective `{objective}`, {steps} steps of {groups} groups, {kind}.

- `config.yaml`: the resolved config; `diffalign train {folder}/config.yaml` resumes this run.
- `metrics.jsonl`: one row a step. `timing.jsonl`: seconds, the share of them spent waiting for data, peak memory.
- `weights/`: what was trained, in diffusers' format. {how}
- `checkpoints/`: the state to resume from.
"""

LORA = """ComfyUI, A1111, Forge and kohya's sd-scripts read another layout:
  `diffalign export {folder}` writes it, as `kohya_lora.safetensors`, beside diffusers' own. Use `weights/` with

```python
{base}
pipeline.load_lora_weights("{folder}/weights")
```
"""

TRUNK = "A trunk folder for `from_pretrained`."

DISTILL = """# {name}

`{base}` distilled to {steps} steps with diffalign: {updates} updates of the student, {fake} of the fake network, guidance
{guidance:g}, groups of {group}.

- `config.yaml`: the resolved config; `diffalign distill {folder}/config.yaml` resumes this run.
- `metrics.jsonl`: one row an update of the student. `timing.jsonl`: seconds and peak memory.
- `weights/`: the student, in diffusers' format. `student/`, if asked for: the whole pipeline, with how to call it.
- `checkpoints/`: the state to resume from: student, fake network and their optimisers.
"""

REWARD_GRADIENT = """# {name}

`{base}` fine-tuned with diffalign on the gradient of {rewards}: {method}, {steps} steps of {images} images, {kind}.

- `config.yaml`: the resolved config; `diffalign reward-gradient {folder}/config.yaml` resumes this run.
- `metrics.jsonl`: one row a step. `timing.jsonl`: seconds and peak memory.
- `weights/`: what was trained, in diffusers' format. {how}
- `checkpoints/`: the state to resume from.
"""

JUDGE = """# {name}

`{base}` trained as a {role} of image scores with diffalign: method `{method}`, {steps} steps of {records} records, {kind}.

- `config.yaml`: the resolved config; `diffalign judge {folder}/config.yaml` resumes this run.
- `metrics.jsonl`: one row a step. `timing.jsonl`: seconds and peak memory.
- `weights/`: model, processor and read-out, adapters merged; measure it with `diffalign judge-eval {folder}/weights RATINGS`.
- `checkpoints/`: the state to resume from.
"""


def _common(config: BackboneRunConfig | JudgeConfig) -> dict[str, str]:
    """Return what every README names."""
    lora, base, folder = config.tune.kind == "lora", str(config.model.path), config.run_dir.as_posix()
    return {
        "name": config.run_dir.name,
        "base": base,
        "folder": folder,
        "kind": "LoRA" if lora else "all weights",
        "how": LORA.format(base=load_base(base, published=False), folder=folder) if lora else TRUNK,
    }


def train_readme(config: TrainConfig) -> str:
    """Write the README of a run on preferences."""
    train = config.train
    return TRAIN.format(
        objective=config.objective.name, steps=train.steps, groups=train.groups_per_step, **_common(config)
    )


def distill_readme(config: DistillConfig) -> str:
    """Write the README of a distillation."""
    return DISTILL.format(
        steps=config.student.steps,
        updates=config.train.steps,
        fake=config.train.steps * config.fake.updates,
        guidance=config.match.guidance,
        group=config.group.size,
        **_common(config),
    )


def reward_gradient_readme(config: RewardGradientConfig) -> str:
    """Write the README of a run on the gradient of rewards."""
    return REWARD_GRADIENT.format(
        rewards=" and ".join(f"`{term.name}`" for term in config.rewards),
        method=config.method.name,
        steps=config.train.steps,
        images=config.train.images_per_step,
        **_common(config),
    )


def judge_readme(config: JudgeConfig) -> str:
    """Write the README of a judge's training."""
    return JUDGE.format(
        role=config.role,
        method=config.method,
        steps=config.train.steps,
        records=config.train.records_per_step,
        **_common(config),
    )
