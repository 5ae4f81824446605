"""What families call diffusers' pipelines with, stated here: tests/pipelines/test_families.py asks the family for it."""

from __future__ import annotations

from typing import Any

import pytest

from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("flux2_klein", {"max_sequence_length": 20}),
        ("sana", {"max_sequence_length": 20, "use_resolution_binning": False}),
        ("pixart", {"max_sequence_length": 20, "use_resolution_binning": False, "clean_caption": False}),
    ],
)
def test_options_of_a_call(name: str, wanted: dict[str, Any], request: pytest.FixtureRequest) -> None:
    backbone = load_backbone(request.getfixturevalue(f"{name}_dir"), max_sequence_length=20)
    options: dict[str, Any] = dict(backbone.sampling_options())
    instruction = options.pop("complex_human_instruction", None)
    assert options == wanted
    assert (instruction is not None and "Enhanced prompt" in instruction[0]) == (name == "sana")


def test_images_of_pixart_have_sides_of_whole_patches(request: pytest.FixtureRequest) -> None:
    """A patch is 2 cells of 8 pixels."""
    backbone = load_backbone(request.getfixturevalue("pixart_dir"), max_sequence_length=20)
    with pytest.raises(DiffalignError, match="72x64 pixels are not multiples of 16"):
        backbone.sample(["a"], [0], steps=1, guidance_scale=1.0, height=72, width=64)
