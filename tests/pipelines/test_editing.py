"""Pairs of edits: a condition image in the dataset, its latents beside those of the images, and a model that edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config import load_config
from diffalign.data.buckets import fit, to_pixels
from diffalign.data.cache import latent_key
from diffalign.data.convert import import_pairs, open_rows
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_export import export
from diffalign.data.imported import write_imported
from diffalign.data.training_source import prepare_source
from diffalign.errors import DiffalignError
from diffalign.pipelines import Backbone, load_backbone
from diffalign.stages.train import train
from helpers import toy
from helpers.files import rows
from helpers.small_datasets import LABELS, picture, quiet, settings

SIDE = 64


@pytest.fixture(scope="module")
def editor(flux2_klein_dir: Path) -> Backbone:
    return load_backbone(flux2_klein_dir, max_sequence_length=24)


def edits(folder: Path, seed: int = 0, conditions: str = "ab") -> Path:
    """Convert a table of two edits, with the image before each edit where `conditions` names the row."""
    source = folder / f"table{seed}"
    source.mkdir(parents=True)
    lines = ["prompt,winner,loser,source_image"]
    for n, name in enumerate("ab"):
        for k, part in enumerate(("winner", "loser", "before")):
            picture(100 * n + 10 * k + seed * (part == "before"), (SIDE, SIDE)).save(source / f"{name}_{part}.png")
        before = f"{name}_before.png" if name in conditions else ""
        lines.append(f"make it {name},{name}_winner.png,{name}_loser.png,{before}")
    (source / "pairs.csv").write_text("\n".join(lines) + "\n")
    import_pairs([source / "pairs.csv"], folder / f"data{seed}")
    return folder / f"data{seed}"


def test_a_table_brings_condition_images(tmp_path: Path) -> None:
    dataset = PreferenceDataset(edits(tmp_path))
    ids = dataset.column("group_id")
    for group, name in zip(ids, "ab", strict=True):
        found = dataset.condition(group)
        assert found is not None and found.data == (tmp_path / "table0" / f"{name}_before.png").read_bytes()
        assert (
            len(dataset.images(group)) == 2 and "source_image" not in dataset.group(dataset.row(group) or 0)["metadata"]
        )
    assert len(dataset.condition_index) == 2 and dataset.condition("nothing") is None
    # The same from the export that has one row a prompt.
    export(dataset, tmp_path / "rows", "rows")
    again = write_imported(open_rows([tmp_path / "rows" / "data"], None)[1], tmp_path / "again")
    assert again.groups == 2
    back = PreferenceDataset(tmp_path / "again")
    assert [back.condition(group).data for group in back.column("group_id")] == [  # type: ignore[union-attr]
        dataset.condition(group).data
        for group in ids  # type: ignore[union-attr]
    ]
    (tmp_path / "plain").mkdir()
    plain = PreferenceDataset(edits(tmp_path / "plain", conditions=""))
    assert len(plain.condition_index) == 0 and not (plain.folder / "conditions").exists()


def test_a_loop_of_steps_is_the_pipelines_edit(editor: Backbone) -> None:
    """The velocity of an image beside another one, whose tokens stand behind its own."""
    pipeline: Any = editor.pipeline
    before, prompts = picture(7, (96, SIDE)), ["make it red"]
    conditioning = editor.encode_prompts(prompts) | {"image_latents": editor.encode_images(to_pixels([before]))}
    found = pipeline(
        prompt=prompts, image=before, generator=torch.Generator().manual_seed(3), num_inference_steps=4,
        guidance_scale=1.0, height=SIDE, width=96, output_type="latent", **editor.sampling_options(),
    ).images  # fmt: skip
    expected = editor.from_pipeline(found, 4, 6)
    x = torch.randn((1, editor.latent_channels, 4, 6), generator=torch.Generator().manual_seed(3))
    steps = editor.sampler_steps(4, SIDE, 96)
    with torch.no_grad():
        for t, stop in zip(steps.times, steps.stops, strict=True):
            x = editor.process.step(x, editor.predict(x, t[None], conditioning), t[None], stop[None])
        alone = editor.predict(x, t[None], editor.encode_prompts(prompts))
        assert not torch.allclose(editor.predict(x, t[None], conditioning), alone, atol=1e-3)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)


def test_edits_are_the_pipelines_own(editor: Backbone, sd3_dir: Path) -> None:
    pipeline: Any = editor.pipeline
    prompts, before, seeds = ["make it red", "blue"], [picture(1, (SIDE, SIDE)), picture(2, (SIDE, 96))], [3, 4]
    size = {"height": SIDE, "width": SIDE}
    drawn = editor.edit(prompts, before, seeds, steps=2, guidance_scale=3.0, **size)
    for prompt, image, seed, found in zip(prompts, before, seeds, drawn, strict=True):
        plain = pipeline(
            prompt=[prompt], image=image, generator=torch.Generator().manual_seed(seed), num_inference_steps=2,
            guidance_scale=3.0, **size, **editor.sampling_options(),
        ).images[0]  # fmt: skip
        # The pipeline returns latents as its VAE has them, and normalising them again rounds.
        assert np.abs(np.asarray(plain, int) - np.asarray(found, int)).max() <= 1
    with pytest.raises(DiffalignError, match="2 prompts, 1 images and 2 seeds; one of each is needed"):
        editor.edit(prompts, before[:1], seeds, steps=2)
    with pytest.raises(DiffalignError, match="edit: image 1 cannot be edited: Image too small: 64×32"):
        editor.edit(prompts, [before[0], picture(2, (SIDE, 32))], seeds, steps=1, guidance_scale=1.0, **size)
    with pytest.raises(DiffalignError, match="family sd3 takes no image to edit"):
        load_backbone(sd3_dir).edit(prompts, before, seeds, steps=2)


def test_their_latents_lie_beside_those_of_the_images(editor: Backbone, tmp_path: Path) -> None:
    dataset = PreferenceDataset(edits(tmp_path))
    sources = {
        mode: prepare_source(settings(cache=mode, resolution=SIDE), LABELS, dataset, editor, quiet)
        for mode in ("all", "latents", "off")
    }
    batches = {mode: source.batch([1, 0]) for mode, source in sources.items()}
    latents = batches["all"].conditioning["image_latents"]
    image = dataset.condition(dataset.column("group_id")[1])
    assert image is not None
    exact = editor.encode_images(to_pixels([fit(image.decode(), (SIDE, SIDE))]))
    torch.testing.assert_close(latents[:1], exact, rtol=2**-10, atol=1e-3)  # the cache is float16
    for batch in batches.values():
        assert set(batch.conditioning) == {"prompt_embeds", "image_latents"}
        assert all(torch.equal(value, batch.conditioning[name]) for name, value in batches["all"].conditioning.items())
    assert "image_latents" not in sources["all"].unconditional
    # Another image before the edit is another cache.
    plans = [source.plan for source in (sources["all"], _source(editor, edits(tmp_path, seed=5)))]
    keys = [latent_key(plan.frames, editor) for plan in plans if plan is not None]
    assert len(keys) == 2 and keys[0] != keys[1]


def _source(backbone: Backbone, folder: Path) -> Any:
    return prepare_source(settings(cache="off", resolution=SIDE), LABELS, PreferenceDataset(folder), backbone, quiet)


def test_dpo_on_pairs_of_edits(flux2_klein_dir: Path, tmp_path: Path) -> None:
    """From a margin of 0; the image before the edit is part of what is learnt, also where the prompt is dropped."""
    losses = []
    for seed in (0, 5):
        backbone = load_backbone(flux2_klein_dir, max_sequence_length=24)
        config = toy.toy_config(
            tmp_path / f"run{seed}", tune={"rank": 2, "alpha": 4}, objective={"name": "dpo", "beta": 200.0},
            train={"steps": 3, "groups_per_step": 2, "micro_batch": 1, "threads": 1, "prompt_dropout": 0.5},
            optimizer={"lr": 1e-2},
        )  # fmt: skip
        toy.train(config, backbone=backbone, source=_source(backbone, edits(tmp_path, seed)), say=quiet)
        log = rows(tmp_path / f"run{seed}")
        assert log[0]["margin"] == 0.0 and log[0]["grad_norm"] > 0 and log[-1]["drift"] > 0
        losses.append([row["loss"] for row in log])
    assert losses[0][0] == losses[1][0] and losses[0][1:] != losses[1][1:]


def test_mistakes_are_named(editor: Backbone, sd3_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"has condition images, and .* \(family sd3\) takes none; train a model"):
        _source(load_backbone(sd3_dir), edits(tmp_path / "a"))
    mixed = edits(tmp_path / "b", conditions="a")
    with pytest.raises(DiffalignError, match=r"1 of 2 groups have no condition image, such as .*; convert pairs"):
        _source(editor, mixed)
    config = load_config("flux2_klein_4b_edit_dpo", [f"data.path={mixed}"])
    with pytest.raises(DiffalignError, match="1 of 2 groups have no condition image"):  # before a model is loaded
        train(config, dry_run=True)
    (tmp_path / "c").mkdir()
    broken = tmp_path / "c" / "pairs.csv"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "c" / "x.png")
    picture(1).save(tmp_path / "c" / "y.png")
    (tmp_path / "c" / "bad.png").write_bytes(b"no image")
    broken.write_text("prompt,winner,loser,condition\nred,x.png,y.png,bad.png\n")
    with pytest.raises(DiffalignError, match=r"bad\.png is not a complete image"):
        import_pairs([broken], tmp_path / "c" / "data")
