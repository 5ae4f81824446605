"""report.html: one file, without network, in which text from data stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffalign.report
from diffalign.errors import DiffalignError
from diffalign.objectives import OBJECTIVES
from diffalign.report.curves import number, series, smooth, static_svg, ticks, titles
from diffalign.report.images import BYTES, picture_uri
from diffalign.report.render import mark_telling, write_report, write_reports
from diffalign.report.runs import Run, differences, distinct_names, read_run
from helpers.page import Tags
from helpers.run_directory import SCRIPT, make_run


def the_own_script() -> str:
    return (Path(diffalign.report.__file__).parent / "templates" / "charts.js.j2").read_text().strip()


def test_text_stays_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    """The only script is the project's own, whatever stands in prompts, kinds, configs, names of runs and findings."""
    folder = make_run(tmp_path / "<img src=x onerror=alert(2)>", SCRIPT)
    finding = {"name": "x", "step": 3, "level": "alarm", "title": SCRIPT, "means": SCRIPT, "change": SCRIPT}
    (folder / "health.json").write_text(json.dumps([{**finding, "measured": SCRIPT}]))
    html = write_report(folder).read_text()
    page = Tags(html)
    names = [name for name, _ in page.tags]
    assert not set(names) & {"link", "iframe", "object", "embed", "base"}
    assert names.count("script") == 2 and page.scripts[1].strip() == the_own_script()
    assert json.loads(page.scripts[0])["names"] == ["<img src=x onerror=alert(2)>"]
    assert page.text.count(SCRIPT) >= 6  # prompts, kind, finding and config are all there to read
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:image/").startswith("data:image/")
    assert not re.search(r"url\(|@import|https?://", html.replace("http://www.w3.org/2000/svg", ""))
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy  # the browser refuses what slipped past


def test_what_the_report_says(tmp_path: Path) -> None:
    page = Tags(write_report(make_run(tmp_path / "run")).read_text())
    for said in ("40 steps", "3 held-out prompts", "+0.200", "61.0%", "Largest gains", "beta"):
        assert said in page.text, said
    assert "too few prompts (3) for an interval" in page.text and "+0.100 to +0.300" not in page.text
    assert "Nothing found" in page.text
    pictures = [a for name, a in page.tags if name == "img"]
    assert len(pictures) == 2 * 2  # the prompt without a score has no place among gains and losses


def test_a_run_without_evaluation_has_a_report(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "eval.json").unlink()
    page = Tags(write_report(tmp_path).read_text())
    assert "Curves" in page.text and "win rate" not in page.text


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"neither metrics\.jsonl nor eval\.json"):
        write_report(tmp_path)
    with pytest.raises(DiffalignError, match="no such folder"):
        write_report(tmp_path / "nowhere")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(
        DiffalignError, match=r"eval\.json cannot be read \(.*; delete it, and `diffalign eval` writes it again"
    ):
        write_report(tmp_path)


def test_findings_are_worked_out_where_none_were_written(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    rows = [{"step": s, "loss": 0.7, "gradient_factor": 0.01} for s in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = Tags(write_report(folder).read_text())
    assert "The margin is saturated" in page.text and "alarm, step 40" in page.text
    assert json.loads(page.scripts[0])["charts"]["gradient_factor"]["marks"][0]["step"] == 40


def test_runs_side_by_side(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name / "run", seed=n) for n, name in enumerate("abc")]
    page = Tags(write_reports(folders, tmp_path / "all.html").read_text())
    assert distinct_names([read_run(f) for f in folders]) == ["a/run", "b/run", "c/run"]
    assert differences([read_run(f) for f in folders]) == [("seed", ["0", "1", "2"])]
    assert "How the configs differ" in page.text and "3 runs" in page.text
    assert len([a for name, a in page.tags if name == "img"]) == 2 * 4  # base and three runs, two prompts
    lines = json.loads(page.scripts[0])["charts"]["loss"]["lines"]
    assert [line["run"] for line in lines] == [0, 1, 2]


def test_several_runs_begin_with_a_table_of_verdicts(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name / "run") for name in "ab"]
    (folders[1] / "eval.json").unlink()
    (folders[1] / "config.yaml").write_text("train: {steps: 300}\n")
    html = write_reports(folders, tmp_path / "all.html").read_text()
    text = Tags(html).text
    assert html.index("At a glance") < html.index("Largest gains") < html.index("What was run")
    assert "too few prompts to tell" in text and "+0.200" in text
    assert "not evaluated yet" in text and "stopped at step 40 of 300" in text and "not finished" in text


def test_an_unfinished_run_says_so_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "eval.json").unlink()
    (folder / "config.yaml").write_text("train: {steps: 41}\n")
    text = Tags(write_report(folder).read_text()).text
    assert "stopped at step 40 of 41" in text and "Not finished." in text and "Not evaluated yet." in text


def test_the_most_telling_pairs_come_first_and_once() -> None:
    rows = [
        {"kind": kind, "prompt": prompt}
        for kind, prompts in (("best", "aabcd"), ("worst", "bef"))
        for prompt in prompts
    ]
    mark_telling(rows)
    assert [row["prompt"] for row in rows if row["telling"]] == ["a", "b", "e"]  # each of another prompt
    assert all("telling" in row for row in rows)


def test_runs_on_other_prompts_are_not_mixed(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", prompt="two dogs")]
    page = Tags(write_reports(folders, tmp_path / "all.html").read_text())
    assert page.text.count("Base against tuned") == 2 and len([a for n, a in page.tags if n == "img"]) == 2 * 2 * 2


def test_the_validation_strip(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "samples").mkdir()
    steps = range(0, 40, 2)
    for step in steps:
        Image.new("RGB", (128, 16), (step, 0, 0)).save(folder / "samples" / f"step-{step:08d}.png")
    rows = [{"step": s, "scores": {"geneval.dense": [0.5, None, s / 100]}} for s in steps]
    (folder / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = Tags(write_report(folder).read_text())
    shown = [a["alt"] for name, a in page.tags if name == "img" and "step" in (a["alt"] or "")]
    assert len(shown) == 12
    assert shown[0] == "samples at step 0"
    assert shown[-1] == "samples at step 38"
    assert json.loads(page.scripts[0])["charts"]["validation"]["lines"][0]["y"][:2] == [0.25, 0.26]


def test_two_thousand_pictures_stay_under_60_mb() -> None:
    """Noise is the worst picture there is, and even then a picture is bounded: 2,000 x 20 kB x 4 / 3 in base64."""
    rng = np.random.default_rng(0)
    for side in (64, 200, 512, 1024):
        uri = picture_uri(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)))
        assert len(uri) <= BYTES * 4 / 3 + 40
    assert 2000 * (BYTES * 4 / 3 + 40) < 60e6


def test_charts() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert [number(v) for v in (0, 0.69314, 1.2e-5, 400)] == ["0", "0.6931", "1.2e-05", "400"]
    assert smooth([1.0, 1.0, 1.0, 1.0], 3) == pytest.approx([1, 1, 1, 1])

    def loss(*values: float) -> list[dict[str, float]]:
        return [{"step": s, "loss": v} for s, v in enumerate(values)]

    assert series(0, "loss", loss(0.5)) is None
    assert series(0, "loss", loss(0.5, float("nan"), float("inf"))) is None
    assert series(0, "margin", loss(0.5, 0.5)) is None
    flat = series(0, "loss", loss(0.0, 0.0, 0.0))
    assert flat is not None
    assert "nan" not in static_svg("loss", [flat])
    long = series(0, "loss", loss(*np.linspace(0, 1, 4000)))
    assert long is not None
    assert len(long.steps) < 1500
    assert np.mean(long.values) == pytest.approx(0.5, abs=1e-3)


def test_objectives_title_their_own_metrics() -> None:
    ours = titles([])
    assert list(ours)[:3] == ["validation", "loss", "margin"] and list(ours)[-1] == "share_without_preference"
    assert {metric for kind in OBJECTIVES.values() for metric in kind.charts} < set(ours)
    # Two objectives log the same metric: the note is that of the run's own.
    assert titles(["gdro"])["implicit_spread"] == OBJECTIVES["gdro"].charts["implicit_spread"]
    assert titles(["rankdpo", "gdro"])["implicit_spread"] == OBJECTIVES["rankdpo"].charts["implicit_spread"]
    assert titles(["gone"]) == ours


def test_a_rank_is_stated_for_a_lora_only() -> None:
    def labels(kind: str) -> set[str]:
        run = Run(Path(), "r", [], [], [], None, {"tune.kind": kind, "tune.rank": 16})
        return {label for label, _ in run.facts()}

    assert labels("lora") == {"trained", "rank"} and labels("full") == {"trained"}
