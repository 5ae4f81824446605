"""GenEval (Ghosh et al. 2023): are the objects there, in number, colour and place? And the same on the embedded world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diffalign.bench.measures import JudgedImage, Measure
from diffalign.bench.suite import Suite, SuiteJudge, by_tag

VERDICT = "geneval.official"


def form(images: Sequence[JudgedImage]) -> list[Measure]:
    """Return the mean over tasks of the share of correct images, the shares, and the share of prompts with one correct."""
    any_right: dict[int, float] = {}
    for image in images:
        any_right[image.prompt] = max(any_right.get(image.prompt, 0.0), image.values[VERDICT])
    return [
        Measure.of("overall", ((i.prompt, i.tag, i.values[VERDICT]) for i in images)),
        *by_tag(images, VERDICT),
        Measure.of("correct images", ((i.prompt, "", i.values[VERDICT]) for i in images)),
        Measure.of("correct prompts", ((prompt, "", right) for prompt, right in any_right.items())),
    ]


GENEVAL = Suite(
    name="geneval",
    title="GenEval",
    source="arXiv 2310.11513; github.com/djghosh13/geneval, evaluation/summary_scores.py",
    prompts="geneval",
    published=553,
    where="prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval",
    inside=("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"),
    images_per_prompt=4,
    judges=(SuiteJudge("geneval", columns=("official",)),),
    protocol="4 images a prompt; overall is the mean over the six tasks of the share of correct images",
    form=form,
    deviations=(
        "Mask2Former's weights are Facebook's, not those that OpenMMLab trained (docs/rewards.md, geneval)",
        "Every image has a seed of its own; the published script sets one seed for each prompt",
    ),
)

SHAPES = replace(
    GENEVAL,
    name="shapes",
    title="GenEval on the embedded world",
    source="this project",
    prompts="testbed:test",
    published=256,
    where="the package",
    inside=(),
    judges=(SuiteJudge("geneval", {"detector": "shapes"}, columns=("official",)),),
    protocol="GenEval's, on prompts about coloured shapes, judged by the world's own detector",
    deviations=("It shows that the machinery works, and says nothing about other models",),
)
