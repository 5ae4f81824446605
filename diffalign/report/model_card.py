"""Write the model card: README.md as the hub reads it, with licence, training, evaluation, health and samples."""

import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from diffalign.errors import DiffalignError
from diffalign.files import write_whole
from diffalign.files.parse import parse_yaml
from diffalign.files.published import is_local, public_name
from diffalign.intervals import interval_in
from diffalign.report.images import candidates, comparisons
from diffalign.report.runs import Run
from diffalign.version import __version__

SAMPLES = 4
# (license, license_name or None) of the models that recipes name, as the hub writes them. Those of other models are read
# from the base's README.md if it is on disk, or given by the user.
LICENCES: dict[str, tuple[str, str | None]] = {
    "shapes-sd3": ("apache-2.0", None),
    "shapes-sdxl": ("apache-2.0", None),
    "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", None),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("other", "stabilityai-ai-community"),
    "stabilityai/stable-diffusion-3.5-medium": ("other", "stabilityai-ai-community"),
    "stabilityai/stable-diffusion-3.5-large": ("other", "stabilityai-ai-community"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", None),
    "black-forest-labs/FLUX.2-klein-base-4B": ("apache-2.0", None),
    "black-forest-labs/FLUX.2-klein-4B": ("apache-2.0", None),
    "stabilityai/stable-cascade": ("other", "stable-cascade-nc-community"),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": ("openrail++", None),
    "Tongyi-MAI/Z-Image": ("apache-2.0", None),
    "Tongyi-MAI/Z-Image-Turbo": ("apache-2.0", None),
    "Qwen/Qwen-Image": ("apache-2.0", None),
    "Qwen/Qwen-Image-2512": ("apache-2.0", None),
    "Qwen/Qwen-Image-2.1": ("other", "qwen-research"),
}
UNKNOWN = "unknown"


def front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML between the first two lines of three dashes of a README.md; {} if there is none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        values = parse_yaml(found.group(1), str(path)) if found else None
    except DiffalignError:
        values = None
    return values if isinstance(values, dict) else {}


def licence_of(base: str) -> tuple[str, str | None]:
    """Return (license, license_name) of a model, as the hub names them; ("unknown", None) if nothing states it."""
    if base in LICENCES:
        return LICENCES[base]
    said = front_matter(Path(base) / "README.md")
    name = said.get("license_name")
    return str(said.get("license", UNKNOWN)), str(name) if name else None


def licence_name(base: str) -> str | None:
    """Return a model's licence in one word, such as `openrail++`; None where nobody says."""
    licence, name = licence_of(base)
    return None if licence == UNKNOWN else name or licence


def plain(text: object) -> str:
    """Return text from data as Markdown that shows it and has no other effect."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", " ".join(escaped.split()))


def samples(run: Run, out: Path) -> list[dict[str, Any]]:
    """Copy the images with the largest gains and losses into `out`/samples; an honest card shows both."""
    found = candidates(run, "tuned")
    if run.result is None or not found:
        return []
    rows: list[dict[str, Any]] = []
    for row in comparisons([(found[0], run)], SAMPLES // 2, pictures=False):
        files = {}
        for model, folder in (("base", Path(run.result["images"]["base"])), ("tuned", found[0].folder)):
            name = f"samples/{len(rows)}-{model}.png"
            if (folder / row["file"]).is_file():
                (out / "samples").mkdir(exist_ok=True)
                shutil.copyfile(folder / row["file"], out / name)
                files[model] = name
        if len(files) == 2:
            rows.append({**row, "files": files})
    return rows


def write_card(
    run: Run,
    out: Path,
    *,
    base: str,
    adapter: bool,
    usage: str,
    files: dict[str, str],
    generators: dict[str, str],
    licence: str | None = None,
) -> Path:
    """Write `out`/README.md and return its path. No path of this machine is in it.

    base: the base model, as a hub id, a folder or a model of the embedded world; only a hub id is named as `base_model`.
    adapter: whether the weights need the base. usage: a Python snippet. files: file -> who reads it. generators: who made the
    training images -> their licence. licence: replaces the base's.
    """
    name, title = (licence, None) if licence else licence_of(base)
    shown, on_hub = public_name(base), "/" in base and not is_local(base)
    lora = adapter and run.config.get("tune.kind") == "lora"
    head: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter" if lora else "finetune"} if on_hub else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": name,
        **({"license_name": title} if title else {}),
        "tags": ["text-to-image", "diffusers", "diffalign", "preference-optimization", *(["lora"] if lora else [])],
    }
    environment = Environment(
        loader=PackageLoader("diffalign.report"), autoescape=False, undefined=StrictUndefined, trim_blocks=True
    )  # Markdown, not HTML: what comes from data goes through `plain`
    environment.filters["plain"] = plain
    environment.filters["interval"] = interval_in
    text = environment.get_template("model_card.md.j2").render(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        name=run.name,
        base=shown,
        version=__version__,
        run=run,
        facts=[(label, public_name(value)) for label, value in run.facts({"model.path": base})],
        licence=f"{name} ({title})" if title else name,
        inherited=licence is None,
        usage=usage,
        files=files,
        generators=generators,
        samples=samples(run, out),
    )
    path = out / "README.md"
    write_whole(path, text)
    return path
