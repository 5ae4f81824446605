"""What `import diffalign` offers: the command line's stages as functions, on the same code.

Each function imports what it needs when it is called. A mistake of the caller is a DiffalignError with one line, and so is a
missing package of an extra.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from diffalign.packages import extras_named

if TYPE_CHECKING:
    from diffalign.config import EvalConfig, SampleConfig, TrainConfig
    from diffalign.rewards import Reward
    from diffalign.scoring.in_memory import Picture
    from diffalign.scoring.score_table import ScoreTable
    from diffalign.scoring.spec import RewardSpec

    OneReward: TypeAlias = str | Mapping[str, Any] | RewardSpec | Reward
    """A reward: a text as after `diffalign score -r`, a section as in a config, or a reward that is built."""


def score(
    images: Picture | Iterable[Picture],
    prompts: str | Sequence[str | None] | None = None,
    *,
    rewards: OneReward | Sequence[OneReward],
    metadata: Sequence[Mapping[str, object]] | None = None,
    output: str | Path | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "auto",
    progress: bool = False,
) -> ScoreTable:
    """Score images with one or more rewards, as `diffalign score` does.

    Args:
        images: One or several of: a path (file, folder, quoted glob, archive, parquet file, dataset folder), an image of
            Pillow, a numpy array [H, W, C], [C, H, W] or [H, W], a torch tensor of these shapes, a batch of either with a
            dimension in front. Pixels are uint8, or float in [0, 1], which is rounded to 8 bits.
        prompts: One text for all images, or one for each. None: what stands beside or in the files.
        rewards: `"pickscore"`, `"hpsv2:release=2.0"`, `"mine=my_module:Class"`, a section such as
            `{"name": "hpsv2", "label": "mine", "weights": PATH}`, a built reward, or several of these. A built reward that
            is given alone stays loaded for the next call; of several, one is in memory at a time.
        metadata: What a reward reads besides the prompt, one mapping an image, such as GenEval's `include`.
        output: A .jsonl, .csv or .parquet file to write, also at an address such as s3://. What it holds already is not
            scored again.
        batch_size: Images in one batch. workers: threads that read and decode; None: at most 8.
        device: auto, cpu or cuda; a reward may name its own. progress: whether to print it on stderr.

    Returns:
        A `ScoreTable`: columns by name, one entry an image, in the order of the images. An image that cannot be read or
        scored has NaN, and its reason in `LABEL.reason` or `reason`.

    Raises:
        DiffalignError: for a reward, option or source that does not exist, pixels of another shape or type, a number of
            prompts that is not that of the images, weights that cannot be had, or a missing package.
    """
    with extras_named(), warnings.catch_warnings():
        from PIL import Image

        from diffalign.scoring.in_memory import items_of
        from diffalign.scoring.score_table import ScoreTable
        from diffalign.scoring.spec import RewardSpec, rewards_named
        from diffalign.stages.resolve_rewards import build_rewards, process_device
        from diffalign.stages.score import refuse_without_prompts, score_for_python

        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # images.py has its own limit
        on = process_device(device)
        _check_counts(batch_size=batch_size, workers=1 if workers is None else workers)
        named = rewards_named(rewards)
        specs = [one for one in named.values() if isinstance(one, RewardSpec)]
        built = build_rewards(specs, on, served=False)
        items = items_of(images, prompts, metadata)
        built |= build_rewards(specs, on, served=True)  # last: a server may not answer for minutes
        judges = {label: built[label] if isinstance(one, RewardSpec) else one for label, one in named.items()}
        refuse_without_prompts(items, judges, "give prompts=")
        alone = len(judges) == 1 and not specs
        scores = score_for_python(
            items, judges, output, batch_size=batch_size, workers=workers, keep=alone, progress=progress
        )
        return ScoreTable(scores)


def load_reward(reward: str | Mapping[str, Any] | RewardSpec, *, device: str = "auto", **options: object) -> Reward:
    """Build a reward, as `score` takes its name: `load_reward("hpsv2", release="2.0").score(images, prompts)`.

    options: of the reward, such as weights or dtype. Its weights load with the first image. Raises DiffalignError for a name
    or an option that does not exist.
    """
    with extras_named():
        from diffalign.scoring.spec import spec_of
        from diffalign.stages.resolve_rewards import build_reward, process_device

        spec = spec_of(reward)
        return build_reward(spec.name, {**spec.options, **options}, process_device(device))


def train(config: str | Path | TrainConfig, *, dry_run: bool = False, **keys: object) -> Path:
    """Train a model on preference data, as `diffalign train` does, and return the run directory.

    config: a YAML file, the name of a recipe such as `sdxl_dpo`, or a config. keys: of the config, sections as mappings:
    `train("sdxl_dpo", data="data/mine", run_dir="runs/a", train={"steps": 500})`. The same call resumes. dry_run: print
    what the run would do. Raises DiffalignError for a mistake in the config or the data.
    """
    with extras_named():
        from diffalign.stages.train import train as run

        checked: TrainConfig = _config("train", config, keys)
        run(checked, dry_run=dry_run)
        return Path(checked.run_dir)


def sample(config: str | Path | SampleConfig, *, images: str | Path | None = None, **keys: object) -> Path:
    """Draw images for prompts into a dataset folder, as `diffalign sample` does, and return the folder.

    config, keys: as of `train`. images: a folder into which every image is also written as a file. The same call resumes.
    Raises DiffalignError for a mistake in the config, and for prompts or weights that are not there.
    """
    with extras_named():
        from diffalign.stages.sample import sample as draw

        checked: SampleConfig = _config("sample", config, keys)
        draw(checked, None if images is None else Path(images))
        return Path(checked.out)


def evaluate(config: str | Path | EvalConfig, **keys: object) -> dict[str, Any]:
    """Compare trained weights with the base model, as `diffalign eval` does; return what it writes into eval.json.

    config: a run directory (then name `prompts`), a YAML file, or a config: `evaluate("runs/a", prompts="test.txt",
    reward="pickscore")`. keys: as of `train`. Values are typed Any, as they are JSON. Raises DiffalignError for weights that
    are missing, a reward that cannot score a prompt, and prompts that chose the weights.
    """
    with extras_named():
        from diffalign.stages.evaluate import evaluate as compare

        checked: EvalConfig = _config("eval", config, keys)
        return compare(checked)


def _check_counts(**counts: object) -> None:
    """Raise DiffalignError for a number that is no count."""
    from diffalign.errors import DiffalignError

    for name, number in counts.items():
        if not isinstance(number, int) or number < 1:
            raise DiffalignError(f"{name}: {number!r}; give a whole number of at least 1")


def _config(kind: str, given: object, keys: Mapping[str, object]) -> Any:
    """Return the checked config of a verb; typed Any since its class follows from `kind`."""
    from diffalign import config
    from diffalign.errors import DiffalignError

    overrides = list(_overrides(keys))
    if isinstance(given, (str, Path)):
        return config.load_for(kind, str(given), overrides)
    if not isinstance(given, config.KINDS[kind]):
        raise DiffalignError(
            f"{type(given).__name__} is no config of `diffalign {kind}`; give a file, a recipe or a config"
        )
    if overrides:
        raise DiffalignError(
            f"{overrides[0]}: a config is given; change it with model_copy, or name a file or a recipe"
        )
    return given


def _overrides(keys: Mapping[str, object], above: str = "") -> Iterator[str]:
    """Yield keys as the command line takes them: `train={"steps": 5}` is train.steps=5."""
    for key, value in keys.items():
        if isinstance(value, Mapping) and value:
            yield from _overrides(value, f"{above}{key}.")
        else:
            yield f"{above}{key}={json.dumps(value, default=str)}"
