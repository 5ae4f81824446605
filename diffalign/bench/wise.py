"""WISE (Niu et al. 2025): does an image show what the prompt only implies? In the form of WISE_Verified, one verdict each."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.bench.dpgbench import YES
from diffalign.bench.measures import JudgedImage, Measure
from diffalign.bench.suite import Suite, SuiteJudge
from diffalign.data.prompts import PromptRow

QUESTION = (
    'This image was made for the prompt "{prompt}". What it should show: {explanation} Does the image clearly show what the '
    "explanation says, with nothing important missing, wrong or broken? If in doubt, answer No. Answer Yes or No."
)
WEIGHTS = {
    "Cultural knowledge": 0.40, "time": 0.12, "Space": 0.12, "Biology": 0.12, "Physical Knowledge": 0.12, "Chemistry": 0.12,
}  # fmt: skip


def prepare(rows: list[PromptRow]) -> list[PromptRow]:
    """Add the question."""
    return [PromptRow(row.prompt, {**row.metadata, "questions": [[_question(row), "Yes"]]}) for row in rows]


def _question(row: PromptRow) -> str:
    return QUESTION.format(prompt=row.prompt, explanation=row.metadata["explanation"].rstrip(". ") + ".")


def form(images: Sequence[JudgedImage]) -> list[Measure]:
    """Return the weighted mean over categories of the share of right images, and each share."""
    judged = [(image.prompt, image.tag, float(p > YES)) for image in images for p in image.answers("vqa")]
    return [
        Measure.of("WiScore", judged, weights=WEIGHTS),
        *(
            Measure.of(tag, (one for one in judged if one[1] == tag))
            for tag in dict.fromkeys(tag for _, tag, _ in judged)
        ),
    ]


WISE = Suite(
    name="wise",
    title="WISE_Verified",
    source="arXiv 2503.07265; github.com/PKU-YuanGroup/WISE, vllm_eval.py, calculate_verified.py",
    prompts="wise",
    published=1000,
    where="data_verified of github.com/PKU-YuanGroup/WISE",
    inside=("data_verified",),
    images_per_prompt=1,
    judges=(SuiteJudge("vqa", {"wording": "{question}"}, asks=True),),
    protocol="1 image a prompt; the share of right images by category, and 0.4 culture + 0.12 of each of the other five",
    form=form,
    prepare=prepare,
    deviations=(
        "Qwen3-VL-8B-Instruct answers one question in our words (yes: a probability above one half), not Qwen3.5-35B-A3B "
        "with the published instruction: compare with numbers of the same judge alone",
    ),
)
