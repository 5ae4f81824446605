"""The folder of a run: the resolved config and a short README, written before the first step."""

from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import DiffalignError

README = """# {name}

`{base}` fine-tuned with diffalign: objective `{objective}`, {steps} steps of {groups} groups, {kind}.

- `config.yaml`: the resolved config; `diffalign train {folder}/config.yaml` goes on where this run stopped.
- `metrics.jsonl`: one row a step. `timing.jsonl`: seconds, the share of them spent waiting for data, peak memory.
- `weights/`: what was trained, in diffusers' format. {how}
- `checkpoints/`: the state to go on from.
"""

LORA = """Use it with

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("{folder}/weights")
```
"""


DISTILLED = """# {name}

`{base}` distilled to {steps} steps with diffalign: {updates} updates of the student, {fake} of the fake network, guidance
{guidance:g}, groups of {group}.

- `config.yaml`: the resolved config; `diffalign distill {folder}/config.yaml` goes on where this run stopped.
- `metrics.jsonl`: one row an update of the student. `timing.jsonl`: seconds and peak memory.
- `weights/`: the student, in diffusers' format. `student/`, if asked for: the whole pipeline, with how to call it.
- `checkpoints/`: the state to go on from: student, fake network and their optimisers.
"""

FOLLOWED = """# {name}

`{base}` fine-tuned with diffalign on the gradient of {rewards}: {method}, {steps} steps of {images} images, {kind}.

- `config.yaml`: the resolved config; `diffalign reward-gradient {folder}/config.yaml` goes on where this run stopped.
- `metrics.jsonl`: one row a step. `timing.jsonl`: seconds and peak memory.
- `weights/`: what was trained, in diffusers' format. {how}
- `checkpoints/`: the state to go on from.
"""


def open_run_dir(run_dir: Path, config: dict[str, Any]) -> None:
    """Create the folder with `config.yaml` and `README.md`; an existing run keeps its files but these two."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiffalignError(f"run_dir {run_dir} cannot be made ({error.strerror}); choose another one") from error
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    base, folder, lora = config["model"]["path"], run_dir.as_posix(), config["tune"]["kind"] == "lora"
    if "student" in config:
        (run_dir / "README.md").write_text(
            DISTILLED.format(
                name=run_dir.name,
                base=base,
                steps=config["student"]["steps"],
                updates=config["train"]["steps"],
                fake=config["train"]["steps"] * config["fake"]["updates"],
                guidance=config["match"]["guidance"],
                group=config["group"]["size"],
                folder=folder,
            )
        )
        return
    how = LORA.format(base=base, folder=folder) if lora else "A trunk folder for `from_pretrained`."
    if "rewards" in config:
        (run_dir / "README.md").write_text(
            FOLLOWED.format(
                name=run_dir.name,
                base=base,
                rewards=" and ".join(f"`{term['name']}`" for term in config["rewards"]),
                method=config["method"]["name"],
                steps=config["train"]["steps"],
                images=config["train"]["images_per_step"],
                kind="LoRA" if lora else "all weights",
                folder=folder,
                how=how,
            )
        )
        return
    (run_dir / "README.md").write_text(
        README.format(
            name=run_dir.name,
            base=base,
            objective=config["objective"]["name"],
            steps=config["train"]["steps"],
            groups=config["train"]["groups_per_step"],
            kind="LoRA" if lora else "all weights",
            folder=folder,
            how=how,
        )
    )
