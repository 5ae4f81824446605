"""diffalign: preference alignment for text-to-image diffusion and rectified-flow models.

    import diffalign

    table = diffalign.score("samples/", "a red circle", rewards=["pickscore", "hpsv2"])

`score`, `load_reward`, `train`, `evaluate` and `sample` do what the verbs of the command line do. Importing this package
loads nothing heavy; each function imports what it needs when it is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.version import __version__


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

if TYPE_CHECKING:
    from diffalign.api import evaluate, load_reward, sample, score, train
    from diffalign.errors import DiffalignError
    from diffalign.scoring.score_table import ScoreTable
else:

    def __getattr__(name: str) -> object:
        """Return a public name of this package (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "ScoreTable":
            from diffalign.scoring.score_table import ScoreTable

            return ScoreTable
        from diffalign import api, errors

        return {
            "DiffalignError": errors.DiffalignError,
            "evaluate": api.evaluate,
            "load_reward": api.load_reward,
            "sample": api.sample,
            "score": api.score,
            "train": api.train,
        }[name]


__all__ = ["DiffalignError", "ScoreTable", "__version__", "evaluate", "load_reward", "sample", "score", "train"]
