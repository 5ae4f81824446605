"""`diffalign export`: a run's weights in a layout that other programs read, with a model card, also on the hub."""

import tempfile
from pathlib import Path

from diffalign.config import DistillConfig, JudgeConfig, RewardGradientConfig, TrainConfig, load_run_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.errors import DiffalignError, brief
from diffalign.files import make_folder
from diffalign.files.lock import holds_files, writing_folder
from diffalign.files.published import is_local, load_base, public_name
from diffalign.pipelines import Backbone
from diffalign.pipelines.export import (
    PEFT_FILE,
    export_diffusers,
    export_kohya,
    export_merged,
    export_peft,
    export_single_file,
    export_trunk,
)
from diffalign.pipelines.hub import HUB_ID, component_config
from diffalign.pipelines.kohya import KOHYA_FILE
from diffalign.pipelines.loading import BACKBONES, model_index, pipeline_class
from diffalign.pipelines.lora_file import LORA_FILE, is_checkpoint
from diffalign.pipelines.save_single_file import SINGLE_FILE
from diffalign.progress import say
from diffalign.report.model_card import licence_name, write_card
from diffalign.report.runs import read_run
from diffalign.stages.resolve import DTYPES, model_folder, open_plain_backbone

FORMATS = ("weights", "diffusers", "kohya", "peft", "merged", "single-file")
WHOLE = ("merged", "single-file")
"""Formats that hold the base model, too."""
LOAD_LORA = 'pipeline.load_lora_weights("{out}", weight_name="{file}"){here}'
LOAD_PEFT = """from peft import PeftModel

pipeline.{trunk} = PeftModel.from_pretrained(pipeline.{trunk}, "{out}"){here}"""
LOAD_MERGED = 'from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained("{out}"){here}'
LOAD_FILE = """from diffusers import {pipeline}

pipeline = {pipeline}.from_single_file("{out}"){here}"""
LOAD_TRUNK = """{trunk}_class = type(pipeline.{trunk})
pipeline.register_modules({trunk}={trunk}_class.from_pretrained("{out}", subfolder="{trunk}")){here}"""
READERS = {
    LORA_FILE: "diffusers; ComfyUI for SD3 and FLUX",
    PEFT_FILE: "peft's `PeftModel.from_pretrained`, on the pipeline's trunk",
    KOHYA_FILE: "ComfyUI, Forge and kohya's sd-scripts; A1111 for SD1.5 and SDXL",
}
FILES = {
    "weights": (LORA_FILE, KOHYA_FILE),
    "diffusers": (LORA_FILE,),
    "kohya": (KOHYA_FILE,),
    "peft": (PEFT_FILE,),
    "merged": (),
    "single-file": (),
}
"""The files of a LoRA in each format."""


def lora_files(form: str, family: type[Backbone]) -> tuple[str, ...]:
    """Return the files of a LoRA of this family in a format; `weights` are those that its programs read."""
    if form != "weights":
        return FILES[form]
    known = {LORA_FILE: True, KOHYA_FILE: family.kohya is not None, PEFT_FILE: not family.lora_loader}
    return tuple(file for file, written in known.items() if written)


def _config(run_dir: Path) -> TrainConfig | RewardGradientConfig:
    """Return the config of a run that has weights to export. Raise DiffalignError for other folders."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise DiffalignError(
            f"{run_dir} is not a run directory: it has no config.yaml; give the run_dir of a training run"
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
    path = None if isinstance(config, RewardGradientConfig) else config.data.path
    if path is None or not (path / "groups.parquet").is_file():
        return {}
    names = sorted(set(PreferenceDataset(path).generators().values()) - {""})
    return {public_name(name): licence_name(name) or "licence unknown; check it" for name in names}


def _usage(form: str, base: str, folder: str | None, family: type[Backbone], full: bool) -> str:
    """Return the Python snippet of the card: how to load the export in diffusers, from the hub or the card's own folder."""
    trunk = family.trunk_name
    out, here = (folder, "") if folder else (".", "  # the folder of this file")
    if form == "merged":
        loaded = LOAD_MERGED.format(out=out, here=here)
    elif form == "single-file" and family.single_file is not None:
        if not family.single_file.components:
            return f"# {SINGLE_FILE} holds the {trunk} alone: {family.single_file.readers}"
        url = f"https://huggingface.co/{folder}/blob/main/{SINGLE_FILE}" if folder else SINGLE_FILE
        loaded = LOAD_FILE.format(
            pipeline=family.pipeline_class().__name__, out=url, here="" if folder else "  # beside this file"
        )
    elif full:
        loaded = load_base(base, published=True) + "\n" + LOAD_TRUNK.format(trunk=trunk, out=out, here=here)
    elif form == "peft" or (form == "weights" and not family.lora_loader):
        loaded = load_base(base, published=True) + "\n" + LOAD_PEFT.format(trunk=trunk, out=out, here=here)
    else:
        file = KOHYA_FILE if form == "kohya" else LORA_FILE
        loaded = load_base(base, published=True) + "\n" + LOAD_LORA.format(out=out, file=file, here=here)
    return f'{loaded}\nimage = pipeline("...").images[0]'


def _write(
    form: str, config: TrainConfig | RewardGradientConfig, weights: Path, out: Path, dtype: str
) -> type[Backbone]:
    """Write the weights in format `form` and return the model's family."""
    model = config.model
    path, access = model_folder(model.path), (model.token, model.local_files_only)
    family = BACKBONES[pipeline_class(path, model.revision, *access, model.config)]
    if form in WHOLE:
        backbone = open_plain_backbone(model)
        backbone.load_weights(weights)
        (export_merged if form == "merged" else export_single_file)(backbone, out, DTYPES[dtype])
    elif config.tune.kind == "full":
        export_trunk(weights, family.trunk_name, out)
    else:
        files = lora_files(form, family)
        if LORA_FILE in files:
            export_diffusers(weights, family.trunk_name, out)
        if PEFT_FILE in files:
            export_peft(weights, out)
        if KOHYA_FILE in files:
            index, commit = model_index(path, model.config, model.revision, *access)
            export_kohya(weights, family, component_config(path, index, commit, family.trunk_name, *access), out)
    return family


def _base_name(config: TrainConfig | RewardGradientConfig, base: str | None, push: str | None, form: str) -> str:
    """Return the base model as the card names it. Refuse to push what needs a base that others cannot load."""
    path = config.model.path
    if base is not None and not HUB_ID.fullmatch(base):
        raise DiffalignError(f"--base {base}: the base model's name on the hub is owner/name")
    if base is None and push is not None and form not in WHOLE and (is_local(path) or not HUB_ID.fullmatch(path)):
        raise DiffalignError(
            f"--push {push}: others cannot load the base model {public_name(path)}, which is not on the hub; give its name "
            "there with --base OWNER/NAME, or use --format merged, which needs no base"
        )
    return base or path


def export(
    run_dir: Path,
    out: Path,
    form: str = "weights",
    *,
    best: bool = False,
    dtype: str = "float32",
    licence: str | None = None,
    base: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Write the weights of `run_dir` in format `form`, with their model card, into `out`: `diffalign export`. Return `out`.

    run_dir: a run, or one of its checkpoints (`RUN/checkpoints/step-N`), of which the average is taken if it was kept.
    best: export the weights of the best validation, not the last. dtype: number type of a whole model. licence: what the card
    states; None: the base's. base: the base model's name on the hub; None: that of the config. push: a repository "owner/name"
    on the hub to upload to, with the token that huggingface_hub finds (HF_TOKEN or `hf auth login`); private: make it private
    if it is new. Raises DiffalignError where the run has no such weights, and for a format that does not fit them.
    """
    with writing_folder(out, "--out"), tempfile.TemporaryDirectory() as saved:
        _export(run_dir, out, form, best, dtype, licence, base, push, Path(saved))
    if push is not None:
        _push(out, push, private)
    return out


def _export(
    run_dir: Path,
    out: Path,
    form: str,
    best: bool,
    dtype: str,
    licence: str | None,
    base: str | None,
    push: str | None,
    saved: Path,
) -> None:
    """Do what `export` does, but for pushing. saved: an empty folder for the weights of a checkpoint."""
    # Refuse wrong arguments before anything is written.
    if form not in FORMATS:
        raise DiffalignError(f"--format {form}: unknown; one of {', '.join(FORMATS)}")
    if push is not None and not HUB_ID.fullmatch(push):
        raise DiffalignError(f"--push {push}: a repository is named owner/name")
    if dtype not in DTYPES or (dtype != "float32" and form not in WHOLE):
        raise DiffalignError(
            f"--dtype {dtype}: one of {', '.join(DTYPES)}, and only with --format {' or '.join(WHOLE)}; LoRAs stay float32"
        )
    checkpoint = run_dir if is_checkpoint(run_dir) else None
    if checkpoint is not None:
        run_dir = checkpoint.absolute().parent.parent
        if best:
            raise DiffalignError(f"--best: {checkpoint} is a checkpoint; give the run's directory, or leave --best out")
    config = _config(run_dir)
    weights = checkpoint or _weights(run_dir, best)
    if holds_files(out) and not (out / "README.md").is_file():
        raise DiffalignError(f"--out {out}: not empty, and not an earlier export; choose another folder")
    name = _base_name(config, base, push, form)
    full = config.tune.kind == "full"
    if full and form in ("kohya", "peft"):
        raise DiffalignError(
            f"--format {form} is for a LoRA, and this run trained all weights; use diffusers or merged"
        )
    if checkpoint is not None and form not in WHOLE:
        backbone = open_plain_backbone(config.model)
        backbone.load_weights(checkpoint)
        backbone.save_weights(saved)
        weights = saved
    # Write the weights, then the card.
    make_folder(out)
    family = _write(form, config, weights, out, dtype)
    files = {} if full else {file: READERS[file] for file in lora_files(form, family)}
    if form == "single-file" and family.single_file is not None:
        files = {SINGLE_FILE: family.single_file.readers}
    write_card(
        read_run(run_dir),
        out,
        base=name,
        adapter=not full and form not in WHOLE,
        usage=_usage(form, name, push, family, full),
        files=files,
        generators=_generators(config),
        licence=licence,
    )
    say(f"exported: {out}")


def _push(out: Path, name: str, private: bool) -> None:
    """Upload a folder to the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(out), commit_message="Weights and card from diffalign")
    except LocalTokenNotFoundError as error:
        raise DiffalignError(
            f"--push {name}: not logged in ({brief(error)}); log in with `hf auth login`. The export itself is in {out}"
        ) from error
    # ValueError: huggingface_hub checks the card before the upload.
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DiffalignError(
            f"--push {name}: the hub refused ({brief(error)}); check name, card and login (`hf auth login`). The export itself "
            f"is in {out}"
        ) from error
    say(f"pushed: https://huggingface.co/{name}")
