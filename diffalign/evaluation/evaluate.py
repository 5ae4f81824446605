"""Sample two models at the same prompts and seeds, score the images, and write the comparison.

    <out>/eval/images/<model>/00012-3.png   prompt 12, seed 3
    <out>/eval/scores.jsonl                 one row an image: model, prompt, seed, every reward's columns (null: not scored)
    <out>/eval.json                         comparisons: overall and per kind of prompt

Besides `tuned`, any number of further weights (`others`) can be compared with the same base.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from rich.table import Table

from diffalign import stopping
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare
from diffalign.evaluation.quality import corrected, diversity
from diffalign.files import make_folder, read_json_lines, reading, replacing, write_whole
from diffalign.intervals import interval_in
from diffalign.progress import OnImages, OnNamedImages
from diffalign.rewards import Reward
from diffalign.terminal import counted, name_cell, plain_table

ALL = "all"
"""The kind of all prompts together; a tag of that name is shown as another."""
Sampler = Callable[[list[str], list[int]], list[Image.Image]]
"""Draws one image per prompt and seed."""


class Prompt(Protocol):
    """A prompt with the metadata that rewards may need; `metadata["tag"]` is its kind."""

    @property
    def prompt(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...


class Correction(Protocol):
    """The scores that form the corrected score (`quality.corrected`): a config's `corrected` section."""

    @property
    def reward(self) -> str: ...
    @property
    def quality(self) -> list[str]: ...
    @property
    def u0(self) -> float: ...
    @property
    def c(self) -> float: ...


@dataclass(frozen=True)
class EvaluationPlan:
    """What is drawn. All models get the same noise, from (seed, prompt's place, k) alone."""

    prompts: Sequence[Prompt]
    seeds: int
    seed: int = 0
    batch_size: int = 32

    def cells(self) -> list[tuple[int, int]]:
        """Return (prompt's place, k) of every image."""
        return [(p, k) for p in range(len(self.prompts)) for k in range(self.seeds)]

    def image_seed(self, prompt: int, k: int) -> int:
        """Return the seed of one image, below 2^32."""
        return int(draw(self.seed, "evaluation", inner=prompt, member=k).integers(2**32))


def image_path(folder: Path, prompt: int, k: int) -> Path:
    """Return the file of one image."""
    return folder / f"{prompt:05d}-{k}.png"


def sample_images(
    sampler: Sampler,
    plan: EvaluationPlan,
    folder: Path,
    identity: str,
    on_progress: OnImages | None = None,
) -> None:
    """Draw the plan's images into `folder`; complete batches that exist are not drawn again.

    `identity` names what draws them: model, weights, sampler. Images of another identity or plan are deleted first, so
    that an old model's images are never taken for a new one's.
    """
    make_folder(folder)
    texts = "\0".join(p.prompt for p in plan.prompts)
    wanted = hashlib.blake2b(
        f"{identity}\0{plan.seed}\0{plan.batch_size}\0{texts}".encode(), digest_size=12
    ).hexdigest()
    mark = folder / "identity"
    if not mark.is_file() or mark.read_text() != wanted:
        for old in folder.glob("*.png"):
            old.unlink()
        mark.write_text(wanted)
    cells = plan.cells()
    if on_progress:
        on_progress(0, len(cells))
    for start in range(0, len(cells), plan.batch_size):
        batch = cells[start : start + plan.batch_size]
        if not all(image_path(folder, *cell).is_file() for cell in batch):
            prompts = [plan.prompts[p].prompt for p, _ in batch]
            with stopping.deferred():
                for cell, image in zip(batch, sampler(prompts, [plan.image_seed(*c) for c in batch]), strict=True):
                    with replacing(image_path(folder, *cell)) as part:
                        image.save(part, format="PNG")
            stopping.keep(f"{start + len(batch)} of {len(cells)} images of {folder.name} are")
            stopping.check()
        if on_progress:
            on_progress(start + len(batch), len(cells))


def score_folder(
    plan: EvaluationPlan, rewards: dict[str, Reward], folder: Path, chunk: int = 64
) -> dict[str, np.ndarray]:
    """Return "reward.column" -> scores [P, S] of the images in `folder`."""
    cells = plan.cells()
    found: dict[str, list[float]] = {}
    for start in range(0, len(cells), chunk):
        batch = cells[start : start + chunk]
        images = [_drawn(image_path(folder, *cell)) for cell in batch]
        texts = [plan.prompts[p].prompt for p, _ in batch]
        facts = [plan.prompts[p].metadata for p, _ in batch]
        for name, reward in rewards.items():
            for column, values in reward.measure(images, texts, facts).items():
                found.setdefault(f"{name}.{column}", []).extend(values.tolist())
    return {name: np.array(values).reshape(len(plan.prompts), plan.seeds) for name, values in found.items()}


def _drawn(path: Path) -> Image.Image:
    with reading(path, mend="delete it, and the same command draws it again"):
        return Image.open(path).convert("RGB")


def evaluate(
    *,
    base: Sampler,
    tuned: Sampler,
    plan: EvaluationPlan,
    rewards: dict[str, Reward],
    out: Path,
    identities: dict[str, str],
    others: dict[str, Sampler] | None = None,
    correction: Correction | None = None,
    base_folder: Path | None = None,
    on_progress: OnNamedImages | None = None,
) -> dict[str, Any]:
    """Compare models with the base; return what `eval.json` holds.

    identities: for every model, what draws its images; if it changes, they are drawn again. others: further models by
    name, drawn one after another. base_folder: where the base model's images lie or go, so that several runs on the
    same plan share them. Raises DiffalignError if there is no prompt.
    """
    if not plan.prompts:
        raise DiffalignError("there is no prompt to evaluate on")
    samplers = {"base": base, "tuned": tuned, **(others or {})}
    folders = {model: out / "eval" / "images" / model for model in samplers}
    folders["base"] = base_folder or folders["base"]
    # Model by model, so that the weights of only one are loaded; scores are cheap beside drawing and not cached.
    scores, spreads = {}, {}
    for model, sampler in samplers.items():
        sample_images(sampler, plan, folders[model], identities[model], _named(on_progress, model))
        scores[model] = score_folder(plan, rewards, folders[model])
        if correction is not None:
            columns = (correction.reward, correction.quality, correction.u0, correction.c)
            scores[model]["corrected"] = corrected(scores[model], *columns)
        if plan.seeds > 1:
            spreads[model] = _spread(folders[model], plan)
    # What eval.json holds: the comparison of `tuned`, then what is there only for some evaluations.
    result = {"seed": plan.seed, "seeds": plan.seeds, "prompts": [p.prompt for p in plan.prompts]}
    result |= {"images": {m: str(f) for m, f in folders.items()}, "scores": summarise(scores, plan)}
    if suites := sorted({p.metadata["suite"] for p in plan.prompts if "suite" in p.metadata}):
        result["suites"] = suites  # repository and commit of prompts from the hub
    if others:
        result["others"] = {model: summarise(scores, plan, model) for model in others}
    if spreads:
        result["diversity"] = {m: summarise(spreads, plan, m)["diversity"] for m in samplers if m != "base"}
    rows = (
        {"model": m, "prompt": plan.prompts[p].prompt, "seed": plan.image_seed(p, k), "index": [p, k]}
        | {column: float(values[p, k]) if math.isfinite(values[p, k]) else None for column, values in scores[m].items()}
        for m in samplers
        for p, k in plan.cells()
    )
    write_whole(out / "eval" / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(out / "eval.json", json.dumps(result, indent=1))
    return result


def _named(on_progress: OnNamedImages | None, model: str) -> OnImages | None:
    return None if on_progress is None else lambda done, total: on_progress(model, done, total)


def _spread(folder: Path, plan: EvaluationPlan) -> dict[str, np.ndarray]:
    return {"diversity": diversity(lambda p, k: image_path(folder, p, k), len(plan.prompts), plan.seeds)}


def summarise(
    scores: dict[str, dict[str, np.ndarray]], plan: EvaluationPlan, model: str = "tuned"
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return score -> kind of prompt ("all" first) -> comparison of `model` with the base.

    A kind of which no image was scored for both is left out. Raises DiffalignError where that is so of all prompts.
    """
    tags = [str(p.metadata.get("tag") or "") for p in plan.prompts]
    tags = [f"{ALL} (tag)" if tag == ALL else tag for tag in tags]
    kinds = {ALL: np.ones(len(tags), dtype=bool)}
    kinds |= {tag: np.array([t == tag for t in tags]) for tag in dict.fromkeys(tags) if tag}
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for column, base in scores["base"].items():
        other = scores[model][column]
        both = (np.isfinite(base) & np.isfinite(other)).any(axis=1)
        if not both.any():
            raise DiffalignError(f"{column}: no image was scored for both models; the scores' reasons say why")
        found[column] = {
            kind: compare(base[rows], other[rows], seed=plan.seed).as_dict()
            for kind, rows in kinds.items()
            if both[rows].any()
        }
    return found


def load_scores(out: Path, model: str, column: str) -> np.ndarray:
    """Return the scores [P, S] of an evaluation on disk."""
    chosen = [row for row in read_json_lines(out / "eval" / "scores.jsonl", needs=("model",)) if row["model"] == model]
    prompts, seeds = (max(row["index"][i] for row in chosen) + 1 for i in (0, 1))
    values = np.full((prompts, seeds), np.nan)
    for row in chosen:
        values[tuple(row["index"])] = math.nan if row[column] is None else row[column]
    return values


def comparison_table(result: dict[str, Any], columns: list[str] | None = None) -> Table:
    """Return the comparison as a table for a terminal: a line for each score, below it one for each kind of prompt."""
    title = f"base against tuned: {len(result['prompts'])} prompts x {counted(result['seeds'], 'seed')}"
    shown = plain_table("score", "prompts", "base", "tuned", "difference", "95% interval", "win\nrate", title=title)
    compared = {"": result["scores"], **result.get("others", {})}
    for model, scores in compared.items():
        found = dict(scores)
        if model or "tuned" in result.get("diversity", {}):
            found["diversity"] = result.get("diversity", {}).get(model or "tuned", {})
        for column, kinds in found.items():
            if columns is not None and column not in columns:
                continue
            for kind, c in kinds.items():
                if kind != "all" and (model or column == "diversity"):
                    continue  # further weights and diversity get one line each
                name = f"{model}: {column}" if model else column
                shown.add_row(
                    name_cell(name if kind == "all" else f"  {kind}"),
                    str(int(c["prompts"])),
                    *(f"{c[side]:.3f}" for side in ("base", "tuned")),
                    f"{c['difference']:+.3f}",
                    interval_in(c).words(),
                    f"{c['win_rate']:.1%}",
                    style="bold" if kind == "all" else None,
                )
    return shown
