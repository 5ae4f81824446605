"""The folder of a run: the resolved config and a short README, written before the first step."""

from pathlib import Path

import yaml

from diffalign.errors import DiffalignError
from diffalign.training.protocols import PlainConfig


def open_run_dir(run_dir: Path, config: PlainConfig, readme: str) -> None:
    """Create the folder with `config.yaml` and `README.md`; an existing run keeps its files but these two.

    Raises DiffalignError for a folder that cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiffalignError(f"run_dir {run_dir} cannot be made ({error.strerror}); choose another one") from error
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    (run_dir / "README.md").write_text(readme)
