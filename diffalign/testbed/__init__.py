"""The embedded world: coloured shapes, a detector that reads them back, and two small base models trained on them.

It is a test bench. It shows that sampling, scoring, ranking, training and evaluation work together on real diffusers
pipelines, on a CPU, offline. It shows nothing about SDXL.
"""

from pathlib import Path

from diffalign.errors import DiffalignError

MODELS: tuple[str, ...] = ("shapes-sd3", "shapes-sdxl")


def model_path(name: str) -> Path:
    """Return the folder of a shipped base model, in diffusers' layout. Raises DiffalignError for another name."""
    folder = Path(__file__).parent / "assets" / name
    if name not in MODELS or not folder.is_dir():
        raise DiffalignError(
            f"model {name!r} is not shipped with diffalign; the embedded models are {', '.join(MODELS)}"
        )
    return folder
