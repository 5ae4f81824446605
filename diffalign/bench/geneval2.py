"""GenEval 2 (Kamath et al. 2025): Soft-TIFA, the probability of the right answer to a question about every atom."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.bench.measures import JudgedImage, Measure
from diffalign.bench.suite import Suite, SuiteJudge, by_tag


def form(images: Sequence[JudgedImage]) -> list[Measure]:
    """Return Soft-TIFA GM and AM, the mean answer of each skill, and GM by the number of atoms; all times 100."""
    skills = [
        (image.prompt, skill, answer)
        for image in images
        for skill, answer in zip(image.metadata["skills"], image.answers("vqa"), strict=False)
    ]
    return [
        Measure.of("Soft-TIFA GM", ((i.prompt, "", i.values["vqa.geometric"]) for i in images), scale=100, digits=2),
        Measure.of("Soft-TIFA AM", ((i.prompt, "", i.values["vqa"]) for i in images), scale=100, digits=2),
        *(
            Measure.of(skill, (one for one in skills if one[1] == skill), scale=100, digits=2)
            for skill in dict.fromkeys(skill for _, skill, _ in skills)
        ),
        *sorted(
            by_tag(images, "vqa.geometric", scale=100, digits=2, prefix="atoms "),
            key=lambda measure: int(measure.name.split()[1]),
        ),
    ]


GENEVAL2 = Suite(
    name="geneval2",
    title="GenEval 2",
    source="arXiv 2512.16853; github.com/facebookresearch/GenEval2, evaluation.py, soft_tifa_analysis.py",
    prompts="geneval2",
    published=800,
    where="geneval2_data.jsonl of github.com/facebookresearch/GenEval2 (CC BY-NC 4.0)",
    inside=("geneval2_data.jsonl",),
    images_per_prompt=1,
    judges=(SuiteJudge("vqa", columns=("geometric",), asks=True),),
    protocol="1 image a prompt; Qwen3-VL-8B-Instruct answers a question about each atom; 100 x the geometric mean (GM) of "
    "the right answers' probabilities, and the arithmetic one (AM)",
    form=form,
    deviations=("Each token counts once, where two spellings of an answer begin with the same one",),
)
