"""The dataset folder: what is written is what is read, bad input is named, nothing half-written is ever seen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_card import write_own_card
from diffalign.data.labels import advantages, labels, scaled
from diffalign.data.prompts import PromptRow, hub_prompts, read_prompts, unique_prompts
from diffalign.data.rank import rank
from diffalign.data.sample import image_seed, sample_groups
from diffalign.data.schema import score_schema
from diffalign.data.score import score_images
from diffalign.data.training_source import choose_groups
from diffalign.data.writer import ImageWriter, write_groups
from diffalign.errors import DiffalignError
from diffalign.pipelines.settings import SamplingSettings
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.aggregate import vote_shares
from diffalign.testbed.detector import ShapeDetector
from helpers.small_datasets import picture


def group_row(group: str, prompt: str, preference: list[float], split: str = "train") -> dict[str, Any]:
    row = PromptRow(prompt)
    return {
        "group_id": group,
        "prompt_id": row.prompt_id,
        "prompt": prompt,
        "preference": preference,
        "split": split,
        "metadata": {"tag": "single_object"},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three groups of 3, 3 and 2 images with preferences."""
    out = tmp_path / "data"
    sizes = {"a": 3, "b": 3, "c": 2}
    with ImageWriter(out) as writer:
        for n, (group, size) in enumerate(sizes.items()):
            for k in range(size):
                writer.write(group, k, picture(10 * n + k), "model", 100 + k, {"steps": 5})
    write_groups(out, [group_row(g, f"prompt {g}", list(np.linspace(0, 1, s))) for g, s in sizes.items()])
    return out


class Brightness(Reward):
    """A reward with two columns."""

    name, columns, version, weights, licence = "brightness", ("mean", "half"), "1", "none", "none"
    range = (0.0, 255.0)

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def measure(
        self, images: list[Image.Image], prompts: list[str], facts: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        assert facts and [f["prompt"] for f in facts] == prompts and all(f["tag"] == "single_object" for f in facts)
        self.reasons = [""] * len(images)
        values = torch.tensor([float(np.asarray(i).mean()) for i in images])
        return {"mean": values, "half": values / 2}


# --- writer and reader -----------------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    dataset = PreferenceDataset(folder)
    assert len(dataset) == 3 and dataset.members("c") == [0, 1]
    assert dataset.group(1)["prompt"] == "prompt b" and dataset.group(1)["metadata"] == {"tag": "single_object"}
    images = dataset.images("b")
    assert [(i.index, i.seed, i.generator) for i in images] == [(0, 100, "model"), (1, 101, "model"), (2, 102, "model")]
    assert all(np.array_equal(i.decode(), picture(10 + i.index)) for i in images)
    assert [(r.group_id, r.index) for rows in dataset.iter_images(batch=3) for r in rows] == [
        ("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1),
    ]  # fmt: skip


def test_other_libraries_see_pictures(folder: Path, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(
        "parquet", data_files=str(folder / "images" / "*.parquet"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert isinstance(loaded[0]["image"], Image.Image) and loaded[4]["group_id"] == "b"


def test_equal_images_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with ImageWriter(tmp_path / name) as writer:
            writer.write("a", 0, picture(1), "model", 0, {"b": 1, "a": 2} if name == "one" else {"a": 2, "b": 1})
    one, two = ((tmp_path / n / "images" / "part-00000.parquet").read_bytes() for n in ("one", "two"))
    assert one == two


def test_a_shard_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ImageWriter(tmp_path) as writer:
        writer.write("a", 0, picture(1), "model", 0, {})
        raise RuntimeError
    assert list((tmp_path / "images").iterdir()) == []


def test_the_writer_holds_one_row_group(tmp_path: Path) -> None:
    with ImageWriter(tmp_path) as writer:
        for k in range(300):
            writer.write("a", k, b"x" * 100, "model", k, {})
            assert len(writer.rows) < 64
    assert len(PreferenceDataset.members(_with_group(tmp_path), "a")) == 300


def _with_group(folder: Path) -> PreferenceDataset:
    write_groups(folder, [group_row("a", "p", [])])
    return PreferenceDataset(folder)


def test_group_ids_are_unique(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="'a' occurs twice"):
        write_groups(tmp_path, [group_row("a", "p", []), group_row("a", "q", [])])
    assert not (tmp_path / "groups.parquet").exists()


def test_missing_things_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="does not exist"):
        PreferenceDataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffalignError, match=r"no groups\.parquet"):
        PreferenceDataset(tmp_path / "empty")
    with pytest.raises(DiffalignError, match=r"'test'.*there are \['train'\]"):
        PreferenceDataset(folder).split("test")


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    with ImageWriter(tmp_path) as writer:
        writer.write("a", 0, _png(picture(1))[:200], "model", 0, {})
    with pytest.raises(DiffalignError, match="image 0 of group a cannot be decoded"):
        _with_group(tmp_path).images("a")[0].decode()


def _png(image: Image.Image) -> bytes:
    from diffalign.data.writer import png_bytes

    return png_bytes(image)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.xml", b"a", "unknown kind of file"),
        ("p.csv", b"words,n\na,1\n", r"p\.csv:1: no column 'prompt'; it has words, n"),
        ("p.parquet", b"a", "not a complete parquet file"),
        ("p.jsonl", b'{"prompt": "a"}\n{"x": 1}\n', r'p\.jsonl:2: no "prompt"'),
        ("p.jsonl", b"{nonsense\n", r"p\.jsonl:1: not JSON"),
        ("p.txt", b"caf\xe9", "not UTF-8 at byte 3"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DiffalignError, match=complaint):
        read_prompts(tmp_path / name)


def test_prompts_keep_their_facts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog", "tag": "single_object"}\n\n{"prompt": "a cat"}\n')
    rows = read_prompts(tmp_path / "p.jsonl")
    assert [(r.prompt, r.metadata) for r in rows] == [("a dog", {"tag": "single_object"}), ("a cat", {})]


def test_prompts_come_in_every_form(tmp_path: Path) -> None:
    texts = ["a dog", "a cat, sitting", "a dog"]
    (tmp_path / "p.txt").write_text("".join(f"{t}\n" for t in texts))
    (tmp_path / "ocr").mkdir()
    (tmp_path / "ocr" / "train.txt").write_text("".join(f"{t}\n" for t in texts))
    (tmp_path / "geneval").mkdir()
    (tmp_path / "geneval" / "test_metadata.jsonl").write_text('{"tag": "counting", "prompt": "two dogs"}\n')
    (tmp_path / "p.csv").write_text('Prompt,kind\na dog,x\n"a cat, sitting",y\na dog,z\n')
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"caption": [*texts, None, " "], "n": range(5)}), tmp_path / "hub" / "train.parquet")
    found = [
        read_prompts(tmp_path / "p.txt"),
        read_prompts(tmp_path / "ocr"),
        read_prompts(tmp_path / "p.csv", "Prompt"),
        read_prompts(tmp_path / "hub" / "train.parquet", "caption"),
        hub_prompts(str(tmp_path / "hub"), "caption", "train"),
    ]
    assert [[row.prompt for row in rows] for rows in found] == [texts] * 5
    assert found[2][1].metadata == {"kind": "y"}
    assert read_prompts(tmp_path / "geneval", split="test")[0].metadata == {"tag": "counting"}
    assert [row.prompt for row in unique_prompts(found[0])] == ["a dog", "a cat, sitting"]
    with pytest.raises(DiffalignError, match="no column 'words'; it has caption, n"):
        hub_prompts(str(tmp_path / "hub"), "words", "train")
    with pytest.raises(DiffalignError, match=r"holds neither test_metadata\.jsonl"):
        read_prompts(tmp_path / "ocr", split="test")


# --- sampling --------------------------------------------------------------------------------------------------------


class Painter:
    """A backbone whose images depend on prompt and seed alone."""

    path, revision = "some/painter", None

    def __init__(self, fail_after: int | None = None) -> None:
        self.drawn, self.fail_after = 0, fail_after

    def sample(self, prompts: list[str], seeds: list[int], settings: SamplingSettings) -> list[Image.Image]:
        if self.fail_after is not None and self.drawn >= self.fail_after:
            raise KeyboardInterrupt
        self.drawn += len(prompts)
        return [picture(seed % 2**31 + len(prompt), (8, 8)) for prompt, seed in zip(prompts, seeds, strict=True)]


def draw_dataset(painter: Painter, out: Path, seed: int = 0, batch_size: int = 7, n: int = 70) -> None:
    sample_groups(
        painter,
        [PromptRow(f"prompt {i}") for i in range(n)],
        out,
        images_per_prompt=2,
        seed=seed,
        settings=SamplingSettings(steps=3, guidance_scale=2.0),
        batch_size=batch_size,
    )


def test_sampling_goes_on_where_it_stopped(tmp_path: Path) -> None:
    draw_dataset(Painter(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        draw_dataset(Painter(fail_after=80), tmp_path / "cut")
    rest = Painter()
    draw_dataset(rest, tmp_path / "cut")
    assert rest.drawn == 140 - 84  # twelve batches of seven were complete
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*"))
    assert files and all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "cut" / f).read_bytes() for f in files)
    again = Painter()
    draw_dataset(again, tmp_path / "cut")
    assert again.drawn == 0


def test_images_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    for size in (1, 64):
        draw_dataset(Painter(), tmp_path / str(size), batch_size=size, n=5)
    one, many = (PreferenceDataset(tmp_path / n) for n in ("1", "64"))
    assert [i.data for rows in one.iter_images() for i in rows] == [i.data for rows in many.iter_images() for i in rows]
    seeds = [i.seed for rows in one.iter_images() for i in rows]
    assert len(set(seeds)) == 10 and seeds[0] == image_seed(0, one.column("group_id")[0], 0)


def test_another_plan_does_not_mix_in(tmp_path: Path) -> None:
    draw_dataset(Painter(), tmp_path, n=2)
    with pytest.raises(DiffalignError, match="sampled with seed=0, not 1"):
        draw_dataset(Painter(), tmp_path, seed=1, n=2)
    with pytest.raises(DiffalignError, match="prompts="):
        draw_dataset(Painter(), tmp_path, n=3)


# --- scores and labels -----------------------------------------------------------------------------------------------


def test_scores_are_stored_once(folder: Path) -> None:
    dataset = PreferenceDataset(folder)
    assert score_images(dataset, Brightness(), batch_size=3) == 8
    assert score_images(dataset, Brightness()) == 0
    scores = dataset.scores("brightness")
    assert scores["b", 1] == pytest.approx(float(np.asarray(picture(11)).mean()), rel=1e-6)
    assert dataset.scores("brightness", "half")["b", 1] == pytest.approx(scores["b", 1] / 2, rel=1e-6)
    with pytest.raises(DiffalignError, match="no scores of 'hpsv2'; scored by: brightness"):
        dataset.scores("hpsv2")
    with pytest.raises(DiffalignError, match="no column 'max'; it has mean, half"):
        dataset.scores("brightness", "max")


def test_a_score_file_names_what_really_judged(folder: Path) -> None:
    dataset = PreferenceDataset(folder)
    judges = [load_reward("jpeg_compressibility", quality=50), load_reward("sharpness"), Brightness()]
    for reward in judges:
        score_images(dataset, reward)
    judges.append(load_reward("geneval", detector=ShapeDetector(), threshold=0.25))
    schema = score_schema(judges[-1].columns, judges[-1].provenance())
    pq.write_table(pa.table({name: [] for name in schema.names}, schema), folder / "scores" / "geneval.parquet")
    for reward in judges:
        noted = PreferenceDataset(folder).scored_by(reward.name)
        assert noted == json.loads(json.dumps(reward.provenance()))
        assert (noted["weights"], noted["settings"]) == (reward.weights_id(), reward.options())
    noted = dataset.scored_by("geneval")
    assert noted["weights"] == "the detector ShapeDetector" and "Mask2Former" not in noted["licence"]
    assert noted["settings"]["detector"] == "ShapeDetector" and noted["settings"]["threshold"] == 0.25
    write_own_card(PreferenceDataset(folder))
    card = (folder / "README.md").read_text()
    assert "| jpeg_compressibility | 1 | none | Apache-2.0 (this project) | quality=50, sign=1 |" in card
    assert "| geneval | 2 | the detector ShapeDetector | MIT (the decisions), the detector's own | counting_" in card
    # Another judge under the same name is refused; notes of older versions say too little for that.
    with pytest.raises(DiffalignError, match=r"was scored with settings=\{'quality': 50"):
        score_images(dataset, load_reward("jpeg_compressibility"))
    path = folder / "scores" / "jpeg_compressibility.parquet"
    table = pq.read_table(path)
    for older in ({"version": "1", "weights": "none", "settings": {"options": {}}}, {"version": "1"}, None):
        pq.write_table(table.replace_schema_metadata({"diffalign": json.dumps(older)} if older else None), path)
        assert score_images(dataset, load_reward("jpeg_compressibility")) == 0
    pq.write_table(table.replace_schema_metadata({"diffalign": json.dumps({"version": "0"})}), path)
    with pytest.raises(DiffalignError, match="was scored with version='0'"):
        score_images(dataset, load_reward("jpeg_compressibility"))


def test_a_broken_image_scores_nan_with_its_reason(tmp_path: Path) -> None:
    with ImageWriter(tmp_path) as writer:
        writer.write("a", 0, _png(picture(1))[:150], "model", 0, {})
        writer.write("a", 1, picture(2), "model", 0, {})
    dataset = _with_group(tmp_path)
    score_images(dataset, Brightness())
    scores = dataset.scores("brightness")
    assert np.isnan(scores["a", 0]) and np.isfinite(scores["a", 1])
    table = datasets.Dataset.from_parquet(str(tmp_path / "scores" / "brightness.parquet"), cache_dir=str(tmp_path))
    assert "cannot be decoded" in table[0]["reason"] and table[1]["reason"] == ""


def test_vote_shares() -> None:
    """Five rewards, four images: counted by hand from the strict inequalities."""
    scores = np.array([[3.0, 1, 2, 4], [2, 1, 3, 4], [4, 1, 2, 3], [1, 3, 2, 4], [3, 1, 2, 4]])
    by_hand = [sum(scores[r, i] > scores[r, j] for r in range(5) for j in range(4) if j != i) / 15 for i in range(4)]
    assert vote_shares(scores) == pytest.approx(by_hand)
    assert vote_shares(np.exp(scores / 7)) == pytest.approx(by_hand)
    # A tie gives nobody a vote and stays in the denominator; a NaN leaves it.
    assert vote_shares(np.array([[1.0, 1.0, 0.0]])) == pytest.approx([0.5, 0.5, 0.0])
    assert vote_shares(np.array([[1.0, np.nan, 0.0]])) == pytest.approx([1.0, np.nan, 0.0], nan_ok=True)


def test_ranking_and_its_control(folder: Path) -> None:
    dataset = PreferenceDataset(folder)
    score_images(dataset, Brightness())
    rank(dataset, ["brightness"])
    ranked = PreferenceDataset(folder)
    for i, group in enumerate(("a", "b", "c")):
        values = np.array([dataset.scores("brightness")[group, k] for k in dataset.members(group)])
        assert np.array_equal(np.argsort(ranked.group(i)["preference"]), np.argsort(values))
    shares = ranked.column("preference")
    rank(ranked, ["brightness"], shuffle_seed=1)
    shuffled = PreferenceDataset(folder).column("preference")
    assert shuffled != shares and [sorted(s) for s in shuffled] == [sorted(s) for s in shares]


def test_advantages_of_ties_and_of_images_without_a_score() -> None:
    raw = [np.array([0.3, 0.3, np.nan]), np.array([0.1, np.nan, 0.9]), np.array([0.0] * 70 + [1.0])]
    tied, gap, outlier = advantages(raw, None)
    assert tied[:2].tolist() == [0.0, 0.0] and np.isnan(tied[2])
    assert gap[[0, 2]] == pytest.approx([-0.4 / 0.4001, 0.4 / 0.4001]) and np.isnan(gap[1])
    assert outlier[-1] == 5.0
    assert scaled(raw, "optimality", {})[2][-1] == 1.0 and scaled(raw, "optimality", {})[0][0] == 0.5


def test_labels(folder: Path) -> None:
    dataset = PreferenceDataset(folder)
    score_images(dataset, Brightness())
    scores = dataset.scores("brightness")
    raw = [np.array([scores[g, k] for k in dataset.members(g)]) for g in ("a", "b", "c")]
    flat = np.concatenate(raw)
    for got, want in zip(labels(dataset, [0, 1, 2], "scores.brightness.mean", "zscore"), raw, strict=True):
        assert got == pytest.approx((want - flat.mean()) / flat.std())
    stats = {"min": 0.0, "max": 255.0}
    for got, want in zip(labels(dataset, [0, 1, 2], "scores.brightness", "minmax", stats), raw, strict=True):
        assert got == pytest.approx(want / 255)
    assert labels(dataset, [2], "scores.brightness", "votes")[0].sum() == 1.0
    deviation = np.concatenate(raw).std()
    whole, own = (labels(dataset, [0, 1, 2], "scores.brightness", "advantage", None, s) for s in ("dataset", "group"))
    for at, values in enumerate(raw):
        assert whole[at] == pytest.approx((values - values.mean()) / (deviation + 1e-4))
        assert own[at] == pytest.approx((values - values.mean()) / (values.std() + 1e-4))
    shared = labels(dataset, [2], "scores.brightness", "optimality", {"std": 0.01})[0]
    assert shared == pytest.approx(np.clip((raw[2] - raw[2].mean()) / 0.0101 / 10 + 0.5, 0, 1))
    assert labels(dataset, [2])[0] == pytest.approx([0, 1])


def test_unranked_groups_are_refused(tmp_path: Path) -> None:
    draw_dataset(Painter(), tmp_path, n=2)
    with pytest.raises(DiffalignError, match="2 images and 0 preferences; rank the dataset first"):
        labels(PreferenceDataset(tmp_path), [0])


def test_a_group_of_one_image_is_refused(tmp_path: Path) -> None:
    with ImageWriter(tmp_path) as writer:
        writer.write("a", 0, picture(1), "model", 0, {})
    with pytest.raises(DiffalignError, match="has 1 image; a preference needs at least two"):
        choose_groups(SimpleNamespace(split="train", group_size=None, limit=None), _with_group(tmp_path))
