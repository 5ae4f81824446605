"""DPG-Bench (Hu et al. 2024): long prompts, each with yes-or-no questions that depend on each other."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.bench.measures import JudgedImage, Measure
from diffalign.bench.suite import Suite, SuiteJudge

YES = 0.5
"""The probability of "yes" above which an answer counts as yes."""


def score(image: JudgedImage) -> float:
    """Return the share of questions answered with yes; one of which a parent's answer counts as no counts as no."""
    ids = image.metadata["proposition_ids"]
    scores = {number: float(p > YES) for number, p in zip(ids, image.answers("vqa"), strict=False)}
    if not scores:
        return float("nan")
    # In the order of the file, so that a child of a child is 0, too.
    for number, parents in zip(ids, image.metadata["dependencies"], strict=True):
        if any(scores.get(parent, 1.0) == 0 for parent in parents if parent != 0):
            scores[number] = 0.0
    return sum(scores.values()) / len(scores)


def form(images: Sequence[JudgedImage]) -> list[Measure]:
    """Return the mean score of the images, and the share of yes by category of question; all times 100."""
    asked = [
        (image.prompt, category.partition("-")[0].strip(), float(p > YES))
        for image in images
        for category, p in zip(image.metadata["categories"], image.answers("vqa"), strict=False)
    ]
    return [
        Measure.of("DPG-Bench", ((i.prompt, "", score(i)) for i in images), scale=100, digits=2),
        *(
            Measure.of(category, (one for one in asked if one[1] == category), scale=100, digits=2)
            for category in dict.fromkeys(category for _, category, _ in asked)
        ),
    ]


DPGBENCH = Suite(
    name="dpgbench",
    title="DPG-Bench",
    source="arXiv 2403.05135; github.com/TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py",
    prompts="dpgbench",
    published=1065,
    where="the folder dpg_bench of github.com/TencentQQGYLab/ELLA",
    inside=("dpg_bench",),
    images_per_prompt=4,
    judges=(SuiteJudge("vqa", asks=True),),
    protocol="4 images a prompt; the share of questions answered with yes, 0 for one whose parent has a no; "
    "categories count every answer by itself",
    form=form,
    deviations=(
        "Qwen3-VL-8B-Instruct answers (yes: a probability above one half), not mPLUG-large, which needs modelscope: "
        "compare with numbers of the same judge alone",
        "Categories are means over all four images; the published script keeps the fourth alone",
        "The first question of the file counts; the published script skips it",
    ),
)
