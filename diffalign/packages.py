"""Name the extra that installs a missing package: one table, and the one line that a user sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from diffalign.errors import NotInstalled

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("diffusers", "accelerate", "peft", "datasets", "tensorboard", "scipy"),
    "score": ("pillow_heif", "pillow_jxl"),
    "metrics": ("torchmetrics", "torch_fidelity"),
    "ocr": ("rapidocr", "onnxruntime"),
    "serve": ("starlette", "uvicorn", "python_multipart", "httpx"),
    "8bit": ("bitsandbytes",),
    "xformers": ("xformers",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "ray": ("ray",),
}
"""The modules that each extra of pyproject.toml installs, as Python imports them. A test compares the two."""


def install_command(module: str) -> str | None:
    """Return the pip command that installs a module, `diffusers.utils` too; None if no extra holds it."""
    package = module.partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if package in modules), None)
    return extra and f"pip install 'diffalign[{extra}]'"


def not_installed(module: str, what: str = "", instead: str = "") -> NotInstalled:
    """Return the error for a missing module of an extra.

    what: who needs it, as in `reward ocr`. instead: what else the user can do, as in `use int8`.
    """
    advice = f"{install_command(module)}, or {instead}" if instead else install_command(module)
    said = f"{module.partition('.')[0]} is not installed; {advice}"
    return NotInstalled(f"{what}: {said}" if what else said)


def require(module: str, what: str, instead: str = "") -> None:
    """Raise DiffalignError if a module of an extra is absent. Nothing is imported; arguments as of `not_installed`."""
    if find_spec(module) is None:
        raise not_installed(module, what, instead)


@contextmanager
def extras_named(what: str = "") -> Iterator[None]:
    """Turn the failed import of an extra's module into the line of `not_installed`; other imports fail as they do."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and install_command(error.name):
            raise not_installed(error.name, what) from error
        raise
