"""Draw batches with the model of a `generators` section, in this process or in an actor of a cluster."""

from dataclasses import dataclass
from typing import Any

from diffalign.config import GeneratorSection
from diffalign.data.cut_prompts import cut_lines
from diffalign.data.plan import Cell
from diffalign.data.sample import Draw, Drawn, DrawnBatch, draw_batch
from diffalign.pipelines.generator import Generator
from diffalign.report.model_card import licence_name
from diffalign.stages.resolve import open_generator, sampling_settings, weights_digest


def drawer(generator: Generator, section: GeneratorSection, latents: bool) -> Draw:
    """Return the function with which `draw_part` draws a batch."""

    settings = sampling_settings(section)

    def draw(prompts: list[str], seeds: list[int]) -> list[Drawn]:
        drawn = generator.draw(prompts, seeds, settings, options=section.options, latents=latents)
        return [Drawn(image, latent) for image, latent in drawn]

    return draw


def provenance_of(section: GeneratorSection, generator: Generator) -> dict[str, Any]:
    """Return what is written beside each image of a generator."""
    provenance: dict[str, Any] = {**generator.facts(), "model": section.model.path}
    provenance |= section.model_dump(
        mode="json", include={"steps", "guidance_scale", "negative_prompt", "height", "width", "options", "prior"}
    )
    provenance["licence"] = section.licence or licence_name(section.model.path)
    provenance["scheduler_options"] = section.scheduler.options if section.scheduler else {}
    provenance["noise"] = generator.noise_record(sampling_settings(section))
    provenance["weights"] = None if section.weights is None else weights_digest(section.weights)
    return provenance


@dataclass(frozen=True)
class FromNode:
    """A batch that an actor drew. provenance: what is written beside its images; cut: lines about prompts that are cut."""

    batch: DrawnBatch
    provenance: dict[str, Any]
    cut: tuple[str, ...]


@dataclass(frozen=True)
class OpenPainter:
    """Builds the worker of an actor. prompts: of the whole plan."""

    section: GeneratorSection
    device: str
    latents: bool
    prompts: tuple[str, ...]

    def __call__(self) -> "Painter":
        return Painter(self)


class Painter:
    """A generator in an actor."""

    def __init__(self, opened: OpenPainter) -> None:
        section, generator = opened.section, open_generator(opened.section, opened.device)
        self.name = section.name
        self.provenance = provenance_of(section, generator)
        self.draw = drawer(generator, section, opened.latents)
        self.cut = tuple(cut_lines({section.name: generator}, list(opened.prompts)))

    def __call__(self, cells: tuple[Cell, ...], proven: bool) -> FromNode:
        return FromNode(draw_batch(self.draw, cells, self.name, self.provenance), self.provenance, self.cut)
