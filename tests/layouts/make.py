"""Small folders and files in the layouts that people have, broken ones too. `python tests/layouts/make.py FOLDER` writes
them all.

A layout is a description, its files by path, and what a command is given: paths in the folder, "" for the folder.
"""

# ruff: noqa: E501 (a layout a line reads best)

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin


@dataclass(frozen=True)
class Link:
    """A symbolic link to a path in the same folder."""

    target: str


Files = Mapping[str, bytes | Link]


@dataclass(frozen=True)
class Layout:
    what: str
    files: Files
    given: tuple[str, ...] = ("",)


def image(seed: int, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((32, 24)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


A, B, C = image(1), image(2), image(3)
PAIR = {"a.png": A, "b.png": B}


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image(1, "JPEG", exif=exif)


def with_text(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text, zip=len(text) > 1000)
    return image(1, pnginfo=info)


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def table(*rows: list[str], mark: str = ",", encoding: str = "utf-8") -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter=mark).writerows(rows)
    return stream.getvalue().encode(encoding)


def parquet(*rows: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), stream)
    return stream.getvalue()


def arrow(*rows: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    made = pa.Table.from_pylist(list(rows))
    with pa.ipc.new_stream(stream, made.schema) as writer:
        writer.write_table(made)
    return stream.getvalue()


def saved(*rows: dict[str, Any], images: tuple[str, ...]) -> Files:
    """What `save_to_disk` of the datasets library writes."""
    made = datasets.Dataset.from_list(list(rows))
    for name in images:
        made = made.cast_column(name, datasets.Image())
    with tempfile.TemporaryDirectory() as folder:
        made.save_to_disk(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def tar(files: Mapping[str, bytes], mode: Literal["w", "w:gz", "w:xz"] = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def cell(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


HEAD = ["prompt", "winner", "loser"]
ROW = ["a cat", "a.png", "b.png"]
GRAPH = {"1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0]}}, "2": {"class_type": "CLIPTextEncode",
         "inputs": {"text": "a cat"}}}  # fmt: skip
FACTS = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}
FOLDER_ROWS = lines(
    {"file_name": "a.png", "text": "a cat", "score": 2}, {"file_name": "b.png", "text": "a cat", "score": 1}
)
STRIP = Image.new("RGB", (6000, 2), (9, 9, 9))

LAYOUTS: dict[str, Layout] = {
    "loose": Layout("images without any prompt", PAIR),
    "txt": Layout("`.txt` beside the images", {**PAIR, "a.txt": b"a cat", "b.txt": b"a dog"}),
    "txt-bom": Layout("`.txt` with a byte order mark, and in UTF-16",
                      {**PAIR, "a.txt": b"\xef\xbb\xbfa cat", "b.txt": "a dog".encode("utf-16")}),
    "txt-latin1": Layout("`.txt` in Latin-1", {"a.png": A, "a.txt": "größe".encode("latin-1")}),
    "caption": Layout("kohya's `.caption`", {**PAIR, "a.caption": b"a cat", "b.caption": b"a dog"}),
    "img2dataset": Layout("img2dataset's `files`: `.json` beside the images, a parquet file of statistics",
                          {"0/a.jpg": image(1, "JPEG"), "0/a.json": lines({"caption": "a cat", "url": "x"}),
                           "0.parquet": parquet({"url": "x", "caption": "a cat"})}),
    "a1111": Layout("A1111's parameters in PNG", {"a.png": with_text(parameters="a cat\nSteps: 20, Seed: 1")}),
    "comfyui": Layout("ComfyUI's graph in PNG", {"a.png": with_text(prompt=json.dumps(GRAPH))}),
    "fooocus": Layout("Fooocus' JSON in PNG", {"a.png": with_text(parameters=json.dumps({"prompt": "a cat"}))}),
    "workflow": Layout("a PNG with 2 MB of compressed text", {"a.png": with_text(workflow="x" * 2_000_000)}),
    "imagefolder": Layout("imagefolder, metadata beside the images",
                          {**PAIR, "metadata.jsonl": lines({"file_name": "a.png", "text": "a cat", "score": 2},
                                                           {"file_name": "b.png", "text": "a cat", "score": 1})}),
    "imagefolder-root": Layout("imagefolder, metadata at the root and images below",
                               {"images/a.png": A, "images/b.png": B,
                                "metadata.csv": table(["file_name", "text", "score"], ["images/a.png", "a cat", "2"],
                                                      ["images/b.png", "a cat", "1"])}),
    "imagefolder-parquet": Layout("imagefolder with `metadata.parquet`",
                                  {**PAIR, "metadata.parquet": parquet({"file_name": "a.png", "prompt": "a cat", "rank": 1},
                                                                       {"file_name": "b.png", "prompt": "a cat", "rank": 2})}),
    "imagefolder-pairs": Layout("imagefolder, one row a pair",
                                {**PAIR, "metadata.jsonl": lines({"chosen_file_name": "a.png", "rejected_file_name": "b.png",
                                                                  "file_name": "a.png", "prompt": "a cat"})}),
    "links": Layout("images that link to a store, with metadata",
                    {"store/1": A, "a.png": Link("store/1"), "metadata.jsonl": lines({"file_name": "a.png", "text": "a cat"})}),
    "leaving": Layout("metadata that names a file outside its folder",
                      {"a.png": A, "metadata.jsonl": lines({"file_name": "../x.png", "text": "a cat"})}),
    "broken-metadata": Layout("a broken line in metadata",
                              {**PAIR, "metadata.jsonl": lines({"file_name": "a.png", "text": "a cat", "score": 1},
                                                           {"file_name": "b.png", "text": "a cat", "score": 2}) + b"\n{"}),
    "geneval": Layout("GenEval's folders", {"00000/metadata.jsonl": lines(FACTS), "00000/samples/0000.png": A}),
    "geneval-flat": Layout("images in one folder, named by their row of GenEval's `evaluation_metadata.jsonl` beside them",
                           {"00000_0.png": A, "00001_0.png": B, "evaluation_metadata.jsonl": lines(FACTS, FACTS)}),
    "w-l": Layout("`w/` and `l/` with `.txt`", {"w/a.png": A, "l/a.png": B, "w/a.txt": b"a cat"}),
    "two-folders": Layout("two folders, `.txt` beside the winners", {"x/a.png": A, "y/a.png": B, "x/a.txt": b"a cat"}, ("x", "y")),
    "two-folders-a1111": Layout("two folders, prompts in the PNGs",
                                {"x/a.png": with_text(parameters="a cat\nSteps: 2, Seed: 1"), "y/a.png": B}, ("x", "y")),
    "csv": Layout("csv: prompt, winner, loser", {**PAIR, "p.csv": table(HEAD, ROW)}, ("p.csv",)),
    "csv-excel": Layout("csv with `;`, a byte order mark and capitals",
                        {**PAIR, "p.csv": table(["Prompt", "Winner", "Loser"], ROW, mark=";", encoding="utf-8-sig")}, ("p.csv",)),
    "csv-utf16": Layout("csv in UTF-16", {**PAIR, "p.csv": table(HEAD, ROW, encoding="utf-16")}, ("p.csv",)),
    "csv-latin1": Layout("csv in Latin-1", {**PAIR, "p.csv": table(HEAD, ["größe", *ROW[1:]], encoding="latin-1")}, ("p.csv",)),
    "csv-blanks": Layout("csv with blanks after commas",
                         {**PAIR, "p.csv": b'prompt, winner, loser\n"a cat, red", a.png, b.png\n'}, ("p.csv",)),
    "csv-comma": Layout("csv with a comma in a prompt without quotes, beside a good row",
                        {**PAIR, "p.csv": b"prompt,winner,loser\na cat, red,a.png,b.png\na dog,a.png,b.png\n"}, ("p.csv",)),
    "csv-long": Layout("csv with a cell of 200,000 characters", {**PAIR, "p.csv": table(HEAD, ["x" * 200_000, *ROW[1:]])}, ("p.csv",)),
    "csv-same": Layout("csv whose winner is the loser", {**PAIR, "p.csv": table(HEAD, ["a cat", "a.png", "a.png"])}, ("p.csv",)),
    "csv-missing": Layout("csv with one missing image", {**PAIR, "p.csv": table(HEAD, ROW, ["a", "a.png", "no.png"])}, ("p.csv",)),
    "csv-columns": Layout("csv without a column of losers", {**PAIR, "p.csv": table(["prompt", "best"], ROW[:2])}, ("p.csv",)),
    "tsv-gz": Layout("compressed tsv", {**PAIR, "p.tsv.gz": gzip.compress(table(HEAD, ROW, mark="\t"))}, ("p.tsv.gz",)),
    "jsonl": Layout("JSON lines: prompt, chosen, rejected",
                    {**PAIR, "p.jsonl": lines({"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"})}, ("p.jsonl",)),
    "jsonl-u2028": Layout("JSON lines with U+2028 and a lone surrogate",
                          {**PAIR, "p.jsonl": lines({"prompt": "a\u2028b", "winner": "a.png", "loser": "b.png"})
                           + b'\n{"prompt": "\\ud800", "winner": "b.png", "loser": "a.png"}'}, ("p.jsonl",)),
    "labels": Layout("the table of `score --labels`",
                     {**PAIR, "a.txt": b"a cat", "p.csv": table(["image_a", "image_b", "choice"], ["a.png", "b.png", "b"])}, ("p.csv",)),
    "pickapic": Layout("Pick-a-Pic's parquet", {"p.parquet": parquet({"caption": "a cat", "jpg_0": A, "jpg_1": B, "label_0": 1.0,
                                                                     "label_1": 0.0})}, ("p.parquet",)),
    "hpdv2": Layout("HPDv2's train.json", {"train/a.png": A, "train/b.png": B, "train.json": lines(
        [{"prompt": "a cat", "file_path": ["a.png", "b.png"], "human_preference": [1, 0]}])}),
    "hpdv3": Layout("HPDv3's JSON", {**PAIR, "t.json": lines([{"prompt": "a cat", "path1": "a.png", "path2": "b.png"}])}, ("t.json",)),
    "chosen": Layout("parquet: prompt, chosen, rejected (TRL)",
                     {"p.parquet": parquet({"prompt": "a cat", "chosen": cell(A), "rejected": cell(B)})}, ("p.parquet",)),
    "image-0": Layout("parquet: image_0, image_1, label",
                      {"p.parquet": parquet({"prompt": "a cat", "image_0": cell(A), "image_1": cell(B), "label": 1})}, ("p.parquet",)),
    "votes": Layout("parquet: image1, image2 and votes",
                    {"p.parquet": parquet({"prompt": "a cat", "image1": cell(A), "image2": cell(B),
                                           "weighted_results_image1_preference": 0.8,
                                           "weighted_results_image2_preference": 0.2})}, ("p.parquet",)),
    "image-reward-db": Layout("ImageRewardDB's rows", {**PAIR, "m.jsonl": lines(
        {"image_path": "a.png", "prompt_id": "1", "prompt": "a cat", "rank": 1},
        {"image_path": "b.png", "prompt_id": "1", "prompt": "a cat", "rank": 2})}, ("m.jsonl",)),
    "image-reward-db-parquet": Layout("ImageRewardDB as parquet: an image a row, `rank`", {"p.parquet": parquet(
        {"image": cell(A), "prompt_id": "1", "prompt": "a cat", "rank": 1},
        {"image": cell(B), "prompt_id": "1", "prompt": "a cat", "rank": 2})}, ("p.parquet",)),
    "image-reward-db-group": Layout("ImageRewardDB's groups: lists `image` and `rank`", {"p.parquet": parquet(
        {"image": [cell(A), cell(B)], "prompt_id": "1", "prompt": "a cat", "rank": [1, 2]})}, ("p.parquet",)),
    "image-reward-db-pair": Layout("ImageRewardDB's pairs: `img_better`, `img_worse`", {"p.parquet": parquet(
        {"prompt_id": "1", "prompt": "a cat", "img_better": cell(A), "img_worse": cell(B)})}, ("p.parquet",)),
    "image-reward-db-zip": Layout("a zip file of ImageRewardDB, with names from the root of the data set", {"train_1.zip": zipped(
        {**PAIR, "train_1.json": lines([{"image_path": f"images/train/train_1/{n}.png", "prompt_id": "1", "prompt": "a cat",
                                         "rank": r} for n, r in (("a", 1), ("b", 2))])})}, ("train_1.zip",)),
    "genai-bench": Layout("GenAI-Bench: left_image, right_image, vote_type", {"p.parquet": parquet(
        {"prompt": "a cat", "left_model": "x", "left_image": cell(A), "right_model": "y", "right_image": cell(B),
         "vote_type": "leftvote"})}, ("p.parquet",)),
    "votes-counted": Layout("Rapidata's votes_image1 and votes_image2, one pair without votes", {"p.parquet": parquet(
        {"prompt": "a cat", "image1": cell(A), "image2": cell(B), "votes_image1": 9, "votes_image2": 17, "model1": "x",
         "model2": "y"}, {"prompt": "a dog", "image1": cell(A), "image2": cell(B), "votes_image1": None,
                          "votes_image2": None, "model1": "x", "model2": "y"})}, ("p.parquet",)),
    "missing-label": Layout("imagefolder in which one of three images has no label", {**PAIR, "c.png": C, "metadata.csv": table(
        ["file_name", "text", "score"], ["a.png", "a cat", "2"], ["b.png", "a cat", "nan"], ["c.png", "a cat", "1"])}),
    "generations": Layout("JSON: generations and ranking", {**PAIR, "t.json": lines(
        [{"prompt": "a cat", "generations": ["a.png", "b.png"], "ranking": [2, 1]}])}, ("t.json",)),
    "parquet": Layout("parquet: image, caption", {"p.parquet": parquet({"image": cell(A), "caption": "a cat"})}, ("p.parquet",)),
    "shards": Layout("a folder of such parquet files", {f"data/{n}.parquet": parquet({"image": cell(A), "caption": f"p{n}"})
                                                        for n in range(2)}),
    "parquet-torn": Layout("a parquet file that is not complete", {"p.parquet": parquet({"image": cell(A)})[:-20]}, ("p.parquet",)),
    "save-to-disk": Layout("`Dataset.save_to_disk`", {"data-00000-of-00001.arrow": arrow({"image": cell(A), "text": "a cat"}),
                                                      "state.json": b"{}", "dataset_info.json": b"{}"}),
    "save-to-disk-pairs": Layout("`Dataset.save_to_disk` of prompt, chosen, rejected", saved(
        {"prompt": "a cat", "chosen": cell(A), "rejected": cell(B)}, images=("chosen", "rejected"))),
    "save-to-disk-splits": Layout("`DatasetDict.save_to_disk` of Pick-a-Pic's columns", {
        "dataset_dict.json": lines({"splits": ["train", "test"]}), **{
            f"{split}/{name}": data for split in ("train", "test") for name, data in saved(
                {"caption": "a cat", "jpg_0": A, "jpg_1": B, "label_0": 1.0, "label_1": 0.0}, images=()).items()}}),
    "webdataset": Layout("webdataset: a tar of images, `.txt` and `.json`",
                         {"0.tar": tar({"0.png": A, "0.txt": b"a cat", "1.png": B, "1.json": lines({"caption": "a dog"})})}),
    "zip": Layout("a zip file of images and `.txt`", {"x.zip": zipped({"a/0.png": A, "a/0.txt": b"a cat"})}, ("x.zip",)),
    "zip-imagefolder": Layout("a zip file of an imagefolder, in a folder", {"x.zip": zipped(
        {f"x/{name}": data for name, data in {**PAIR, "metadata.jsonl": FOLDER_ROWS}.items()})}, ("x.zip",)),
    "tar-gz": Layout("a compressed tar of an imagefolder", {"x.tar.gz": tar({**PAIR, "metadata.jsonl": FOLDER_ROWS}, "w:gz")},
                     ("x.tar.gz",)),
    "tar-xz-csv": Layout("a tar.xz of a csv of pairs and its images", {"x.tar.xz": tar({**PAIR, "p.csv": table(HEAD, ROW)}, "w:xz")},
                         ("x.tar.xz",)),
    "zip-w-l": Layout("a zip file of `w/` and `l/`", {"x.zip": zipped({"w/a.png": A, "l/a.png": B, "w/a.txt": b"a cat"})}, ("x.zip",)),
    "webdataset-gz": Layout("a folder of webdataset's tars, compressed", {
        f"{n}.tar.gz": tar({f"{n}.png": A, f"{n}.txt": b"a cat"}, "w:gz") for n in range(2)}),
    "tar-gz-torn": Layout("a compressed tar that is not complete", {"x.tar.gz": tar(PAIR, "w:gz")[:-40]}, ("x.tar.gz",)),
    "folder-csv": Layout("a folder with a csv of pairs", {**PAIR, "p.csv": table(HEAD, ROW)}),
    "export-webdataset": Layout("our own webdataset export", {"data/train-0.tar": tar({
        "g.json": lines({"prompt": "a cat", "images": ["0.png", "1.png"], "preference": [1, 0], "metadata": {}}),
        "g.0.png": A, "g.1.png": B})}),
    "export-rows": Layout("our own rows export", {"data/train-0.parquet": parquet(
        {"prompt": "a cat", "images": [cell(A), cell(B)], "preference": [1.0, 0.0]})}),
    "odd-modes": Layout("16 bits, palette, grey, transparent, CMYK, EXIF orientation",
                        {"a.png": image(1, mode="I;16"), "b.png": image(1, mode="P"), "c.png": image(1, mode="L"),
                         "d.png": image(1, mode="RGBA"), "e.jpg": image(1, "JPEG", mode="CMYK"), "f.jpg": turned()}),
    "strip": Layout("a strip of 6000 x 2 pixels", {"a.png": (lambda s: (STRIP.save(s, "PNG"), s.getvalue())[1])(io.BytesIO())}),
    "suffixes": Layout("`.jfif`, `.jpe`, `.apng`, and a `.tga` that is skipped",
                       {"a.jfif": image(1, "JPEG"), "b.jpe": image(2, "JPEG"), "c.apng": A, "d.tga": b"x"}),
    "damaged": Layout("a good image, half a one, an empty file, HTML and EPS named `.png`",
                      {"a.png": A, "b.png": B[: len(B) // 2], "c.png": b"", "d.png": b"<html>",
                       "e.png": b"%!PS-Adobe-3.0 EPSF-3.0\n"}),
}  # fmt: skip


def write(layout: Layout, folder: Path) -> list[Path]:
    """Write a layout below a folder; return what a command is given."""
    for name, content in layout.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(folder / content.target)
        else:
            path.write_bytes(content)
    return [folder / name for name in layout.given]


if __name__ == "__main__":
    for name, layout in LAYOUTS.items():
        write(layout, Path(sys.argv[1]) / name)
