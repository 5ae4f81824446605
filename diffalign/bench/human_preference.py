"""The HPSv2 benchmark and Pick-a-Pic's test prompts: images judged by models of people's choices."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.bench.measures import JudgedImage, Measure
from diffalign.bench.suite import Suite, SuiteJudge, by_tag


def form_hpsv2(images: Sequence[JudgedImage]) -> list[Measure]:
    """Return 100 x HPSv2 of each style, and the mean over styles first."""
    styles = Measure.of("mean of styles", ((i.prompt, i.tag, i.values["hpsv2"]) for i in images), scale=100, digits=2)
    return [styles, *by_tag(images, "hpsv2", scale=100, digits=2)]


def form_pickapic(images: Sequence[JudgedImage]) -> list[Measure]:
    """Return the mean PickScore."""
    return [Measure.of("PickScore", ((i.prompt, "", i.values["pickscore"]) for i in images), digits=3)]


HPSV2 = Suite(
    name="hpsv2",
    title="HPSv2 benchmark",
    source="arXiv 2306.09341; github.com/tgxs002/HPSv2, hpsv2/evaluation.py",
    prompts="hpsv2",
    published=3200,
    where="benchmark/ of huggingface.co/datasets/zhwang/HPDv2, fetched where no path is given",
    inside=("benchmark",),
    images_per_prompt=1,
    judges=(SuiteJudge("hpsv2", {"release": "2.1"}),),
    protocol="1 image a prompt, 800 prompts of each of four styles; 100 x the mean HPSv2.1 of a style, and their mean",
    form=form_hpsv2,
    deviations=(
        "Intervals over prompts stand in the place of the standard deviation over ten parts of 80 prompts",
        "HPSv2.0, of which the paper's tables are, with --judge hpsv2:release=2.0",
    ),
)

PICKAPIC = Suite(
    name="pickapic",
    title="Pick-a-Pic test prompts",
    source="arXiv 2305.01569; the prompts on which Diffusion-DPO and others report PickScore",
    prompts="pickapic",
    published=500,
    where="test_unique of huggingface.co/datasets/yuvalkirstain/pickapic_v1_no_images, fetched where no path is given",
    images_per_prompt=1,
    judges=(SuiteJudge("pickscore"),),
    protocol="1 image a prompt; the mean PickScore. Win rates against another model: diffalign bench compare",
    form=form_pickapic,
)
