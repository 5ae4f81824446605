"""`noise: tracked`: images drawn by `sample` train at the noise that made them; others are counted and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffalign.config import TrainConfig, load_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_summary import summarise_dataset
from diffalign.data.score import score_images
from diffalign.data.tracked_noise import NOT_STATED, noise_words, tracked_seeds
from diffalign.data.training_source import prepare_source
from diffalign.errors import DiffalignError
from diffalign.objectives import DiffusionDPO
from diffalign.pipelines import load_backbone
from diffalign.rewards import load_reward
from diffalign.training.preference import step as steps
from diffalign.training.preference.draws import make_draws
from helpers.command_line import run

SHAPE = (16, 4, 4)


def drawn(folder: Path, model: Path, latents: bool, family: str) -> None:
    (folder / "p.txt").write_text("a dog\na cat\n")
    config = folder / f"{latents}.yaml"
    config.write_text(
        f"device: cpu\nmodel: {{path: {model}}}\nprompts: {folder / 'p.txt'}\nout: {folder / str(latents)}\nsteps: 2\n"
        f"height: 32\nwidth: 32\nimages_per_prompt: 3\nbatch_size: 3\nlatents: {str(latents).lower()}\n"
    )
    assert run("sample", config) == 0
    score_images(PreferenceDataset(folder / str(latents)), load_reward("sharpness"))


def config_of(data: Path, model: Path, run_dir: Path) -> TrainConfig:
    return load_config(
        "shapes_sd3_dpo",
        [
            f"run_dir={run_dir}", f"model={{path: {model}}}", f"data={{path: {data}, resolution: 32}}", "noise=tracked",
            "labels.source=scores.sharpness", "train={steps: 2, groups_per_step: 2, threads: 1}", "tracking.trackers=[]",
            "tune.rank=4",
        ],
    )  # fmt: skip


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_images_are_noised_with_what_made_them(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flow and epsilon: x_t = a(t) x0 + s(t) noise of the seed that the folder states, drawn by torch alone."""
    model = request.getfixturevalue(f"{family}_dir")
    for latents in (False, True):
        drawn(tmp_path, model, latents, family)
    backbone, data = load_backbone(model), tmp_path / "True"
    dataset = PreferenceDataset(data)
    assert summarise_dataset(dataset)["noise"] == "known for 6 of 6 images"
    config = config_of(data, model, tmp_path / "run")
    said: list[str] = []
    source = prepare_source(config.data, config.labels, dataset, backbone, said.append, tracked=True)
    assert any("6 are those stored with the images" in line for line in said)
    batch = source.batch([1, 0])
    draws = make_draws(config, backbone.process, 0, [0, 1], batch.group_ids, batch.latents.shape, None, batch.seeds)
    seen: list[torch.Tensor] = []
    predict = backbone.predict
    monkeypatch.setattr(backbone, "predict", lambda x, *rest, **more: (seen.append(x), predict(x, *rest, **more))[1])
    backbone.add_lora(4, 4.0)
    steps.preference_step(config, DiffusionDPO(), backbone, batch, draws, source.unconditional, None)

    # ---- The same from the files, with torch and numpy ----
    ids = dataset.column("group_id")
    chosen = steps.used_members(DiffusionDPO(), batch.rewards, draws)
    wanted = []
    for at, group in enumerate((ids[1], ids[0])):
        t = draws.times[at]
        a, s = (float(c) for c in backbone.process.coefficients(t[None]))
        for k in chosen[at].tolist():
            image = dataset.images(group)[k]
            noise = torch.randn(batch.latents.shape[2:], generator=torch.Generator().manual_seed(image.seed))
            wanted.append(a * batch.latents[at, k] + s * noise)
    torch.testing.assert_close(seen[0], torch.stack(wanted), rtol=1e-5, atol=1e-6)

    # ---- The latents are the sampler's own: the same command without them encodes the pictures ----
    plain = PreferenceDataset(tmp_path / "False")
    encoded = prepare_source(config.data, config.labels, plain, backbone, lambda _: None, tracked=True).batch([1, 0])
    assert torch.equal(encoded.seeds, batch.seeds) and not torch.allclose(encoded.latents, batch.latents, atol=1e-3)


def test_it_trains_and_what_is_not_known_is_refused(
    sd3_dir: Path, sd15_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn(tmp_path, sd3_dir, False, "sd3")
    data, run_dir = tmp_path / "False", tmp_path / "run"
    common = [
        f"run_dir={run_dir}", f"data={{path: {data}, resolution: 32}}", "noise=tracked", "labels.source=scores.sharpness",
        "train={steps: 2, groups_per_step: 2, threads: 1}", "objective.beta_end=0.5", "tracking.trackers=[]", "tune.rank=4",
    ]  # fmt: skip
    assert run("train", "shapes_sd3_dpo", f"model={{path: {sd3_dir}}}", *common) == 0
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert [row["beta"] for row in rows] == pytest.approx([100.0, 50.0])
    capsys.readouterr()

    # ---- Another model, another size ----
    assert run("train", "shapes_sd3_dpo", f"model={{path: {sd15_dir}}}", *common, f"run_dir={tmp_path / 'b'}") == 2
    assert "it is of the family sd3, and the model of sd15" in capsys.readouterr().err
    smaller = f"data={{path: {data}, resolution: 16}}"
    assert (
        run("train", "shapes_sd3_dpo", f"model={{path: {sd3_dir}}}", *common, f"run_dir={tmp_path / 'c'}", smaller) == 2
    )
    assert "data.resolution is another one" in capsys.readouterr().err
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()

    # ---- A picture from elsewhere, and one whose sampler drew more ----
    (shard,) = (data / "images").glob("*.parquet")
    table = pq.read_table(shard)
    texts = table["provenance"].to_pylist()
    other = json.loads(texts[1])
    other["noise"] |= {"exact": False, "reason": "DDPMScheduler draws noise in its steps"}
    texts[:2] = ["{}", json.dumps(other)]
    place = table.schema.get_field_index("provenance")
    pq.write_table(table.set_column(place, "provenance", pa.array(texts)), shard)
    dataset = PreferenceDataset(data)
    words = noise_words(dataset)
    assert words.startswith("known for 4 of 6 images; 1: ") and NOT_STATED in words and "1: DDPMScheduler" in words
    rows_of = list(range(len(dataset)))
    with pytest.raises(DiffalignError, match=r"the noise of 2 images in .* is of no use \(1: .*set noise=shared"):
        tracked_seeds(dataset, rows_of, 3, "sd3", [SHAPE, SHAPE])
