"""T2I-CompBench++ (Huang et al. 2023, 2025): attributes, places, numbers and actions bound to the right objects."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.bench.measures import JudgedImage, Measure
from diffalign.bench.suite import Suite, SuiteJudge, by_tag

BY_QUESTION = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "complex")
BY_CLIP = ("non_spatial",)


def form(images: Sequence[JudgedImage]) -> list[Measure]:
    """Return the mean score of each kind of prompt; the paper reports no mean over them."""
    return [
        *by_tag([i for i in images if i.tag in BY_QUESTION], "vqascore"),
        *by_tag([i for i in images if i.tag in BY_CLIP], "clipscore"),
    ]


T2I_COMPBENCH = Suite(
    name="t2i-compbench",
    title="T2I-CompBench++",
    source="arXiv 2307.06350; github.com/Karine-Huang/T2I-CompBench",
    prompts="t2i-compbench",
    published=2400,
    where="examples/dataset of github.com/Karine-Huang/T2I-CompBench",
    inside=("examples/dataset",),
    images_per_prompt=10,
    judges=(
        SuiteJudge("vqascore", kinds=BY_QUESTION),
        SuiteJudge("clipscore", {"convention": "compbench"}, kinds=BY_CLIP),
    ),
    protocol="10 images a prompt; the mean score of each kind of prompt; CLIPScore for non_spatial, as published",
    form=form,
    deviations=(
        "VQAScore on the whole prompt judges all other kinds, not BLIP-VQA on noun phrases (attributes), UniDet with depth "
        "(places, numbers) and their mean (complex): compare with numbers of the same judge alone",
    ),
)
