"""`diffalign export`: a run's weights in a layout that others read, with a model card, and on the hub if asked."""

from pathlib import Path
from typing import Any

import torch

from diffalign import testbed
from diffalign.config import DistillConfig, JudgeConfig, RewardGradientConfig, TrainConfig, load_run_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.export import export_diffusers, export_kohya, export_merged
from diffalign.pipelines.hub import HUB_ID
from diffalign.pipelines.loading import BACKBONES, pipeline_class
from diffalign.report.model_card import UNKNOWN, licence_of, write_card
from diffalign.report.runs import read_run
from diffalign.stages import resolve

FORMATS = ("diffusers", "kohya", "merged")
LOAD = 'pipeline = DiffusionPipeline.from_pretrained("{path}")\n'
USAGE = {
    "diffusers": LOAD + 'pipeline.load_lora_weights("{out}")',
    "kohya": LOAD + 'pipeline.load_lora_weights("{out}", weight_name="kohya_lora.safetensors")',
    "merged": LOAD,
    "full": LOAD + "{kind} = type(pipeline.{trunk})\n"
    'pipeline.register_modules({trunk}={kind}.from_pretrained("{out}", subfolder="{trunk}"))',
}


def _config(run_dir: Path) -> TrainConfig | RewardGradientConfig:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise DiffalignError(
            f"{run_dir}: no run directory, it holds no config.yaml; give the run_dir of a training run"
        )
    if (run_dir / "student").is_dir():
        raise DiffalignError(
            f"{run_dir}: a distilled student, which is a whole pipeline already: {run_dir / 'student'}"
        )
    config = load_run_config(path)
    if isinstance(config, DistillConfig):
        raise DiffalignError(
            f"{run_dir}: a distilled student, which samples in its own way; the same command with save_pipeline=true writes it "
            "as a whole pipeline"
        )
    if isinstance(config, JudgeConfig):
        raise DiffalignError(f"{run_dir}: a judge, whose weights/ is a transformers folder already; nothing to export")
    return config


def _weights(run_dir: Path, best: bool) -> Path:
    folder = run_dir / ("best" if best else "weights")
    if not folder.is_dir():
        advice = (
            "it had no validation; leave --best out" if best else "the run has not ended; run the same command again"
        )
        raise DiffalignError(f"{run_dir} holds no {folder.name}/: {advice}")
    return folder


def _generators(config: TrainConfig | RewardGradientConfig) -> dict[str, str]:
    """Who made the training images and under which licence, as far as the dataset is still there to ask."""
    if isinstance(config, RewardGradientConfig) or not (config.data.path / "groups.parquet").is_file():
        return {}
    names = sorted(set(PreferenceDataset(config.data.path).generators().values()) - {""})
    return {
        name: "licence unknown; check it" if licence_of(name)[0] == UNKNOWN else licence_of(name)[0] for name in names
    }


def _usage(form: str, config: TrainConfig | RewardGradientConfig, out: Path, trunk: str, full: bool) -> str:
    kind = "full" if full and form != "merged" else form
    path = out.as_posix() if form == "merged" else config.model.path
    text = USAGE[kind].format(path=path, out=out.as_posix(), trunk=trunk, kind=f"{trunk}_class")
    return f'from diffusers import DiffusionPipeline\n\n{text.strip()}\nimage = pipeline("...").images[0]'


def export(
    run_dir: Path,
    out: Path,
    form: str,
    *,
    best: bool = False,
    licence: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Write the weights of `run_dir` in format `form` with their card into `out`; returns `out`.

    best: those of the best validation instead of the last. push: a repository "owner/name" on the hub, reached with the
    token that huggingface_hub finds (HF_TOKEN or `hf auth login`); none is ever passed on the command line.
    """  # fmt: skip
    if form not in FORMATS:
        raise DiffalignError(f"--format {form}: unknown; one of {', '.join(FORMATS)}")
    if push is not None and not HUB_ID.fullmatch(push):
        raise DiffalignError(f"--push {push}: a repository is named owner/name")
    config, weights = _config(run_dir), _weights(run_dir, best)
    if out.exists() and any(out.iterdir()) and not (out / "README.md").is_file():
        raise DiffalignError(f"--out {out}: not empty, and no export of before; choose another folder")
    path = str(testbed.model_path(config.model.path)) if config.model.path in testbed.MODELS else config.model.path
    family = BACKBONES[pipeline_class(path, config.model.revision, config.model.token, config.model.local_files_only)]
    full = config.tune.kind == "full"
    if full and form == "kohya":
        raise DiffalignError("--format kohya is for a LoRA, and this run trained all weights; use diffusers or merged")
    out.mkdir(parents=True, exist_ok=True)
    if form == "diffusers":
        export_diffusers(weights, family.trunk_name, out)
    elif form == "kohya":
        export_kohya(weights, family, out)
    else:
        options: dict[str, Any] = config.model.model_dump(include={"revision", "variant", "token", "local_files_only"})
        backbone = load_backbone(path, dtype=torch.float32, **config.model.options, **options)
        backbone.load_weights(weights)
        export_merged(backbone, out)
    usage = _usage(form, config, out, family.trunk_name, full)
    write_card(read_run(run_dir), out, kind=form, usage=usage, generators=_generators(config), licence=licence)
    resolve.say(f"exported: {out}")
    if push is not None:
        _push(out, push, private)
    return out


def _push(out: Path, name: str, private: bool) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(out), commit_message="Weights and card from diffalign")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise DiffalignError(
            f"--push {name}: the hub refused ({said}); log in with `hf auth login`. The export itself lies in {out}"
        ) from error
    resolve.say(f"pushed: https://huggingface.co/{name}")
