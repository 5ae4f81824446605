"""Prompts longer than a model reads: counted in one line, and no warning of a library for each."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest

from diffalign.data.cut_prompts import cut_lines
from diffalign.pipelines import load_backbone
from diffalign.pipelines.generator import load_generator
from diffalign.pipelines.prompt_length import WARNINGS

SHORT, LONG = "a cat", "cat " * 400


def lengths(backbone: Any, prompt: str) -> dict[str, int]:
    """How many tokens each tokenizer of a pipeline makes of a prompt, by its own count of ids."""
    names = [name for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if name in backbone.pipeline.components]
    found = {name: backbone.pipeline.components[name] for name in names}
    return {name: len(tokenizer.encode(prompt)) for name, tokenizer in found.items() if tokenizer is not None}


@pytest.mark.parametrize(
    ("model", "options", "reader"),
    [
        ("sd15_dir", {}, "tokenizer"),
        ("sdxl_dir", {}, "tokenizer"),
        ("sd3_dir", {}, "tokenizer"),  # whose T5 reads less than its CLIP
        ("sd3_dir", {"max_sequence_length": 20}, "tokenizer_3"),
        ("sd3_dir", {"use_t5": False}, "tokenizer"),
        ("flux_dir", {"max_sequence_length": 24}, "tokenizer_2"),
    ],
)
def test_the_count_is_that_of_the_encoder_that_reads_most(
    model: str, options: dict[str, Any], reader: str, request: pytest.FixtureRequest
) -> None:
    backbone = load_backbone(request.getfixturevalue(model), **options)
    longest = backbone.longest
    assert longest == options.get("max_sequence_length", longest) > 2
    prompts = ["cat " * n for n in range(1, 2 * longest)]
    longer = [prompt for prompt in prompts if lengths(backbone, prompt)[reader] > longest]
    assert 0 < len(longer) < len(prompts)
    assert backbone.count_cut([*prompts, *prompts]) == len(longer) and backbone.count_cut([]) == 0
    # What is beyond the limit has no effect, what is within it has.
    edge = next(n for n, prompt in enumerate(prompts) if prompt in longer)
    same = [backbone.encode_prompts([prompts[n] + " dog"]) for n in (edge, edge + 1)]
    assert all((same[0][name] == same[1][name]).all() for name in same[0])


def test_one_line_and_no_warning(sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(sdxl_dir)
    told = io.StringIO()
    for library in ("diffusers", "transformers"):
        logger = logging.getLogger(library)
        monkeypatch.setattr(logger, "level", logging.WARNING)
        for handler in (one for one in logger.handlers if type(one) is logging.StreamHandler):  # not pytest's
            monkeypatch.setattr(handler, "stream", told)
    backbone.encode_prompts([LONG])
    backbone.encode_guided([LONG, LONG + "x"], LONG)
    backbone.sample([LONG], [0], steps=1, guidance_scale=2.0, height=32, width=32)
    backbone.pipeline.tokenizer.encode(LONG)
    logging.getLogger("diffusers.pipelines").warning("another thing")
    assert told.getvalue().count("another thing") == 1 and not any(words in told.getvalue() for words in WARNINGS)
    lines = cut_lines({"the model": backbone}, [LONG, SHORT, LONG, None])
    assert lines == [f"the model reads {backbone.longest} tokens of a prompt: 1 of 2 prompts are longer and were cut"]


def test_a_generator_counts_as_its_model(sd15_dir: Path) -> None:
    generator = load_generator(str(sd15_dir))
    assert generator.longest == generator.pipeline.tokenizer.model_max_length
    assert generator.count_cut([SHORT, LONG, LONG]) == 1
