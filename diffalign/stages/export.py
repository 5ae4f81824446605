"""`diffalign export`: a run's weights in a layout that other programs read, with a model card, also on the hub."""

import tempfile
from pathlib import Path

from diffalign.config import DistillConfig, JudgeConfig, RewardGradientConfig, TrainConfig, load_run_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.errors import DiffalignError
from diffalign.files import make_folder
from diffalign.files.lock import holds_files, writing_folder
from diffalign.pipelines.export import export_diffusers, export_kohya, export_merged
from diffalign.pipelines.hub import HUB_ID
from diffalign.pipelines.loading import BACKBONES, pipeline_class
from diffalign.pipelines.lora_file import is_checkpoint
from diffalign.progress import say
from diffalign.report.model_card import licence_name, write_card
from diffalign.report.runs import read_run
from diffalign.stages.resolve import model_folder, open_plain_backbone
from diffalign.training.readme import for_single_file

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
    """Return the config of a run that has weights to export. Raise DiffalignError for other folders."""
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
    """Return the folder of the last weights, or of the best. Raise DiffalignError where the run has none."""
    folder = run_dir / ("best" if best else "weights")
    if not folder.is_dir():
        advice = (
            "it had no validation; leave --best out" if best else "the run has not ended; run the same command again"
        )
        raise DiffalignError(f"{run_dir} holds no {folder.name}/: {advice}")
    return folder


def _generators(config: TrainConfig | RewardGradientConfig) -> dict[str, str]:
    """Return the licence of each generator of the training images; none if the dataset is not on disk any more."""
    if isinstance(config, RewardGradientConfig) or not (config.data.path / "groups.parquet").is_file():
        return {}
    names = sorted(set(PreferenceDataset(config.data.path).generators().values()) - {""})
    return {name: licence_name(name) or "licence unknown; check it" for name in names}


def _usage(form: str, config: TrainConfig | RewardGradientConfig, out: Path, trunk: str, full: bool) -> str:
    """Return the Python snippet of the card: how to load the export in diffusers."""
    kind = "full" if full and form != "merged" else form
    path = out.as_posix() if form == "merged" else config.model.path
    text = USAGE[kind].format(path=path, out=out.as_posix(), trunk=trunk, kind=f"{trunk}_class")
    text = for_single_file(text, config.model.path)
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
    """Write the weights of `run_dir` in format `form`, with their model card, into `out`: `diffalign export`. Return `out`.

    run_dir: a run, or one of its checkpoints (`RUN/checkpoints/step-N`), of which the average is taken if it was kept.
    best: export the weights of the best validation, not the last. licence: what the card states; None: the base's. push: a
    repository "owner/name" on the hub to upload to, with the token that huggingface_hub finds (HF_TOKEN or `hf auth login`);
    private: make it private if it is new. Raises DiffalignError where the run has no such weights, and for a format that
    does not fit them.
    """
    with writing_folder(out, "--out"), tempfile.TemporaryDirectory() as saved:
        _export(run_dir, out, form, best, licence, push, Path(saved))
    if push is not None:
        _push(out, push, private)
    return out


def _export(
    run_dir: Path, out: Path, form: str, best: bool, licence: str | None, push: str | None, saved: Path
) -> None:
    """Do what `export` does, but for pushing. saved: an empty folder for the weights of a checkpoint."""
    # Refuse wrong arguments before anything is written.
    if form not in FORMATS:
        raise DiffalignError(f"--format {form}: unknown; one of {', '.join(FORMATS)}")
    if push is not None and not HUB_ID.fullmatch(push):
        raise DiffalignError(f"--push {push}: a repository is named owner/name")
    checkpoint = run_dir if is_checkpoint(run_dir) else None
    if checkpoint is not None:
        run_dir = checkpoint.absolute().parent.parent
        if best:
            raise DiffalignError(f"--best: {checkpoint} is a checkpoint; give the run's directory, or leave --best out")
    config = _config(run_dir)
    weights = checkpoint or _weights(run_dir, best)
    if holds_files(out) and not (out / "README.md").is_file():
        raise DiffalignError(f"--out {out}: not empty, and not an earlier export; choose another folder")
    model = config.model
    folder = model_folder(model.path)
    family = BACKBONES[pipeline_class(folder, model.revision, model.token, model.local_files_only, model.config)]
    full = config.tune.kind == "full"
    if full and form == "kohya":
        raise DiffalignError("--format kohya is for a LoRA, and this run trained all weights; use diffusers or merged")
    if checkpoint is not None and form != "merged":
        backbone = open_plain_backbone(config.model)
        backbone.load_weights(checkpoint)
        backbone.save_weights(saved)
        weights = saved
    # Write the weights, then the card.
    make_folder(out)
    if form == "diffusers":
        export_diffusers(weights, family.trunk_name, out)
    elif form == "kohya":
        export_kohya(weights, family, out)
    else:
        backbone = open_plain_backbone(config.model)
        backbone.load_weights(weights)
        export_merged(backbone, out)
    usage = _usage(form, config, out, family.trunk_name, full)
    write_card(read_run(run_dir), out, kind=form, usage=usage, generators=_generators(config), licence=licence)
    say(f"exported: {out}")


def _push(out: Path, name: str, private: bool) -> None:
    """Upload a folder to the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(out), commit_message="Weights and card from diffalign")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DiffalignError(
            f"--push {name}: the hub refused ({reason}); log in with `hf auth login`. The export itself is in {out}"
        ) from error
    say(f"pushed: https://huggingface.co/{name}")
