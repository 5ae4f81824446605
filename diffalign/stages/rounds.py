"""`diffalign rounds`: sample, score, rank, train, evaluate, again. A loop over the stages, each of which resumes by itself.

    <out>/base/                  the base model's evaluation images, drawn once
    <out>/round-01/data          what the round is trained on: a dataset
    <out>/round-01/run           its run directory, with evaluation and report
    <out>/round-01/next          with momentum: the weights that the next round starts from
    <out>/round-01/round.json    written last: the round is done
    <out>/rounds.json, report.html    over all rounds

All weights are LoRAs relative to the published base, whatever the reference of a round was.
"""

import json
from pathlib import Path
from typing import Any

from diffalign.config import EvalConfig, RoundsConfig, SampleConfig, TrainConfig, load_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.real_against_generated import write_real_against_generated
from diffalign.data.sample import clean_up
from diffalign.data.score import score_images
from diffalign.data.shared_tasks import local_rank_and_world_size
from diffalign.errors import DiffalignError
from diffalign.files import write_whole
from diffalign.pipelines.momentum import extrapolate_lora
from diffalign.report.render import write_reports
from diffalign.stages import evaluate as evaluate_stage
from diffalign.stages import resolve
from diffalign.stages import sample as sample_stage
from diffalign.stages import train as train_stage
from diffalign.stages.real_images import prompts_file, real_images
from diffalign.stages.synth import rank_stage


def round_folder(out: Path, number: int) -> Path:
    return out / f"round-{number:02d}"


def train_config(config: RoundsConfig, number: int, init: Path | None) -> TrainConfig:
    """The training config of round `number` (from 1), which starts from the LoRA in `init` (None: from the base)."""
    folder, seed = round_folder(config.out, number), config.seed + number - 1
    given: dict[str, Any] = {"run_dir": folder / "run", "data.path": folder / "data", "seed": seed}
    if init is not None:
        given |= {"tune.init": init, "tune.reference": "base" if config.reference == "base" else "init"}
    written = [f"{key}={json.dumps(value if isinstance(value, int) else str(value))}" for key, value in given.items()]
    found = load_config(config.train, [*config.overrides, *written])
    if found.tune.kind != "lora":
        raise DiffalignError(
            f"train: {config.train} has tune.kind=full; rounds carry a LoRA from one to the next, so set tune.kind=lora in "
            "overrides"
        )
    return found


def stops(scores: list[float], patience: int | None) -> bool:
    """Whether the last `patience` of the held-out rewards (the untrained model's first) are all not above the best before."""
    if patience is None or len(scores) <= patience:
        return False
    return max(scores[-patience:]) <= max(scores[:-patience])


def rounds(config: RoundsConfig) -> dict[str, Any]:
    """`diffalign rounds`: returns what rounds.json holds. Raises DiffalignError where several processes were launched."""
    if local_rank_and_world_size()[1] > 1:
        raise DiffalignError(
            "rounds run in one process, since their evaluation does; launch `diffalign rounds` without torchrun or accelerate"
        )
    begun = _remembered(config).is_file() and any(config.out.glob("round-*/*"))
    if begun:
        _same_config(config)
    else:
        _check_rewards(config, train_config(config, 1, None))
    write_whole(_remembered(config), json.dumps(_decisive(config), indent=1) + "\n")
    done: list[dict[str, Any]] = []
    init: Path | None = None
    for number in range(1, config.rounds + 1):
        folder = round_folder(config.out, number)
        if (folder / "round.json").is_file():
            done.append(json.loads((folder / "round.json").read_text(encoding="utf-8")))
        else:
            resolve.say(f"round {number} of {config.rounds}")
            done.append(_round(config, number, init))
            write_whole(folder / "round.json", json.dumps(done[-1], indent=1) + "\n")
        scores = [done[0]["base"], *(one["tuned"] for one in done)]
        if stops(scores, config.patience):
            resolve.say(f"the held-out reward has not risen in {config.patience} of the rounds: stopped after {number}")
            break
        init = _next_start(config, number)
    return _summary(config, done)


def _round(config: RoundsConfig, number: int, init: Path | None) -> dict[str, Any]:
    training = train_config(config, number, init)
    data = round_folder(config.out, number) / "data"
    _make_data(config, number, init, training, data)
    train_stage.train(training)
    evaluation = _evaluate(config, training)
    column, comparison = next(iter(evaluation["scores"].items()))
    overall = comparison["all"]
    return {"round": number, "column": column, "weights": str(Path(training.run_dir) / "weights"), **overall}


def _make_data(config: RoundsConfig, number: int, init: Path | None, training: TrainConfig, data: Path) -> None:
    """Images of the model that the round starts from, with labels. What is there is kept."""
    given, images = config.data, config.images.model_dump()
    seed = config.seed + number - 1
    drawn, prompts, n = data, given.prompts, given.n
    real = None if given.real is None else real_images(given.real, given.prompts, given.n, seed)
    if real is not None:
        drawn, n = data.with_name("drawn"), None
        prompts = str(prompts_file([row for row, _ in real], data.with_name("prompts.jsonl")))
    if given.guidance_scale is not None:
        images["guidance_scale"] = given.guidance_scale
    plan: dict[str, Any] = {
        "model": training.model.model_dump(),
        "device": training.device,
        "weights": init and str(init),
    }
    plan |= {"prompts": prompts, "n": n, "out": str(drawn), "seed": seed, "images_per_prompt": given.images_per_prompt}
    sample_stage.sample(SampleConfig.model_validate({**plan, **images}))
    if real is not None:
        write_real_against_generated(real, PreferenceDataset(drawn), data)
        return
    dataset = PreferenceDataset(data)
    for section in given.rewards:
        scored = score_images(dataset, resolve.open_reward(section, resolve.resolve_device(training.device)))
        resolve.say(f"{section.name}: {scored} images scored")
    rank_stage(PreferenceDataset(data), given.rank, [section.name for section in given.rewards])
    clean_up(data)


def _evaluate(config: RoundsConfig, training: TrainConfig) -> dict[str, Any]:
    plan: dict[str, Any] = {"model": training.model.model_dump(), "device": training.device, "seed": config.seed}
    plan |= {"weights": str(Path(training.run_dir) / "weights"), "out": str(training.run_dir)}
    checked = EvalConfig.model_validate({**plan, **config.images.model_dump(), **config.evaluate.model_dump()})
    return evaluate_stage.evaluate(checked, base_folder=config.out / "base")


def _next_start(config: RoundsConfig, number: int) -> Path:
    """The weights that the round after `number` starts from, and that its images are drawn from."""
    now = round_folder(config.out, number) / "run" / "weights"
    if config.momentum == 0:
        return now
    before = round_folder(config.out, number - 1) / "run" / "weights" if number > 1 else None
    out = round_folder(config.out, number) / "next"
    if not any(out.glob("*.safetensors")):
        extrapolate_lora(now, before, config.momentum, out)
    return out


def _check_rewards(config: RoundsConfig, training: TrainConfig) -> None:
    """A reward that cannot be opened, or cannot judge a prompt, is named now and not after a round's training."""
    given, judged = config.data, config.evaluate
    device = resolve.resolve_device(training.device)
    held_out = resolve.resolve_prompts(judged.prompts, judged.n)
    resolve.open_rewards([judged.reward, *judged.more_rewards], held_out, device, "evaluate.reward", judged.prompts)
    if given.real is None:
        prompts = resolve.resolve_prompts(given.prompts, given.n, config.seed)
        resolve.open_rewards(given.rewards, prompts, device, "data.rewards", given.prompts)
        if not given.rewards:
            raise DiffalignError("data.rewards: empty, so nothing makes labels; name a reward, or set data.real")


def _remembered(config: RoundsConfig) -> Path:
    return config.out / "config.json"


def _decisive(config: RoundsConfig) -> dict[str, Any]:
    """What rounds that were begun go on under: all but how many there are and when they stop."""
    return config.model_dump(mode="json", exclude={"rounds", "patience", "out"})


def _same_config(config: RoundsConfig) -> None:
    before, now = json.loads(_remembered(config).read_text(encoding="utf-8")), _decisive(config)
    changed = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    if changed:
        raise DiffalignError(
            f"{config.out} holds rounds of another config: {changed[0]} was {before.get(changed[0])!r}, is now "
            f"{now.get(changed[0])!r}; choose another out, or restore the old value to go on"
        )


def _summary(config: RoundsConfig, done: list[dict[str, Any]]) -> dict[str, Any]:
    best = max(done, key=lambda one: one["tuned"])
    found = {"column": done[0]["column"], "best": best["round"], "rounds": done}
    write_whole(config.out / "rounds.json", json.dumps(found, indent=1) + "\n")
    runs = [round_folder(config.out, one["round"]) / "run" for one in done]
    report = write_reports(runs, config.out / "report.html")
    resolve.say(f"{found['column']} of the base: {done[0]['base']:.4f}")
    for one in done:
        resolve.say(
            f"round {one['round']}: {one['tuned']:.4f} ({one['low']:+.3f} to {one['high']:+.3f} against the base)"
        )
    resolve.say(f"best: {best['weights']}\nreport: {report}")
    return found
