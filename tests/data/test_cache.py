"""The latent cache: what it holds, when it is made anew, and that training sees the same numbers without it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffalign import files
from diffalign.config import TrainConfig
from diffalign.data.buckets import fit, to_pixels
from diffalign.data.cache import CachePlan, latent_key, plan_cache
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.embeddings import trimmed
from diffalign.data.latents import LatentStore
from diffalign.data.plan import Part, SynthPlan
from diffalign.data.prompts import PromptRow
from diffalign.data.sample import Drawn, draw_part, write_planned_groups
from diffalign.data.training_source import TrainingSource, prepare_source
from diffalign.data.writer import write_groups
from diffalign.errors import DiffalignError
from diffalign.stages.train import train
from helpers import tiny
from helpers.small_datasets import LABELS, Encoder, group_rows, picture, quiet, settings, write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three groups of 3, 3 and 2 images with preferences."""
    write_images(tmp_path / "data")
    write_groups(tmp_path / "data", group_rows())
    return tmp_path / "data"


def plan(folder: Path, encoder: Any, **changes: Any) -> CachePlan:
    return plan_cache(settings(**changes), PreferenceDataset(folder), [2, 0, 1], 3, encoder)


def latents(folder: Path, encoder: Any, **changes: Any) -> LatentStore:
    found = plan(folder, encoder, **changes).latents(quiet)
    assert isinstance(found, LatentStore)
    return found


def test_the_cache_holds_what_the_model_encodes(folder: Path) -> None:
    encoder = Encoder()
    values, spread = latents(folder, encoder).batch([2, 0])
    want = np.asarray(picture(11)).astype(np.float64).reshape(2, 8, 2, 8, 3).mean((1, 3)).transpose(2, 0, 1) / 255
    assert values[0, 1].numpy() == pytest.approx(want, abs=1e-3) and spread is None
    assert (values[1, 2] == 0).all()  # group c has two images
    prompts = plan(folder, encoder).embeddings(quiet)
    assert prompts.batch(["prompt a", "prompt c"])["length"].tolist() == [[8.0], [8.0]]
    assert prompts.unconditional["length"].tolist() == [[0.0]]
    assert (encoder.encoded, encoder.texts) == (8, 5)  # three prompts, none, and one to learn the size
    latents(folder, encoder)
    plan(folder, encoder).embeddings(quiet)
    assert (encoder.encoded, encoder.texts) == (8, 5)  # nothing changed, nothing is encoded again


def test_changed_input_has_another_cache(folder: Path) -> None:
    first, prompts = latents(folder, Encoder()).folder, plan(folder, Encoder()).prompt_folder
    assert latents(folder, Encoder("other weights")).folder != first
    assert latents(folder, Encoder(), resolution=8).folder != first
    assert latents(folder, Encoder(), latent_sampling="posterior").folder != first
    assert plan(folder, Encoder(), resolution=8).prompt_folder == prompts  # no prompt is encoded anew
    exact = plan(folder, Encoder(), cache_dtype="float32")
    assert latents(folder, Encoder(), cache_dtype="float32").folder not in (first, exact.prompt_folder)
    assert exact.prompt_folder != prompts
    write_images(folder, changed=(1, 1))
    assert latents(folder, Encoder()).folder != first


def test_a_cache_cut_short_is_continued(folder: Path) -> None:
    class Broken(Encoder):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.encoded > 3:
                raise KeyboardInterrupt
            return super().encode_images(pixels)

    with pytest.raises(KeyboardInterrupt):
        latents(folder, Broken())
    (cut,) = (folder / "cache").iterdir()
    kept = {p.name: p.read_bytes() for p in cut.glob("*.safetensors")}
    assert sorted(kept) == ["00000.safetensors", "00001.safetensors"]
    encoder = Encoder()
    latents(folder, encoder)
    assert encoder.encoded == 3  # the images of the last group
    assert all((cut / name).read_bytes() == data for name, data in kept.items())


def test_two_processes_make_one_cache(folder: Path, tmp_path: Path) -> None:
    class Slow(Encoder):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            with (tmp_path / "log").open("a") as stream:
                stream.write("x" * len(pixels))
            return super().encode_images(pixels)

    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            try:
                latents(folder, Slow())
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert (tmp_path / "log").read_text() == "x" * 8  # each image encoded once


def test_the_chosen_images_alone_are_cached(folder: Path) -> None:
    """Other members, another cache; the same members as all, the same as before they could be chosen."""
    before = latent_key(plan(folder, Encoder()).frames, Encoder())
    write_groups(folder, group_rows(a=[0, 1, 2], b=[0, 1, 2]))
    assert latent_key(plan(folder, Encoder()).frames, Encoder()) == before
    write_groups(folder, group_rows(a=[0, 2]))
    assert latent_key(plan(folder, Encoder()).frames, Encoder()) != before


def test_float32_takes_twice_the_space(folder: Path) -> None:
    small, large = (plan(folder, Encoder(), cache_dtype=dtype).missing() for dtype in (None, "float32"))
    assert [2 * size for size in small.values()] == list(large.values())
    made = plan(folder, Encoder(), cache_dtype="float32")
    made.latents(quiet), made.embeddings(quiet)
    for part in (made.latent_folder, made.prompt_folder):
        with safe_open(part / "00000.safetensors", "pt") as stored:
            assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float32}  # noqa: SIM118


def test_values_beyond_float16_are_refused(folder: Path) -> None:
    class Large(Encoder):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode_images(pixels) + 1e5

    with pytest.raises(DiffalignError, match="latents overflow float16"):
        latents(folder, Large())


def test_a_full_disk_is_seen_before_anything_is_encoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DiffalignError, match=r"data.cache_dir .*needed, 1e-07 GB are free; .*data.cache=off"):
        prepare_source(settings(), LABELS, PreferenceDataset(folder), encoder, quiet)
    assert encoder.encoded == 0 and prepare_source(
        settings(cache="off"), LABELS, PreferenceDataset(folder), encoder, quiet
    )


def test_source_pairs_latents_with_labels(folder: Path) -> None:
    said: list[str] = []
    source = prepare_source(settings(), LABELS, PreferenceDataset(folder), Encoder(), said.append)
    assert source.mask.tolist() == [True, True, True]
    assert any("1 of 3 groups have fewer than 3 images and are trained on with those they have" in s for s in said)
    assert source.rewards[2].isnan().tolist() == [False, False, True]
    batch = source.batch([1, 2])
    assert batch.rewards[0].tolist() == [0.0, 0.5, 1.0] and batch.prompts == ["prompt b", "prompt c"]
    assert torch.equal(batch.latents[0], source.latents.batch([1])[0][0])


# --- the same numbers in every mode ----------------------------------------------------------------------------------


def same(one: TrainingSource, other: TrainingSource, rows: list[int]) -> None:
    a, b = one.batch(rows), other.batch(rows)
    assert torch.equal(a.latents, b.latents) and torch.equal(a.rewards.nan_to_num(-1), b.rewards.nan_to_num(-1))
    assert (a.spread is None) == (b.spread is None)
    assert a.spread is None or (b.spread is not None and torch.equal(a.spread, b.spread) and a.spread.abs().max() > 0)
    for name, value in a.conditioning.items():
        assert torch.equal(value, b.conditioning[name]) and value.dtype == torch.float32
        assert torch.equal(one.unconditional[name], other.unconditional[name])


@pytest.mark.parametrize("model", ["sdxl_dir", "sd3_dir"])
@pytest.mark.parametrize("sampling", ["mean", "posterior"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_modes_agree_to_the_last_bit(
    folder: Path, model: str, sampling: str, dtype: str | None, request: pytest.FixtureRequest
) -> None:
    from diffalign.pipelines import load_backbone

    backbone = load_backbone(request.getfixturevalue(model))
    dataset = PreferenceDataset(folder)
    given = {"resolution": 64, "latent_sampling": sampling, "cache_dtype": dtype}
    sources = [
        prepare_source(settings(cache=mode, **given), LABELS, dataset, backbone, quiet)
        for mode in ("all", "latents", "off")
    ]
    for other in sources[1:]:
        same(sources[0], other, [0, 1])
        same(sources[0], other, [2])
    plain = backbone.encode_prompts(["prompt b", "prompt c", "prompt a"])
    cached = sources[0].batch([1]).conditioning
    rounding = 2**-8 if dtype is None else 1e-6  # bfloat16 keeps 8 bits of the mantissa; a batch's last bits differ
    for name, value in cached.items():
        assert (value[0] - plain[name][0]).abs().max() <= rounding * plain[name][0].abs().max()
    pixels = to_pixels([fit(image.decode(), (64, 64)) for image in dataset.images(sources[0].group_ids[1])])
    want = backbone.encode_posterior(pixels)
    for latent, exact in zip((sources[0].batch([1]).latents, sources[0].batch([1]).spread), want, strict=True):
        if latent is not None:
            off = (latent[0, : len(exact)] - exact).abs().max() / exact.abs().max()
            assert off <= 1e-3 if dtype is None else off == 0


def test_only_zeros_are_left_out(tmp_path: Path, folder: Path) -> None:
    from diffalign.pipelines import load_backbone

    backbone = load_backbone(tiny.sd3(tmp_path / "model", t5=False))
    embeds = backbone.encode_prompts(["a red cube"])["prompt_embeds"]
    source = prepare_source(settings(resolution=64), LABELS, PreferenceDataset(folder), backbone, quiet)
    first = next((folder / "cache").glob("prompts-*/00000.safetensors"))
    # without T5 the tokens after CLIP's are zeros
    assert trimmed(embeds[0]).shape[0] == 16 < embeds.shape[1]
    with safe_open(first, "pt") as stored:
        assert torch.equal(stored.get_tensor("0/prompt_embeds"), trimmed(stored.get_tensor("0/prompt_embeds")))
        assert stored.get_tensor("0/prompt_embeds").numel() == trimmed(embeds[0]).numel()
    assert source.batch([0]).conditioning["prompt_embeds"].shape == embeds.shape
    values = torch.zeros(3, 4)
    assert trimmed(values).shape == (1, 1)
    values[1, 2] = 1.0
    assert torch.equal(trimmed(values), values[:2, :3]) and trimmed(torch.zeros(5)).shape == (5,)


def test_a_run_is_the_same_in_every_mode(folder: Path, tmp_path: Path, sdxl_dir: Path) -> None:
    """Through `diffalign train`: what each mode keeps in memory is what it needs."""
    found = {}
    for mode in ("all", "latents", "off"):
        config = {
            "run_dir": str(tmp_path / mode), "device": "cpu", "model": {"path": str(sdxl_dir)}, "tune": {"rank": 2},
            "data": {"path": str(folder), "resolution": 64, "cache": mode, "latent_sampling": "posterior"},
            "train": {"steps": 2, "groups_per_step": 2, "threads": 1}, "tracking": {"trackers": []},
        }  # fmt: skip
        train(TrainConfig.model_validate(config))
        found[mode] = (tmp_path / mode / "metrics.jsonl").read_bytes()
    assert found["all"] == found["latents"] == found["off"]


# --- latents stored with the images ----------------------------------------------------------------------------------


def draw_with_latents(out: Path, backbone: Any, vaes: list[str]) -> None:
    """Two generators, two images each of two prompts, with their latents; `vaes`: what each says of its VAE."""
    parts = tuple(Part(f"g{n}", 2, 2) for n in range(len(vaes)))
    synth = SynthPlan((PromptRow("a"), PromptRow("b")), parts, 0)

    def draw(prompts: list[str], seeds: list[int]) -> list[Drawn]:
        latent = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
        images = backbone.decode_latents(latent).detach()
        arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Drawn(Image.fromarray(a), z.numpy()) for a, z in zip(arrays, latent, strict=True)]

    for number, vae in enumerate(vaes):
        draw_part(synth, number, out, draw, {"vae": vae}, latents=True)
    write_planned_groups(synth, out)
    dataset = PreferenceDataset(out)
    rows = [dataset.group(i) for i in range(len(dataset))]
    write_groups(out, [{**row, "preference": list(np.linspace(0, 1, 2 * len(vaes)))} for row in rows])


def test_stored_latents_are_taken_as_they_are(sdxl_dir: Path, tmp_path: Path) -> None:
    from diffalign.pipelines import load_backbone

    backbone = load_backbone(sdxl_dir)
    vae = backbone.vae_fingerprint()
    draw_with_latents(tmp_path / "own", backbone, [vae, vae])
    dataset = PreferenceDataset(tmp_path / "own")
    want = torch.randn(
        4, 8, 8, generator=torch.Generator().manual_seed(dataset.images(dataset.column("group_id")[1])[3].seed)
    )
    said: list[str] = []
    source = prepare_source(settings(resolution=64), LABELS, dataset, backbone, said.append)
    assert torch.equal(source.batch([1]).latents[0, 3], want.half().float())
    assert any("8 are those stored with the images" in line and "encoded" not in line for line in said)
    live = prepare_source(settings(resolution=64, cache="off"), LABELS, dataset, backbone, said.append)
    assert torch.equal(live.batch([1]).latents, source.batch([1]).latents)
    posterior = prepare_source(settings(resolution=64, latent_sampling="posterior"), LABELS, dataset, backbone, quiet)
    assert (posterior.batch([0]).spread == 0).all()  # what was drawn is certain


@pytest.mark.parametrize("other", ["vae", "size"])
def test_other_latents_are_not_taken(sdxl_dir: Path, tmp_path: Path, other: str) -> None:
    """A group of which one generator's latents do not fit is encoded whole: else they would tell the generators apart."""
    from diffalign.pipelines import load_backbone

    backbone = load_backbone(sdxl_dir)
    vae = backbone.vae_fingerprint()
    draw_with_latents(tmp_path, backbone, [vae, "another" if other == "vae" else vae])
    said: list[str] = []
    side = 64 if other == "vae" else 32
    source = prepare_source(settings(resolution=side), LABELS, PreferenceDataset(tmp_path), backbone, said.append)
    assert any("0 are those stored with the images, 8 were encoded" in line for line in said)
    assert source.batch([0]).latents.shape == (1, 4, 4, side // 8, side // 8)
