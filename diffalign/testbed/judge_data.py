"""Make images of the embedded world with known faults and ratings: data for a judge of images.

A fault belongs to one dimension: a wrong shape, colour, count or place to alignment; blur and noise to realism; a
broken outline to plausibility. Its size gives the score on which raters agree on average; each rater draws from a known
distribution around it. So the distribution that a judge should predict is known, not only its mean.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from diffalign.testbed.scenes import COLORS, GROUND, SHAPES, Scene, render
from diffalign.testbed.shape_prompts import NUMBERS, RELATIONS, TAGS, Metadata, combinations_of, prompt_text, scene_for

DIMENSIONS: tuple[str, ...] = ("alignment", "realism", "plausibility")
LEVELS = np.linspace(1.0, 5.0, 9)
DISAGREEMENT = 0.5
"""Standard deviation of raters around the score on which they agree, in points."""
# Points that a fault costs. A wrong shape costs most.
COSTS = {"shape": 2.0, "color": 1.5, "place": 1.5, "count": 1.0}
DEGREES = ("no", "slight", "clear", "strong", "heavy")
BLUR = (0.0, 0.7, 1.2, 1.8, 2.8)  # radius, pixels
NOISE = (0.0, 10.0, 22.0, 40.0, 70.0)  # standard deviation, 8-bit levels
CUTS = ("no", "one", "two", "three", "four")


@dataclass(frozen=True)
class FaultyImage:
    """An image with a known fault.

    reasons: what a rater would note. score: the average on which raters agree, 1 to 5, anywhere between the levels.
    """

    prompt: str
    dimension: str
    image: Image.Image
    reasons: str
    score: float


def rating_distribution(score: float) -> np.ndarray:
    """Return the probability of each level for one rater, [9]: a bell around the score, cut off at the ends."""
    weight = np.exp(-((LEVELS - score) ** 2) / (2 * DISAGREEMENT**2))
    return np.asarray(weight / weight.sum())


def misaligned(metadata: Metadata, faults: int, rng: np.random.Generator) -> tuple[Metadata, dict[str, float]]:
    """Return clauses that miss `faults` of a prompt's demands (or all, if it has fewer), and the cost of each kind of
    fault.
    """
    include = [dict(clause) for clause in metadata["include"]]
    demands = [("shape", i) for i in range(len(include))]
    demands += [("color", i) for i, clause in enumerate(include) if "color" in clause]
    demands += [("count", i) for i, clause in enumerate(include) if clause["count"] > 1]
    demands += [("place", i) for i, clause in enumerate(include) if "position" in clause]
    cost: dict[str, float] = {}
    for place in rng.permutation(len(demands))[:faults]:
        kind, i = demands[place]
        clause, worth = include[i], COSTS[kind]
        if kind == "shape":
            taken = {c["class"] for c in include} | {c["class"] for c in metadata["include"]}
            clause["class"] = str(rng.choice([s for s in SHAPES if s not in taken]))
        elif kind == "color":
            taken = {c.get("color") for c in [*include, *metadata["include"]]}
            clause["color"] = str(rng.choice([c for c in COLORS if c not in taken]))
        elif kind == "count":
            others = [n for n in (1, *NUMBERS) if n != clause["count"]]
            found = int(rng.choice(others))
            worth *= abs(found - clause["count"])
            clause["count"] = found
        else:
            clause["position"] = [str(rng.choice([r for r in RELATIONS if r != clause["position"][0]])), 0]
        cost[kind] = cost.get(kind, 0.0) + worth
    return {**metadata, "include": include}, cost


def broken(scene: Scene, cuts: int, rng: np.random.Generator) -> Image.Image:
    """Return the scene with bars of ground colour through its objects."""
    image = render(scene)
    draw = ImageDraw.Draw(image)
    for _ in range(cuts):
        item = scene[rng.integers(len(scene))]
        angle, off = rng.uniform(0, math.pi), rng.uniform(-0.5, 0.5) * item.radius
        x, y = item.x - off * math.sin(angle), item.y + off * math.cos(angle)
        dx, dy = 1.5 * item.radius * math.cos(angle), 1.5 * item.radius * math.sin(angle)
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=GROUND, width=3)
    return image


def faulty_image(metadata: Metadata, dimension: str, degree: int, rng: np.random.Generator) -> FaultyImage:
    """Return an image of a prompt whose fault in `dimension` has a degree from 0 (none) to 4, or less if it cannot."""
    if dimension == "alignment":
        found, cost = misaligned(metadata, degree, rng)
        verdict = " ".join(f"wrong {kind} ." for kind in COSTS if kind in cost) or "all right ."
        image = render(scene_for(found, rng))
        return FaultyImage(
            metadata["prompt"],
            dimension,
            image,
            f"{prompt_text(found['include'])} . {verdict}",
            max(1.0, 5.0 - sum(cost.values())),
        )
    scene = scene_for(metadata, rng)
    if dimension == "plausibility":
        noun = "cut" if degree == 1 else "cuts"
        return FaultyImage(
            metadata["prompt"], dimension, broken(scene, degree, rng), f"{CUTS[degree]} {noun} .", 5.0 - degree
        )
    image = render(scene)
    kind = ("blur", "noise")[rng.integers(2)]
    if kind == "blur":
        image = image.filter(ImageFilter.GaussianBlur(BLUR[degree]))
    else:
        pixels = np.asarray(image, float) + rng.normal(0, NOISE[degree], (*image.size[::-1], 3))
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return FaultyImage(metadata["prompt"], dimension, image, f"{DEGREES[degree]} {kind} .", 5.0 - degree)


def random_prompt(split: str, rng: np.random.Generator) -> Metadata:
    """Return a random prompt of a split; all six kinds are equally frequent, and prompts may repeat."""
    options = combinations_of(split, TAGS[rng.integers(len(TAGS))])
    wordings = options[rng.integers(len(options))]
    return wordings[rng.integers(len(wordings))]


def faulty_groups(
    split: str, n: int, images: int, seed: int, dimensions: tuple[str, ...] = DIMENSIONS
) -> Iterator[list[FaultyImage]]:
    """Yield `n` groups of `images` images of one prompt and dimension, each with a fault of another degree.

    Dimensions take turns.
    """
    for index in range(n):
        rng = np.random.default_rng([seed, index, sum(split.encode())])
        metadata, dimension = random_prompt(split, rng), dimensions[index % len(dimensions)]
        degrees = rng.permutation(5)[:images]
        yield [faulty_image(metadata, dimension, int(degree), rng) for degree in degrees]


def judge_records(
    groups: Iterator[list[FaultyImage]], raters: int, seed: int
) -> Iterator[tuple[list[Image.Image], list[Metadata], list[Metadata]]]:
    """Yield images, pair records and rating records of each group; images are named images/GROUP-INDEX.png.

    A pair's scores are those of the first rater, as when one person annotates an image; images with equal scores make
    no pair.
    """
    for number, group in enumerate(groups):
        rng = np.random.default_rng([seed, number, 7])
        ratings = [rng.choice(LEVELS, size=raters, p=rating_distribution(one.score)).tolist() for one in group]
        names = [f"images/{number:06d}-{index}.png" for index in range(len(group))]
        rated = [
            {
                "prompt": one.prompt, "dimension": one.dimension, "image": name, "ratings": said, "true_score": one.score,
                "true_probabilities": rating_distribution(one.score).tolist(),
            }
            for one, name, said in zip(group, names, ratings, strict=True)
        ]  # fmt: skip
        pairs = []
        for a, b in zip(range(0, len(group), 2), range(1, len(group), 2), strict=False):
            w, l = (a, b) if ratings[a][0] > ratings[b][0] else (b, a)
            if ratings[w][0] > ratings[l][0]:
                pairs.append(
                    {
                        "prompt": group[w].prompt, "dimension": group[w].dimension,
                        "image_w": names[w], "image_l": names[l], "score_w": ratings[w][0], "score_l": ratings[l][0],
                        "trace_w": group[w].reasons, "trace_l": group[l].reasons,
                    }
                )  # fmt: skip
        yield [one.image for one in group], pairs, rated
