"""`diffalign bench` whole, on the embedded world and on suites from the disk in their authors' layouts."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.bench.results import read_results
from diffalign.config import bench_config
from diffalign.errors import DiffalignError
from diffalign.stages import bench as stage
from helpers.command_line import refused, run
from helpers.tiny_vlm import qwen_folder

FAST = ("steps=1", "batch_size=32", "device=cpu")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def data(folder: Path) -> Path:
    """Two suites from the disk: GenEval 2 as in a clone, and the HPSv2 benchmark with one prompt twice."""
    (folder / "geneval2").mkdir(parents=True)
    rows = [
        {"prompt": f"{n} red circles", "atom_count": 2, "vqa_list": [["How many circles are in the image?", n],
         ["Are the circles red?", "Yes"]], "skills": ["count", "attribute"]}
        for n in ("two", "three")
    ]  # fmt: skip
    (folder / "geneval2" / "geneval2_data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "hpsv2").mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / "hpsv2" / f"{style}.json").write_text(json.dumps(["a red circle", "a red circle"]))
    return folder


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of shapes-sd3 on 8 prompts of the embedded world, seed 0."""
    out = tmp_path_factory.mktemp("bench") / "a"
    assert run("bench", "shapes-sd3", "-t", "shapes", "-n", "8", f"out={out}", *FAST) == 0
    return out


def test_the_embedded_world(judged: Path) -> None:
    results = read_results(judged)
    suite = results["suites"]["shapes-n8"]
    assert suite["images"] == 32 and suite["prompts"] == 8 and suite["published"] == 256
    assert suite["notes"] == ["8 of 256 prompts: this is not the published protocol"]
    assert suite["judges"]["geneval"]["options"]["detector"] == "ShapeDetector" and suite["versions"]["diffalign"]
    rows = [json.loads(line) for line in (judged / "shapes-n8" / "judged-geneval.jsonl").read_text().splitlines()]
    assert suite["scores"]["correct images"]["value"] == pytest.approx(
        sum(row["geneval.official"] for row in rows) / 32
    )
    assert results["sampling"]["steps"] == 1 and results["model"]["path"] == "shapes-sd3"
    page = (judged / "bench.html").read_text()
    assert "95% interval" in page and "correct prompts" in page
    sources = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert [Image.open(io.BytesIO(base64.b64decode(one))).size for one in sources] == [(64, 64)] * 8


def test_the_same_command_resumes(judged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(judged)
    (judged / "bench.json").unlink()
    assert run("bench", "shapes-sd3", "-t", "shapes", "-n", "8", f"out={judged}", *FAST) == 0
    assert files(judged) == before
    shown = capsys.readouterr()
    assert max(len(line) for line in shown.out.splitlines() if "results:" not in line) <= 80, shown.out
    assert "overall" in shown.out and "8 of 256 prompts" in shown.out


def test_suites_from_the_disk(judged: Path, tmp_path: Path) -> None:
    """Added to results that are there; with a judge of random weights, and one that is replaced."""
    before = read_results(judged)["suites"]["shapes-n8"]
    vlm = qwen_folder(tmp_path / "vlm", "qwen3_vl")
    given = ("-j", f"vqa:weights={vlm}", "-j", "hpsv2=sharpness", "--data", data(tmp_path / "data"))
    assert run("bench", "shapes-sd3", "-t", "geneval2,hpsv2", f"out={judged}", *given, *FAST) == 0
    found = read_results(judged)["suites"]
    assert list(found) == ["shapes-n8", "geneval2", "hpsv2"] and found["shapes-n8"] == before
    assert {"Soft-TIFA GM", "Soft-TIFA AM", "count", "attribute", "atoms 2"} == set(found["geneval2"]["scores"])
    rows = [json.loads(line) for line in (judged / "geneval2" / "judged-vqa.jsonl").read_text().splitlines()]
    assert found["geneval2"]["scores"]["Soft-TIFA AM"]["value"] == pytest.approx(50 * sum(row["vqa"] for row in rows))
    assert found["geneval2"]["notes"] == [
        f"{tmp_path}/data/geneval2/geneval2_data.jsonl has 2 prompts, the published suite 800"
    ]
    # Prompts that are there twice are drawn twice, with other noise.
    assert found["hpsv2"]["prompts"] == 8 and found["hpsv2"]["judges"]["hpsv2"]["reward"] == "sharpness"
    scores = [json.loads(line)["hpsv2"] for line in (judged / "hpsv2" / "judged-hpsv2.jsonl").read_text().splitlines()]
    assert len(set(scores)) == 8


def test_compare(judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B: the same images, all of them correct, said to be drawn with another seed."""
    other = tmp_path / "b"
    other.mkdir()
    changed: dict[str, Any] = json.loads((judged / "bench.json").read_text())
    changed["sampling"]["seed"] = 1
    changed["suites"] = {"shapes-n8": changed["suites"]["shapes-n8"]}
    scores = changed["suites"]["shapes-n8"]["scores"]
    before = scores["correct images"]["value"]
    scores["correct images"]["cells"] = [[p, kind, n, n] for p, kind, _, n in scores["correct images"]["cells"]]
    (other / "bench.json").write_text(json.dumps(changed))
    assert run("bench", "compare", judged / "bench.json", other) == 0
    shown = capsys.readouterr().out
    assert f"{1 - before:+.4f}" in shown and "sampled otherwise: seed: A 0, B 1" in shown
    assert "+0.0000 to +0.0000" in shown  # all other scores are equal
    changed["suites"]["shapes-n8"]["judges"]["geneval"]["version"] = "1"
    (other / "bench.json").write_text(json.dumps(changed))
    assert "another judge (geneval.version: '2' and '1')" in refused(capsys, "bench", "compare", judged, other)
    changed["suites"]["shapes-n8"]["digest"] = "other"
    (other / "bench.json").write_text(json.dumps(changed))
    assert "shapes-n8 cannot be compared: other prompts (8 and 8)" in refused(capsys, "bench", "compare", judged, other)
    changed["suites"] = {}
    (other / "bench.json").write_text(json.dumps(changed))
    assert "there is no suite that both have" in refused(capsys, "bench", "compare", judged, other)
    (other / "bench.json").write_text('{"model": {}, "sampling": {}, "suites": {"x": {}}}')
    assert "give a bench.json that `diffalign bench` wrote" in refused(capsys, "bench", "compare", judged, other)


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nothing"
    arguments = ("-t", "shapes,hpsv2", "--data", data(tmp_path / "data"), "-n", "3", "--dry-run")
    assert run("bench", "shapes-sd3", *arguments, f"out={out}") == 0
    shown = capsys.readouterr().out
    for words in ("12: 3 prompts x 4", "15 in all", "# GenEval on the embedded world (shapes-n3)", "judge hpsv2: ",
                  "not the published protocol", "deviation 1: "):  # fmt: skip
        assert words in shown, words
    assert not out.exists()


def test_what_is_refused_before_anything_is_drawn(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "open_drawing", lambda config: pytest.fail("the model was loaded"))
    out = f"out={tmp_path / 'no'}"

    def said(*arguments: object) -> str:
        return refused(capsys, "bench", "shapes-sd3", *arguments, out)

    assert "did you mean geneval" in said("-t", "genevl")
    assert "prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval" in said("-t", "geneval")
    assert "leave the path out" in said("-t", f"shapes:{tmp_path}")
    assert "shapes is named twice" in said("-t", "shapes,shapes")
    assert "none of these suites has such a judge; there are geneval" in said("-t", "shapes", "-j", "hpsv2:release=2.0")
    assert "needs its column official, which it has not" in said("-t", "shapes", "-j", "geneval=sharpness")
    assert "name a suite" in said("-t", ",")
    assert "does not exist" in said("-t", f"geneval2:{tmp_path / 'gone.jsonl'}")
    lines = tmp_path / "lines.txt"
    lines.write_text("a red circle\n")
    assert "geneval cannot judge 'a red circle': no GenEval metadata" in said("-t", f"geneval:{lines}")
    assert "weights gone: no such folder" in said("-t", "shapes", "weights=gone")
    assert refused(capsys, "bench", "shapes-sd3", "-t", "shapes", "stpes=3", out).startswith("error: ")


def test_results_of_another_model_are_kept(judged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (judged / "bench.json").read_bytes()
    error = refused(capsys, "bench", "shapes-sd3", "-t", "shapes", "-n", "9", f"out={judged}", "seed=7", *FAST)
    assert "sampling.seed=0, not 7; choose another out" in error
    assert (judged / "bench.json").read_bytes() == before
    assert not (judged / "shapes-n9").exists()
    error = refused(capsys, "bench", "shapes-sdxl", "-t", "shapes", "-n", "9", f"out={judged}", *FAST)
    assert "model.path='shapes-sd3', not 'shapes-sdxl'" in error and not (judged / "shapes-n9").exists()


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "suites") == 0
    shown = capsys.readouterr().out
    assert "unigenbench" in shown and "geneval2_data.jsonl" in shown


def test_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "kind: train\nmodel: {path: shapes-sd3, options: {max_sequence_length: 12}}\n"
    )
    config = bench_config(str(tmp_path), ["steps=3"])
    assert config.weights == tmp_path / "weights" and config.out == tmp_path / "bench" and config.steps == 3
    assert config.model.options == {"max_sequence_length": 12}
    assert bench_config("owner/some-model").out == Path("runs/bench-some-model")
    with pytest.raises(DiffalignError, match="a run of `diffalign judge`"):
        (tmp_path / "config.yaml").write_text("kind: judge\n")
        bench_config(str(tmp_path))
