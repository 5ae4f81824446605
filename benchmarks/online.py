"""What do methods gain at equal image-forwards, the drawing of their images included?

python benchmarks/online.py [--bases shapes-sdxl shapes-sd3] [--seeds 0 1 2] [--forwards 60000] [--tiny]
python benchmarks/online.py --methods NFT --out FOLDER

On the embedded world. A cell is a method, a base and a seed, and every cell may spend the same number of image-forwards: passes
of one image through a network, in drawing (two a step where it is guided) and in training (policy, reference, base; a backward
goes with each pass of the policy). What a method does not spend on drawing it trains with. Methods draw once (a dataset), in
three rounds, or during training (train.online); one control of each kind has its scores shuffled within prompts.

The measures were fixed before any training: the dense and the exact GenEval score on held-out prompts and on prompts of kinds
that no training caption has, sharpness as a second reward that nothing is trained on, drift, diversity, and CPU-seconds.
Intervals are bootstrapped over prompts. A finished cell leaves cell.json and is not run again.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from objectives import RESULTS, Cell, Size, finish_cell, prepare_data, summarise

from diffalign.config import load_config, load_rounds_config
from diffalign.stages.quickstart import RECIPES, sampling
from diffalign.stages.rounds import round_folder, rounds
from diffalign.stages.train import train
from shared.objectives_report import write_report

ROUNDS = 3
SECOND = "sharpness"
SHUFFLED = "shared.shuffled_reward:Shuffled"


@dataclass(frozen=True)
class Scale(Size):
    """How large the benchmark is. steps: of the sampler; images: of a prompt; per_step: groups of an update, and of a draw."""

    groups: int = 128
    budget: int = 60_000
    steps: int = 10
    images: int = 8
    per_step: int = 8

    def drawn(self, method: "Method", groups: int) -> int:
        """Return the image-forwards of a draw of so many groups."""
        return groups * self.images * self.steps * (2 if method.guided else 1)

    def update(self, method: "Method") -> int:
        """Return the image-forwards of an update."""
        return self.per_step * method.passes * min(method.used, self.images)


TINY = Scale(groups=4, budget=200, prompts=2, out_of_distribution=6, seeds_per_prompt=2, steps=2, images=4, per_step=2)


@dataclass(frozen=True)
class Method:
    """What is compared.

    draws: once, rounds or online. passes: of an image in an update. used: images of a group that it looks at. guided: whether
    images are drawn with guidance. control: also with shuffled scores. overrides: of the recipe.
    """

    recipe: str
    draws: str
    passes: int
    used: int = 8
    guided: bool = True
    control: bool = False
    overrides: tuple[str, ...] = ()


PLAIN = ("labels.transform=none", "tune.reference=init", "train.online.old={}")
METHODS = {
    "DPO": Method("dpo", "once", 2, 2, control=True),
    "group DPO": Method("group_dpo", "once", 2, 6),
    "GDRO": Method("gdro", "once", 2, 6),
    "DPO in rounds": Method("dpo", "rounds", 2, 2),
    "GDRO in rounds": Method("gdro", "rounds", 2, 6),
    "DPO online": Method(
        "online_nft", "online", 2, 2,
        overrides=(*PLAIN, "objective={name: dpo, beta: 100}", "error_space=native"),
    ),
    "group DPO online": Method("online_dgpo", "online", 2),
    "GDRO online": Method(
        "online_nft", "online", 2,
        overrides=(*PLAIN, "objective={name: gdro, beta: 20, tau: 0.05, gamma: 0.5}", "error_space=native"),
    ),
    "NFT online": Method("online_nft", "online", 3, guided=False, control=True),
    "AWM online": Method("online_awm", "online", 3, guided=False),
    "Flow-GRPO": Method("flow_grpo", "online", 6),
}  # fmt: skip


def recipe(cell: Cell) -> str:
    """Return the recipe of a cell; the epsilon model has the flow's recipes for the loop."""
    method = METHODS[cell.method]
    return (
        f"shapes_sd3_{method.recipe}" if method.draws == "online" else RECIPES[cell.base].replace("dpo", method.recipe)
    )


def once(cell: Cell, out: Path, folder: Path, size: Scale) -> tuple[Path, int]:
    """Train on images that the base drew before; return the run and its updates."""
    method = METHODS[cell.method]
    steps = (size.budget - size.drawn(method, size.groups)) // size.update(method)
    data = prepare_data(cell.base, cell.seed, cell.shuffled, out, size)
    given = [f"run_dir={folder}", f"data.path={data}", f"seed={cell.seed}", f"train.steps={steps}"]
    train(load_config(recipe(cell), [*given, "train.threads=1", "tracking.trackers=[]", *method.overrides]))
    return folder, steps


def in_rounds(cell: Cell, folder: Path, size: Scale) -> tuple[Path, int]:
    """Train in three rounds, each on a third of the images; return the last run and the updates of all."""
    method, groups = METHODS[cell.method], max(2, size.groups // ROUNDS)
    steps = max(1, (size.budget - ROUNDS * size.drawn(method, groups)) // size.update(method) // ROUNDS)
    training = [f"train.steps={steps}", "train.threads=1", "tracking.trackers=[]", *method.overrides]
    given = {
        "out": str(folder / "rounds"), "rounds": ROUNDS, "seed": 10 * cell.seed, "patience": None, "overrides": training,
        "train": recipe(cell), "data.n": groups, "data.images_per_prompt": size.images, "evaluate.n": 2, "evaluate.seeds": 1,
        "images.guidance_scale": sampling(cell.base)["guidance_scale"],
    }  # fmt: skip
    config = load_rounds_config("rounds_shapes_gdro", [f"{key}={json.dumps(value)}" for key, value in given.items()])
    rounds(config)
    return round_folder(config.out, ROUNDS) / "run", ROUNDS * steps


def online(cell: Cell, folder: Path, size: Scale) -> tuple[Path, int]:
    """Train on images that the run draws; return the run and its updates."""
    method = METHODS[cell.method]
    given = [f"run_dir={folder}", f"seed={cell.seed}", "train.threads=1", "tracking.trackers=[]"]
    given += [
        f"model={{path: {cell.base}}}",
        f"train.online.groups={size.per_step}",
        f"train.groups_per_step={size.per_step}",
    ]
    given += [
        f"train.online.images_per_prompt={size.images}",
        f"train.online.steps={size.steps}",
        f"train.online.n={4 * size.groups}",
    ]
    if method.guided:
        given.append(f"train.online.guidance_scale={sampling(cell.base)['guidance_scale']}")
    if cell.shuffled:
        given += [f"train.online.rewards=[{{name: '{SHUFFLED}'}}]", "labels.source=scores.shuffled"]
    planned = load_config(recipe(cell), [*given, *method.overrides])
    assert planned.train.online is not None
    updates = planned.train.online.every
    draw = size.drawn(method, size.per_step) + updates * size.update(method)
    steps = max(1, size.budget // draw) * updates
    train(load_config(recipe(cell), [*given, *method.overrides, f"train.steps={steps}"]))
    return folder, steps


def run_cell(cell: Cell, out: Path, size: Scale) -> None:
    """Run a cell that is not done."""
    folder = cell.folder(out)
    if (folder / "cell.json").is_file():
        return
    started, kind = time.process_time(), METHODS[cell.method].draws
    if kind == "once":
        run, steps = once(cell, out, folder, size)
    else:
        run, steps = (in_rounds if kind == "rounds" else online)(cell, folder, size)
    spent = time.process_time() - started
    if run != folder:  # the last round stands for the cell
        for name in ("weights", "metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to((run / name).resolve())
    model = load_config(RECIPES[cell.base]).model.model_dump()
    finish_cell(cell, folder, out, model, size, "testbed:test", steps, spent, (SECOND,), cpu_seconds=spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["shapes-sdxl", "shapes-sd3"], choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forwards", type=int, default=60_000, help="image-forwards of a cell, drawing included")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-online"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", default=[""], help="only methods whose names begin so")
    parser.add_argument("--tiny", action="store_true", help="few groups, forwards and prompts: does everything run?")
    given = parser.parse_args()
    size = TINY if given.tiny else Scale(budget=given.forwards)
    wanted = [
        Cell(base, name, seed, shuffled)
        for base in given.bases
        for seed in given.seeds
        for name, method in METHODS.items()
        if any(name.startswith(start) for start in given.methods)
        for shuffled in ((False, True) if method.control else (False,))
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    for cell in wanted:
        print(
            f"\n=== {cell.base}: {cell.method}, {'shuffled' if cell.shuffled else 'true'} scores, seed {cell.seed}",
            flush=True,
        )
        run_cell(cell, given.out, size)
    done = [json.loads((cell.folder(given.out) / "cell.json").read_text()) for cell in wanted]
    write_report(summarise(done), given.results, {**asdict(size), "second": SECOND}, "online")


if __name__ == "__main__":
    main()
