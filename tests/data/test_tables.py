"""One reader of tables: any delimiter, byte order marks, the names that columns have, and one bad row costs one row."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from diffalign.data.convert import import_pairs, open_rows
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.imported import write_imported
from diffalign.data.prompts import read_prompts
from diffalign.data.prompts_beside import prompt_beside, prompt_within
from diffalign.data.tables import read_rows, table_rows
from diffalign.errors import DiffalignError
from diffalign.files.paths import FOLLOW_LINKS
from helpers import pictures

ODD = [
    "a cat",
    "with, comma",
    'with "quotes"',
    "a\u2028b",
    "a\x85b",
    "größe 大 🐈",
    "x" * 200_000,
    "two\nlines",
    "nul \0",
]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for side, value in (("win", 1), ("lose", 2)):
        (tmp_path / side).mkdir()
        Image.new("RGB", (16, 16), (value, value, value)).save(tmp_path / side / "x.png")
    return tmp_path


def as_csv(delimiter: str, rows: list[list[str]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows(rows)
    return stream.getvalue()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_delimiters_and_encodings(own: Path, delimiter: str, encoding: str) -> None:
    rows = [["Prompt", " Winner", "LOSER "], *([p, "win/x.png", "lose/x.png"] for p in ODD)]
    (own / "p.csv").write_bytes(as_csv(delimiter, rows).encode(encoding))
    import_pairs([own / "p.csv"], own / "out")
    assert PreferenceDataset(own / "out").column("prompt") == [p.strip() for p in ODD]


@pytest.mark.parametrize(
    "head", ["caption,chosen,rejected", "text,preferred,loser", "prompt, winner, loser", "Text,image_w,image_l"]
)
def test_names_of_columns(own: Path, head: str) -> None:
    (own / "p.csv").write_text(f"{head}\na cat, win/x.png, lose/x.png\n")
    import_pairs([own / "p.csv"], own / "out")
    assert PreferenceDataset(own / "out").column("prompt") == ["a cat"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.tsv", "t.parquet", "t.jsonl.gz", "t.csv.gz"])
def test_kinds_of_tables(tmp_path: Path, name: str) -> None:
    rows = [{"file_name": f"{i}.png", "text": prompt} for i, prompt in enumerate(ODD)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        text = lines if ".jsonl" in name else json.dumps(rows) if ".json" in name else ""
        cells = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
        data = (text or as_csv("\t" if ".tsv" in name else ",", cells)).encode("utf-8-sig")
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row for _, row in read_rows(path)] == rows


def test_one_bad_row_costs_one_row(tmp_path: Path) -> None:
    good = '{"prompt": "fine"}'
    lines = [
        good,
        "{nonsense",
        '{"prompt": "\\ud800 alone"}',
        "[1]",
        "null",
        '{"n": ' + "9" * 400 + "}",
        "[" * 10**5,
        good,
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    rows = [row for _, row in table_rows(tmp_path / "t.jsonl")]
    assert [isinstance(row, dict) for row in rows] == [True, False, True, False, False, True, False, True]
    assert rows[2] == {"prompt": "\\ud800 alone"}
    (tmp_path / "t.csv").write_text('prompt,n\nfine,1\na, b,2\n"bad"x,3\n"nul \0",4\nfine,5\nshort\n')
    rows = [row for _, row in table_rows(tmp_path / "t.csv")]
    assert [isinstance(row, dict) for row in rows] == [True, False, False, True, True, True]
    assert "3 cells for 2 columns" in rows[1]
    with pytest.raises(DiffalignError, match=r"t\.csv:3: 3 cells for 2 columns"):
        list(read_rows(tmp_path / "t.csv"))


def test_a_damaged_row_group_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"prompt": [f"prompt number {i}" for i in range(40)]})
    pq.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False, write_page_checksum=True)
    where = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset + 40
    data = bytearray(path.read_bytes())
    data[where : where + 8] = b"\xff" * 8
    path.write_bytes(data)
    rows = list(table_rows(path))
    bad = [(place, row) for place, row in rows if isinstance(row, str)]
    assert len(bad) == 1 and "row 10" in bad[0][0]
    assert [r["prompt"] for _, r in rows if isinstance(r, dict)] == [
        f"prompt number {i}" for i in range(40) if i // 10 != 1
    ]


@pytest.mark.parametrize("data", [b"\x1f\x8b\x08", b"no gzip at all", gzip.compress(b"prompt\n" * 99)[:-12]])
def test_broken_gzip_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.csv.gz").write_bytes(data)
    with pytest.raises(DiffalignError, match=r"t\.csv\.gz: "):
        list(read_rows(tmp_path / "t.csv.gz"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompt_files(tmp_path: Path, encoding: str) -> None:
    prompts = ["a cat", "a\u2028b", "a\x85b", "form\x0cfeed"]
    (tmp_path / "p.txt").write_bytes("\r\n".join(prompts).encode(encoding))
    (tmp_path / "p.jsonl").write_bytes(
        "\n".join(json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts).encode(encoding)
    )
    (tmp_path / "p.csv").write_bytes(
        as_csv(";", [["n", "prompt"], *([str(i), p] for i, p in enumerate(prompts))]).encode(encoding)
    )
    for name in ("p.txt", "p.jsonl", "p.csv"):
        assert [row.prompt for row in read_prompts(tmp_path / name)] == prompts, name


def test_links_to_a_store_are_read_and_names_that_lead_out_are_not(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    (own / "set").mkdir()
    for side in ("win", "lose"):
        (own / "set" / f"{side}.png").symlink_to(own / side / "x.png")
    (own / "set" / "p.csv").write_text(
        f"prompt,winner,loser\na,win.png,lose.png\nb,./win.png,{own}/set/lose.png\nc,../win/x.png,lose.png\n"
        f"d,{own}/win/x.png,lose.png\ne,x/../../win/x.png,lose.png\n"
    )
    report = write_imported(open_rows([own / "set" / "p.csv"], None)[1], own / "out")
    assert PreferenceDataset(own / "out").column("prompt") == ["a", "b"]
    assert [fault.reason.split(" folder")[0][-10:] for fault in report.faults] == ["leaves its"] * 3


# --- prompts beside and within images ------------------------------------------------------------------------------

A1111 = "a red (cat:1.2), <lora:x:1>\nsecond line\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Seed: 1"
GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 1, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0]},
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red cat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly", "clip": ["4", 1]}},
}
FLUX = {
    "13": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["22", 0], "sampler": ["16", 0]}},
    "16": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "22": {"class_type": "BasicGuider", "inputs": {"model": ["1", 0], "conditioning": ["26", 0]}},
    "26": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["40", 0], "clip": ["11", 0]}},
    "40": {"class_type": "PrimitiveString", "inputs": {"value": "a red cat"}},
}
LOOP = {"3": {"class_type": "KSampler", "inputs": {"positive": ["3", 0], "negative": ["9", 0]}}}


@pytest.mark.parametrize(
    ("key", "text", "prompt"),
    [
        ("parameters", A1111, "a red (cat:1.2), <lora:x:1>\nsecond line"),
        ("parameters", "größe 大\nSteps: 3, Seed: 1", "größe 大"),
        ("parameters", "Negative prompt: dog\nSteps: 20", None),
        ("parameters", json.dumps({"prompt": "a red cat", "negative_prompt": "x"}), "a red cat"),
        ("parameters", json.dumps({"Prompt": "a red cat"}), "a red cat"),
        ("prompt", json.dumps(GRAPH), "a red cat"),
        ("prompt", json.dumps(FLUX), "a red cat"),
        ("prompt", json.dumps(LOOP), None),
        ("prompt", '{"1": 3}', None),
        ("prompt", "{broken", None),
        ("invokeai_metadata", json.dumps({"positive_prompt": "a red cat", "seed": 1}), "a red cat"),
    ],
)
@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
def test_prompts_that_generators_write(tmp_path: Path, key: str, text: str, prompt: str | None, kind: str) -> None:
    info = PngImagePlugin.PngInfo()
    if kind == "iTXt":
        info.add_itxt(key, text, zip=True)
    elif kind == "tEXt":
        info.add(b"tEXt", key.encode() + b"\0" + text.encode())  # as A1111 does, in spite of the specification
    else:
        info.add_text(key, text.encode("latin-1", "replace").decode("latin-1"), zip=True)
    pictures.smooth(1).save(tmp_path / "a.png", pnginfo=info)
    if prompt and kind == "zTXt":
        prompt = prompt.encode("latin-1", "replace").decode("latin-1")
    assert prompt_within(tmp_path / "a.png") == prompt


@pytest.mark.parametrize("kind", ["jpg", "webp"])
@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_prompts_in_photos(tmp_path: Path, kind: str, order: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode(order)
    pictures.smooth(1).save(tmp_path / f"a.{kind}", exif=exif)
    assert prompt_within(tmp_path / f"a.{kind}") == A1111.split("\nNegative")[0]


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.txt", b"\xef\xbb\xbfa cat\n", ("a cat", "")),
        ("a.txt", "a cat".encode("utf-16"), ("a cat", "")),
        ("a.caption", b"a cat", ("a cat", "")),
        ("a.json", b'{"caption": "a cat", "url": "x"}', ("a cat", "")),
        ("a.json", b'{"url": "x"}', (None, "")),
        ("a.txt", "größe".encode("latin-1"), (None, "a.txt: not UTF-8 at byte 2; save it as UTF-8")),
        ("a.json", b"{", (None, "a.json: Expecting property name")),
    ],
)
def test_files_beside_an_image(tmp_path: Path, name: str, data: bytes, found: tuple[str | None, str]) -> None:
    (tmp_path / name).write_bytes(data)
    prompt, fault = prompt_beside(tmp_path / "a.png")
    assert prompt == found[0]
    assert fault.startswith(found[1]) and bool(fault) == bool(found[1])
