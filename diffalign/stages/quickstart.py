"""`diffalign testbed quickstart`: one round on the embedded world: sample, score, rank, train, evaluate, report."""

from pathlib import Path
from typing import Any

from diffalign.config import EvalConfig, RewardSection, SampleConfig, load_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.rank import rank
from diffalign.data.sample import clean_up
from diffalign.data.score import score_images
from diffalign.files.lock import writing_folder
from diffalign.progress import say
from diffalign.stages.evaluate import evaluate
from diffalign.stages.resolve_rewards import open_reward
from diffalign.stages.sample import sample
from diffalign.stages.train import train

RECIPES = {"shapes-sd3": "shapes_sd3_dpo", "shapes-sdxl": "shapes_sdxl_dpo"}
# How the models are sampled, for training data and for evaluation alike.
SAMPLING: dict[str, Any] = {"steps": 10, "batch_size": 64, "device": "cpu"}
GUIDANCE = {"shapes-sd3": 6.0, "shapes-sdxl": 4.0}
GROUPS, IMAGES_PER_GROUP, TEST_PROMPTS, TEST_SEEDS = 256, 8, 256, 4
REWARD: dict[str, Any] = {"name": "geneval", "detector": "shapes"}


def sampling(base: str) -> dict[str, Any]:
    """Return the keys of a config for drawing images of a base model."""
    return {**SAMPLING, "guidance_scale": GUIDANCE[base]}


def make_data(base: str, folder: Path, seed: int, groups: int = GROUPS) -> PreferenceDataset:
    """Sample groups from `base` on training prompts and score them; complete parts are kept."""
    wanted = SampleConfig(
        model=load_config(RECIPES[base]).model,
        prompts="testbed:train",
        n=groups,
        out=folder,
        seed=seed,
        images_per_prompt=IMAGES_PER_GROUP,
        **sampling(base),
    )
    sample(wanted)
    dataset = PreferenceDataset(folder)
    scored = score_images(dataset, open_reward(RewardSection(**REWARD), SAMPLING["device"]))
    clean_up(folder)
    say(f"scored {scored} images with the GenEval reward" if scored else "the images are scored already")
    return dataset


def quickstart(
    base: str = "shapes-sd3",
    out: Path = Path("runs/quickstart"),
    seed: int = 0,
    steps: int | None = None,
    shuffle: bool = False,
    groups: int = GROUPS,
    prompts: str = "testbed:test",
    data: Path | None = None,
    base_images: Path | None = None,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Run one round from prompts to a report: `diffalign testbed quickstart`. Return what eval.json holds.

    steps: training steps, None for those of the recipe. shuffle: permute the labels within each group, as a control.
    groups: prompts with images to train on. prompts: what to evaluate on. data, base_images: folders in which several
    rounds share the training images and the base's evaluation images. overrides: of the training config.
    """
    with writing_folder(out, "--out"):
        return _quickstart(base, out, seed, steps, shuffle, groups, prompts, data, base_images, overrides)


def _quickstart(
    base: str,
    out: Path,
    seed: int,
    steps: int | None,
    shuffle: bool,
    groups: int,
    prompts: str,
    data: Path | None,
    base_images: Path | None,
    overrides: tuple[str, ...],
) -> dict[str, Any]:
    # Draw and score the training data, and rank it.
    data = data or out / "data"
    dataset = make_data(base, data, seed, groups)
    rank(dataset, ["geneval"], shuffle_seed=seed if shuffle else None)
    facts = PreferenceDataset(data).facts("train")
    say(f"ranked {facts['groups']} groups; {facts['without_preference']} state no preference")
    # Train with the shipped recipe.
    run_dir = out / "run"
    given = [f"run_dir={run_dir}", f"data.path={data}", f"seed={seed}", *overrides]
    config = load_config(RECIPES[base], [*given, *([f"train.steps={steps}"] if steps else [])])
    train(config)
    # Compare with the base, and report.
    evaluation = EvalConfig(
        model=config.model,
        weights=run_dir / "weights",
        prompts=prompts,
        n=TEST_PROMPTS if prompts == "testbed:test" else None,
        seeds=TEST_SEEDS,
        reward=RewardSection(**REWARD),
        out=run_dir,
        **sampling(base),
    )
    return evaluate(evaluation, base_folder=base_images)
