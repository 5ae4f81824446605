"""UniGenBench++ (Wang et al. 2025): is each testpoint of a prompt fulfilled?"""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.bench.dpgbench import YES
from diffalign.bench.measures import JudgedImage, Measure
from diffalign.bench.suite import Suite, SuiteJudge
from diffalign.data.prompts import PromptRow

QUESTION = (
    'This image was made for the prompt "{prompt}". Look at one point of it alone, {point}: "{description}". Does the image '
    "clearly show it as the prompt asks? Answer Yes or No."
)


def prepare(rows: list[PromptRow]) -> list[PromptRow]:
    """Add a question about each testpoint."""
    return [PromptRow(row.prompt, {**row.metadata, "questions": _questions(row)}) for row in rows]


def _questions(row: PromptRow) -> list[list[str]]:
    return [
        [QUESTION.format(prompt=row.prompt, point=point, description=description), "Yes"]
        for point, description in zip(row.metadata["testpoints"], row.metadata["descriptions"], strict=True)
    ]


def form(images: Sequence[JudgedImage]) -> list[Measure]:
    """Return the share of fulfilled testpoints: the mean over primary dimensions, each of these, and each sub-dimension."""
    judged = [
        (image.prompt, point, float(p > YES))
        for image in images
        for point, p in zip(image.metadata["testpoints"], image.answers("vqa"), strict=False)
    ]
    primary = [(prompt, point.partition("-")[0].strip(), right) for prompt, point, right in judged]
    groups = [*_each(primary), *_each([one for one in judged if "-" in one[1]])]
    return [Measure.of("mean of dimensions", primary, scale=100, digits=2), *groups]


def _each(judged: list[tuple[int, str, float]]) -> list[Measure]:
    return [
        Measure.of(name, (one for one in judged if one[1] == name), scale=100, digits=2)
        for name in sorted({name for _, name, _ in judged})
    ]


UNIGENBENCH = Suite(
    name="unigenbench",
    title="UniGenBench++",
    source="arXiv 2510.18701; github.com/CodeGoat24/UniGenBench, eval/src/eval_common.py",
    prompts="unigenbench",
    published=600,
    where="data/test_prompts_en.csv (or en_long, zh, zh_long) of github.com/CodeGoat24/UniGenBench",
    inside=("test_prompts_en.csv", "data/test_prompts_en.csv"),
    images_per_prompt=4,
    judges=(SuiteJudge("vqa", {"wording": "{question}"}, asks=True),),
    protocol="4 images a prompt; the share of fulfilled testpoints by primary and by sub-dimension",
    form=form,
    prepare=prepare,
    deviations=(
        "Qwen3-VL-8B-Instruct answers one question a testpoint in our words (yes: a probability above one half), where "
        "Gemini 2.5 Pro or UniGenBench-EvalModel writes an analysis of all: compare with numbers of the same judge alone",
        "The mean of dimensions is ours; the published script prints none",
    ),
)
