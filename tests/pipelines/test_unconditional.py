"""What takes the place of a dropped prompt is what the diffusers pipeline itself steers away from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.training_source import prepare_source
from diffalign.data.writer import write_groups
from diffalign.pipelines import load_backbone
from diffalign.training.prompt_source import PromptSource
from helpers import tiny
from helpers.small_datasets import LABELS, group_rows, quiet, settings, write_images


def own_negative(pipeline: Any, family: str) -> dict[str, torch.Tensor]:
    """The negative embeddings of the plain pipeline's own call, as its `encode_prompt` gives them."""
    where = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        if family == "sd15":
            return {"prompt_embeds": pipeline.encode_prompt("a cat", **where)[1]}
        if family == "sd3":
            found = pipeline.encode_prompt("a cat", None, None, max_sequence_length=12, **where)
        elif family == "flux":  # its guidance is built in: an empty prompt is all there is
            embeds, pooled, _ = pipeline.encode_prompt("", None, max_sequence_length=12)
            return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        else:
            found = pipeline.encode_prompt("a cat", **where)
    return {"prompt_embeds": found[1], "pooled_prompt_embeds": found[3]}


def encodes_the_empty_prompt(folder: Path, to: Path) -> Path:
    """A copy of an SDXL checkpoint whose model_index.json has force_zeros_for_empty_prompt false, as some have it."""
    shutil.copytree(folder, to)
    index = json.loads((to / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (to / "model_index.json").write_text(json.dumps(index))
    return to


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sdxl-encoded", "sd3", "sd3-without-t5", "flux"])
def test_a_dropped_prompt_is_what_sampling_steers_away_from(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if family == "sdxl-encoded":
        folder = encodes_the_empty_prompt(request.getfixturevalue("sdxl_dir"), tmp_path / "model")
    elif family == "sd3-without-t5":
        folder = tiny.sd3(tmp_path / "model", t5=False)
    else:
        folder = request.getfixturevalue(f"{family}_dir")
    backbone = load_backbone(folder, **({"max_sequence_length": 12} if family[:3] in ("sd3", "flu") else {}))
    expected = own_negative(backbone.pipeline, family.split("-")[0])
    if family == "sdxl":
        assert not any(value.any() for value in expected.values())

    data = tmp_path / "data"
    write_groups(data, group_rows())
    write_images(data)
    for mode in ("all", "latents", "off"):
        source = prepare_source(settings(cache=mode, resolution=64), LABELS, PreferenceDataset(data), backbone, quiet)
        assert source.unconditional.keys() == expected.keys()
        for name, value in source.unconditional.items():
            assert torch.equal(value, expected[name].to(torch.bfloat16).float()), (mode, name)
    for name, value in PromptSource(backbone, [], cache=False).unconditional.items():
        assert torch.equal(value, expected[name]), name


def test_a_caption_without_words_is_still_a_prompt(sdxl_dir: Path, tmp_path: Path) -> None:
    """The pipeline encodes a prompt of no words; only what it steers away from is zeros."""
    backbone = load_backbone(sdxl_dir)
    write_groups(tmp_path, [row | {"prompt": "" if row["group_id"] == "a" else row["prompt"]} for row in group_rows()])
    write_images(tmp_path)
    source = prepare_source(settings(resolution=64), LABELS, PreferenceDataset(tmp_path), backbone, quiet)
    row = source.prompts.index("")
    empty = source.batch([row]).conditioning
    for name, value in backbone.encode_prompts([""]).items():
        assert torch.equal(empty[name], value.to(torch.bfloat16).float()) and value.any()
        assert not source.unconditional[name].any()
