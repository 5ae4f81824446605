"""`diffalign rounds`: sample, score, rank, train and evaluate in rounds, a loop over stages that each resume by themselves.

    <out>/base/                  the base model's evaluation images, drawn once
    <out>/round-01/data          what the round is trained on: a dataset
    <out>/round-01/run           its run directory, with evaluation and report
    <out>/round-01/next          with momentum: the weights that the next round starts from
    <out>/round-01/round.json    written last: the round is complete
    <out>/rounds.json, report.html    over all rounds

All weights are LoRAs relative to the published base, whatever the reference of a round was.
"""

import json
from pathlib import Path
from typing import Any

from diffalign.config import EvalConfig, RoundsConfig, SampleConfig, TrainConfig, load_config
from diffalign.config.model import current_keys
from diffalign.data.cut_prompts import cut_lines
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.real_against_generated import write_real_against_generated
from diffalign.data.sample import clean_up
from diffalign.data.score import score_images
from diffalign.data.shared_tasks import local_rank_and_world_size
from diffalign.errors import DiffalignError
from diffalign.files import dotted_keys, read_json, reading, write_whole
from diffalign.files.lock import writing_folder
from diffalign.intervals import interval_in
from diffalign.pipelines.momentum import extrapolate_lora
from diffalign.progress import say
from diffalign.report.render import write_reports
from diffalign.stages.checks import check_packages, check_weights
from diffalign.stages.dry_run import TIME_UNKNOWN, print_config, print_facts, print_where
from diffalign.stages.evaluate import evaluate
from diffalign.stages.rank import rank_dataset
from diffalign.stages.real_images import prompts_file, real_images
from diffalign.stages.resolve import resolve_prompts, settled
from diffalign.stages.resolve_rewards import open_reward, open_rewards, resolve_device, settled_rewards
from diffalign.stages.sample import sample
from diffalign.stages.train import train

MEND = "delete it, and the same command writes it again"
ROUND_KEYS = ("round", "column", "weights", "base", "tuned", "low", "high")


def round_folder(out: Path, number: int) -> Path:
    """Return the folder of round `number`, from 1."""
    return out / f"round-{number:02d}"


def train_config(config: RoundsConfig, number: int, init: Path | None) -> TrainConfig:
    """Return the training config of round `number` (from 1), which starts from the LoRA in `init` (None: from the base)."""
    folder, seed = round_folder(config.out, number), config.seed + number - 1
    given: dict[str, Any] = {"run_dir": folder / "run", "data.path": folder / "data", "seed": seed}

    def loaded() -> TrainConfig:
        written = (
            f"{key}={json.dumps(value if isinstance(value, int) else str(value))}" for key, value in given.items()
        )
        return load_config(config.train, [*config.overrides, *written])

    found = loaded()
    if init is not None:
        given["tune.init"] = init
        if found.tune.reference != "ema":  # an average begins anew with what the round begins with
            given["tune.reference"] = "base" if config.reference == "base" else "init"
        found = loaded()
    if found.tune.kind != "lora":
        raise DiffalignError(
            f"train: {config.train} has tune.kind=full; rounds carry a LoRA from one to the next, so set tune.kind=lora in "
            "overrides"
        )
    return found


def stops(scores: list[float], patience: int | None) -> bool:
    """Return whether none of the last `patience` held-out rewards is above the best before them; the first is the base's."""
    if patience is None or len(scores) <= patience:
        return False
    return max(scores[-patience:]) <= max(scores[:-patience])


def rounds(config: RoundsConfig, dry_run: bool = False) -> dict[str, Any]:
    """Run rounds of training: `diffalign rounds`. Return what rounds.json holds; {} after a dry run.

    Raises DiffalignError where several processes were launched, for a reward that cannot score a prompt, and for a folder
    that holds rounds of another config.
    """
    if local_rank_and_world_size()[1] > 1:
        raise DiffalignError(
            "rounds run in one process, since their evaluation does; launch `diffalign rounds` without torchrun or accelerate"
        )
    with writing_folder(None if dry_run else config.out, "out"):
        return _rounds(config, dry_run)


def _rounds(config: RoundsConfig, dry_run: bool) -> dict[str, Any]:
    training = train_config(config, 1, None)
    config = _settled(config, training)
    # Check the whole config before the first round; later only that it is the same.
    begun = _remembered(config).is_file() and any(config.out.glob("round-*/*"))
    if begun:
        _same_config(config)
    if dry_run:
        print_config(config)
    judges = {} if begun and not dry_run else _check_round(config, training, dry_run)
    if dry_run:
        _describe(config, training, judges)
        return {}
    write_whole(_remembered(config), json.dumps(_decisive(config), indent=1) + "\n")
    # Each round starts from the weights of the round before.
    done: list[dict[str, Any]] = []
    init: Path | None = None
    for number in range(1, config.rounds + 1):
        folder = round_folder(config.out, number)
        if (folder / "round.json").is_file():
            done.append(read_json(folder / "round.json", MEND, *ROUND_KEYS))
        else:
            say(f"round {number} of {config.rounds}")
            done.append(_round(config, number, init))
            write_whole(folder / "round.json", json.dumps(done[-1], indent=1) + "\n")
        scores = [done[0]["base"], *(one["tuned"] for one in done)]
        if stops(scores, config.patience):
            say(f"no better held-out reward in {config.patience} rounds in a row: stopped after round {number}")
            break
        init = _next_start(config, number)
    return _summary(config, done)


def _round(config: RoundsConfig, number: int, init: Path | None) -> dict[str, Any]:
    """Run one round and return what its round.json holds."""
    training = settled(train_config(config, number, init))
    data = round_folder(config.out, number) / "data"
    _make_data(config, number, init, training, data)
    train(training)
    evaluation = _evaluate(config, training)
    column, comparison = next(iter(evaluation["scores"].items()))
    overall = comparison["all"]
    return {"round": number, "column": column, "weights": str(training.run_dir / "weights"), **overall}


def _make_data(config: RoundsConfig, number: int, init: Path | None, training: TrainConfig, data: Path) -> None:
    """Make the round's training data: images of the model that it starts from, with labels. Complete parts are kept."""
    given, seed = config.data, config.seed + number - 1
    if given.real is not None:
        # Self-play: each prompt has a real image, and being real is the label.
        real = real_images(given.real, given.prompts, given.n, seed)
        prompts, drawn = (
            prompts_file([row for row, _ in real], data.with_name("prompts.jsonl")),
            data.with_name("drawn"),
        )
        _draw(config, training, init, str(prompts), None, drawn, seed)
        write_real_against_generated(real, PreferenceDataset(drawn), data)
        return
    _draw(config, training, init, given.prompts, given.n, data, seed)
    for section in given.rewards:
        dataset, reward = PreferenceDataset(data), open_reward(section, resolve_device(training.device))
        say(f"{section.name}: {score_images(dataset, reward)} images scored")
        for line in cut_lines({section.name: reward}, dataset.column("prompt")):
            say(line)
        del reward  # before the next one loads
    rank_dataset(PreferenceDataset(data), given.rank, [section.label for section in given.rewards])
    clean_up(data)


def _draw(
    config: RoundsConfig, training: TrainConfig, init: Path | None, prompts: str, n: int | None, out: Path, seed: int
) -> None:
    """Draw groups of images of the model that the round starts from."""
    images, scale = config.images, config.data.guidance_scale
    if scale is not None:
        images = images.model_copy(update={"guidance_scale": scale})
    wanted = SampleConfig(
        model=training.model,
        device=training.device,
        weights=init,
        prompts=prompts,
        n=n,
        out=out,
        seed=seed,
        images_per_prompt=config.data.images_per_prompt,
        **images.model_dump(),
    )
    sample(wanted)


def _evaluate(config: RoundsConfig, training: TrainConfig) -> dict[str, Any]:
    """Compare the round's weights with the base; all rounds share the base's images."""
    wanted = EvalConfig(
        model=training.model,
        device=training.device,
        weights=training.run_dir / "weights",
        out=training.run_dir,
        seed=config.seed,
        **config.images.model_dump(),
        **config.evaluate.model_dump(),
    )
    return evaluate(wanted, base_folder=config.out / "base")


def _next_start(config: RoundsConfig, number: int) -> Path:
    """Return the weights that the round after `number` starts from and draws its images from."""
    now = round_folder(config.out, number) / "run" / "weights"
    if config.momentum == 0:
        return now
    before = round_folder(config.out, number - 1) / "run" / "weights" if number > 1 else None
    out = round_folder(config.out, number) / "next"
    if not any(out.glob("*.safetensors")):
        extrapolate_lora(now, before, config.momentum, out)
    return out


def _settled(config: RoundsConfig, training: TrainConfig) -> RoundsConfig:
    """Return the config with its rewards settled, as `settled_rewards` says."""
    given, judged, path = config.data, config.evaluate, training.model.path
    drawn = settled_rewards(given.rewards, path, given.prompts, "data.rewards")
    held_out = settled_rewards((judged.reward, *judged.more_rewards), path, judged.prompts, "evaluate.reward")
    return config.model_copy(
        update={
            "data": given.model_copy(update={"rewards": drawn}),
            "evaluate": judged.model_copy(update={"reward": held_out[0], "more_rewards": held_out[1:]}),
        }
    )


def _check_round(config: RoundsConfig, training: TrainConfig, dry_run: bool) -> dict[str, str]:
    """Check what a round needs before the first one is drawn; return what `check_weights` says of the rewards.

    Refuses a reward that cannot be built or cannot score a prompt, groups that are too small for training, and labels that
    no reward of the round makes.
    """
    check_packages(training)
    given, judged = config.data, config.evaluate
    device = resolve_device(training.device)
    held_out = resolve_prompts(judged.prompts, judged.n)
    rewards = open_rewards([judged.reward, *judged.more_rewards], held_out, device, "evaluate.reward", judged.prompts)
    if given.real is None:
        prompts = resolve_prompts(given.prompts, given.n, config.seed)
        rewards |= open_rewards(given.rewards, prompts, device, "data.rewards", given.prompts)
        if not given.rewards:
            raise DiffalignError("data.rewards: empty, so nothing makes labels; name a reward, or set data.real")
        _check_groups(config, training)
    return check_weights(rewards, dry_run)


def _check_groups(config: RoundsConfig, training: TrainConfig) -> None:
    """Refuse groups that training cannot use."""
    images, size = config.data.images_per_prompt, training.data.group_size
    if images < 2:
        raise DiffalignError("data.images_per_prompt=1: a preference needs at least two images of a prompt")
    if size is not None and size > images:
        raise DiffalignError(
            f"data.images_per_prompt={images}: training takes data.group_size={size} images of each prompt; draw as many, or "
            f"add data.group_size={images} to overrides"
        )
    kind, _, name = training.labels.source.partition(".")
    labels = [section.label for section in config.data.rewards]
    if kind == "scores" and name.partition(".")[0] not in labels:
        raise DiffalignError(
            f"labels.source={training.labels.source} of {config.train}: the rounds score with {', '.join(labels)}; add that "
            "reward to data.rewards, or labels.source=preference to overrides"
        )


def _describe(config: RoundsConfig, training: TrainConfig, judges: dict[str, str]) -> None:
    """Print what the rounds would do, from the files alone: nothing is written or downloaded."""
    given, judged = config.data, config.evaluate
    drawn = len(resolve_prompts(given.prompts, given.n, config.seed))
    held_out = len(resolve_prompts(judged.prompts, judged.n))
    print_facts("run", {
        "device": resolve_device(training.device),
        "rounds": f"at most {config.rounds}",
        "images of a round": drawn * given.images_per_prompt + held_out * judged.seeds,
        "training of a round": f"{training.train.steps} steps x {training.train.groups_per_step} groups, by {config.train}",
        "time": TIME_UNKNOWN,
    })  # fmt: skip
    print_facts("rewards", judges)
    print_where(training.model, {})


def _remembered(config: RoundsConfig) -> Path:
    """Return the file that keeps the settings under which the rounds were begun."""
    return config.out / "config.json"


def _decisive(config: RoundsConfig) -> dict[str, Any]:
    """Return the settings that rounds must keep: all but how many there are and when they stop."""
    return config.model_dump(mode="json", exclude={"rounds", "patience", "out"})


def _same_config(config: RoundsConfig) -> None:
    """Refuse to continue rounds under other settings."""
    stored, now = read_json(_remembered(config), MEND), dotted_keys(_decisive(config))
    with reading(_remembered(config), mend=MEND):
        stored = dotted_keys(current_keys(dict(stored)))
    before = dotted_keys(config.former_values()) | stored
    changed = [key for key in sorted(now.keys() | stored.keys()) if now.get(key) != before.get(key)]
    if changed:
        raise DiffalignError(
            f"{config.out} holds rounds of another config: {changed[0]} was {before.get(changed[0])!r}, is now "
            f"{now.get(changed[0])!r}; choose another out, or restore the old value to continue"
        )


def _summary(config: RoundsConfig, done: list[dict[str, Any]]) -> dict[str, Any]:
    """Write rounds.json and the report over all rounds, print the outcome, and return what rounds.json holds."""
    best = max(done, key=lambda one: one["tuned"])
    found = {"column": done[0]["column"], "best": best["round"], "rounds": done}
    write_whole(config.out / "rounds.json", json.dumps(found, indent=1) + "\n")
    runs = [round_folder(config.out, one["round"]) / "run" for one in done]
    report = write_reports(runs, config.out / "report.html")
    say(f"{found['column']} of the base: {done[0]['base']:.4f}")
    for one in done:
        change = f"{one['difference']:+.3f} against the base, 95%: {interval_in(one).words()}"
        say(f"round {one['round']}: {one['tuned']:.4f} ({change})")
    say(f"best: {best['weights']}\nreport: {report}")
    return found
