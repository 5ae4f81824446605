"""diffalign: preference alignment for text-to-image diffusion and rectified-flow models."""

from pathlib import Path

__version__ = "0.1.0"


def _extend_path_to_checkout() -> None:
    """Find `diffalign.rewards` and its siblings at the top of the repository, in a checkout.

    The wheel maps them into the package (`[tool.setuptools.package-dir]`). A checkout keeps them one folder up, so that
    folder joins this package's search path, but only if its `pyproject.toml` is ours: an unrelated `rewards/` folder
    that happens to lie beside an installed diffalign must never shadow it.
    """
    root = Path(__file__).resolve().parent.parent
    project = root / "pyproject.toml"
    if not (Path(__file__).parent / "rewards").exists() and project.is_file():
        if 'name = "diffalign"' in project.read_text(encoding="utf-8"):
            __path__.append(str(root))


_extend_path_to_checkout()
