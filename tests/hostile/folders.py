"""Classes of hostile folders for verbs: pictures, links, archives, datasets, earlier outputs, run directories, models."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffalign.data.writer import ImageWriter, write_groups
from diffalign.pipelines import load_backbone
from helpers import pictures, tiny
from hostile.inputs import json_text, picture_bytes
from hostile.trial import (
    SECRET,
    call_fault,
    command,
    file_name,
    files_below,
    leak_fault,
    mutate,
    printed_fault,
    text,
    verb_fault,
)


def private_folder(folder: Path) -> Path:
    """Make a folder that nobody means to publish."""
    private = folder / "private"
    private.mkdir()
    (private / "secret.txt").write_text(SECRET)
    (private / "secret.json").write_text(json.dumps({"prompt": SECRET}))
    (private / "secret.jsonl").write_text(json.dumps({"file_name": "a.png", "prompt": SECRET}))
    pictures.smooth(7).save(private / "secret.png")
    return private


def write_anywhere(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def folders_of_pictures(rng: random.Random, folder: Path) -> str:
    """Each picture gets its row, with a score or a reason, whatever it is called and holds."""
    images = folder / "images"
    images.mkdir()
    wanted = 0
    for _ in range(rng.randint(2, 6)):
        data = picture_bytes(rng)
        write_anywhere(images, file_name(rng), data if rng.random() < 0.5 else mutate(rng, data))
        wanted += 1
    for kind in rng.sample(["fifo", "loop", "sparse", "empty", "folder", "text", "caption", "metadata"], 3):
        if kind == "fifo":
            os.mkfifo(images / "fifo.png")
        elif kind == "loop":
            (images / "loop.png").symlink_to("loop.png")
        elif kind == "sparse":
            with (images / "sparse.png").open("wb") as stream:
                stream.truncate(2**41)
        elif kind == "empty":
            (images / "empty.png").write_bytes(b"")
        elif kind == "folder":
            (images / "folder.png").mkdir()
        elif kind == "caption":
            write_anywhere(
                images,
                min(path.stem for path in images.iterdir()) + ".txt",
                text(rng).encode("utf-8", "replace"),
            )
        wanted += kind in ("fifo", "loop", "sparse", "empty")
    out = folder / "o.jsonl"
    fault = verb_fault("score", images, "-r", "sharpness", "-o", out, "--html", folder / "o.html")
    if fault or not out.is_file():
        return fault or "no output"
    rows = [json.loads(line) for line in out.read_text().split("\n") if line]
    if len(rows) != wanted:
        return f"{len(rows)} rows for {wanted} pictures"
    return (
        ""
        if all(row["sharpness"] is not None or row["reason"] or row["sharpness.reason"] for row in rows)
        else "a row says nothing"
    )


def links(rng: random.Random, folder: Path) -> str:
    """Nothing behind a link that leads out of the folder is in any output."""
    private, foreign = private_folder(folder), folder / "foreign"
    for n, side in enumerate(("w", "l")):
        (foreign / side).mkdir(parents=True)
        for name in ("a", "b"):
            pictures.smooth(n + 2 * (name == "b")).save(foreign / side / f"{name}.png")
        (foreign / side / "a.txt").write_text("a cat")
    place = rng.choice([foreign, foreign / "w", foreign / "l"])
    for _ in range(rng.randint(1, 3)):
        target = rng.choice(["secret.txt", "secret.json", "secret.jsonl", "secret.png", ""])
        name = rng.choice(
            ["b.txt", "b.caption", "b.json", "metadata.jsonl", "c.png", "more", "train.json", "prompts.txt", "a.txt"]
        )
        link = place / name
        link.unlink(missing_ok=True)
        link.symlink_to(rng.choice([private / target, Path(os.path.relpath(private / target, place))]))
    out = folder / "out"
    shown = []
    for words in (
        ("score", foreign, "-r", "sharpness", "-o", out / "s.jsonl", "--html", out / "s.html"),
        ("data", "convert", foreign, "--out", out / "data"),
        ("pairs", foreign / "w", foreign / "l", "--out", out / "pairs"),
    ):
        code, stdout, stderr, problem = command(*words)
        shown += [stdout, stderr]
        if problem or code not in (0, 2, 3):
            return f"{words[0]}: {problem or stderr[-300:]}"
    return leak_fault(out, *shown)


def archives(rng: random.Random, folder: Path) -> str:
    """A tar or zip with any members is scored or refused, and writes nothing outside."""
    inner = folder / "in"
    inner.mkdir()
    private_folder(folder)
    members = []
    for _ in range(rng.randint(1, 5)):
        outside_ = [f"../../{rng.randrange(9)}.png", "/tmp/evil-member.png"]
        members.append((rng.choice([file_name(rng), *outside_, "a/b.png", "a", "x.txt"]), picture_bytes(rng)))
    path = inner / rng.choice(["x.tar", "x.zip"])
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, data in members:
                packed.writestr(name.encode("utf-8", "replace").decode() or "a", data)
    else:
        with tarfile.open(path, "w") as packed_tar:
            for name, data in members:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                if rng.random() < 0.3:
                    entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, str(folder / "private" / "secret.png"), 0
                packed_tar.addfile(entry, io.BytesIO(data if entry.size else b""))
    if rng.random() < 0.4:
        path.write_bytes(mutate(rng, path.read_bytes()))
    before = files_below(folder)
    fault = verb_fault("score", path, "-r", "sharpness", "-o", folder / "out" / "s.jsonl")
    fault = fault or verb_fault("data", "convert", path, "--out", folder / "out" / "data")
    made = {name for name in files_below(folder) if name not in before}
    outside = [name for name in made if not name.startswith("out/")] or [
        p for p in ("/tmp/evil-member.png",) if Path(p).exists()
    ]
    return fault or (f"wrote {outside}" if outside else "")


def dataset(folder: Path, ids: list[str], splits: list[str]) -> None:
    with ImageWriter(folder) as writer:
        for group in ids:
            for k in range(2):
                writer.write(group, k, pictures.smooth(k), text(random.Random(k)), k, {"from": SECRET[:3]})
    write_groups(
        folder,
        [
            {
                "group_id": group,
                "prompt_id": "p",
                "prompt": f"prompt {n}",
                "preference": [1.0, 0.0],
                "split": split,
                "metadata": {},
            }
            for n, (group, split) in enumerate(zip(ids, splits, strict=True))
        ],
    )


def clean(given: str) -> str:
    return given.encode("utf-8", "replace").decode()


def groups_and_splits(rng: random.Random, folder: Path) -> str:
    """Exports of any group ids and splits stay below their folder, or are refused."""
    ids = list(dict.fromkeys(clean(text(rng)) for _ in range(rng.randint(1, 3))))
    splits = [rng.choice(["train", "test", clean(text(rng, 1))]) for _ in ids]
    home = folder / "deep" / "er"
    dataset(home / "data", ids, splits)
    before = files_below(folder)
    for form in ("rows", "pickapic", "webdataset"):
        fault = verb_fault("data", "export", home / "data", "--out", home / form, "--format", form)
        if fault:
            return fault
    fault = verb_fault("data", "inspect", home / "data", "--html", home / "sheet.html")
    fault = fault or verb_fault("rank", home / "data", f"splits={json.dumps({clean(text(rng, 1)): 0.5})}")
    tops = ("deep/er/rows", "deep/er/pickapic", "deep/er/webdataset", "deep/er/sheet.html", "deep/er/data")
    outside = [name for name in files_below(folder) if name not in before and not name.startswith(tops)]
    for tar in (home / "webdataset").rglob("*.tar"):
        with tarfile.open(tar) as packed:
            outside += [
                name
                for name in packed.getnames()
                if "/" in name or ".." in name or name.startswith(".") or printed_fault(name)
            ]
    return fault or (f"wrote {outside[0]!r}" if outside else "")


def damaged_datasets(rng: random.Random, folder: Path) -> str:
    """A dataset whose files are damaged is inspected, scored, ranked and exported, or refused in one line."""
    data = folder / "data"
    dataset(data, ["a", "b"], ["train", "train"])
    assert verb_fault("score", data, "-r", "sharpness", "--into-dataset") == ""
    path = rng.choice(sorted(data.rglob("*.parquet")))
    path.write_bytes(mutate(rng, path.read_bytes()))
    verbs: list[tuple[object, ...]] = [
        ("data", "inspect", data), ("score", data, "-r", "sharpness", "-o", folder / "o.jsonl"), ("rank", data),
        ("data", "export", data, "--out", folder / "out"),
    ]  # fmt: skip
    return next((fault for words in verbs if (fault := verb_fault(*words))), "")


def earlier_outputs(rng: random.Random, folder: Path) -> str:
    """A damaged earlier output is read or refused in one line, and is not lost."""
    pictures.smooth(1).save(folder / "a.png")
    out = folder / f"o{rng.choice(['.jsonl', '.csv', '.parquet'])}"
    assert verb_fault("score", folder / "a.png", "-r", "sharpness", "-o", out) == ""
    damaged = mutate(rng, out.read_bytes())
    out.write_bytes(damaged)
    code, _, err, problem = command("score", folder / "a.png", "-r", "jpeg_compressibility", "-o", out)
    if problem or code not in (0, 2, 3):
        return problem or err[-300:]
    return "a refused output was changed" if code == 2 and out.read_bytes() != damaged else printed_fault(err)


def side_cars(rng: random.Random, folder: Path) -> str:
    """Metadata beside pictures, tables of prompts and of labels with any text are used or refused in one line."""
    for n, name in enumerate("ab"):
        pictures.smooth(n).save(folder / f"{name}.png")
    row = "{" + f'"file_name": {rng.choice([json_text(rng), json.dumps("a.png")])}, "prompt": {json_text(rng)}' + "}"
    place = rng.choice(["metadata.jsonl", "metadata.csv", "a.json", "a.txt", "t.jsonl"])
    (folder / place).write_text(row, encoding="utf-8", errors="replace")
    words: list[object] = ["score", folder / "a.png", folder / "b.png", "-r", "sharpness"]
    words += rng.choice([[], ["--prompts", folder / place], ["--labels", folder / place]])
    return verb_fault(*words, "--html", folder / "o.html")


def run_directories(rng: random.Random, folder: Path) -> str:
    """The report of a run with damaged files is written or refused in one line."""
    run = folder / "run"
    run.mkdir()
    rows = [{"step": n, "loss": 0.5, "lr": 0.1} for n in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text("kind: train\nmodel:\n  path: x\ndata:\n  path: y\ntune:\n  kind: lora\n")
    (run / "health.json").write_text("[]")
    (run / "validation.jsonl").write_text("")
    for name in rng.sample(["metrics.jsonl", "config.yaml", "health.json", "validation.jsonl"], 2):
        content = (run / name).read_bytes()
        (run / name).write_bytes(rng.choice([mutate(rng, content), json_text(rng).encode("utf-8", "replace")]))
    return verb_fault("report", run)


@cache
def tiny_model() -> Path:
    """Return a tiny genuine pipeline of Stable Diffusion 1.5."""
    return tiny.sd15(Path(tempfile.mkdtemp(prefix="hostile-")) / "model")


@cache
def tiny_lora() -> Path:
    """Return the weights of a LoRA for `tiny_model`."""
    folder = tiny_model().parent / "weights"
    backbone = load_backbone(str(tiny_model()), device="cpu")
    backbone.add_lora(rank=2, alpha=2)
    backbone.save_weights(folder)
    return folder


EVIL = "import pathlib\npathlib.Path(__file__).with_name('RAN').write_text('x')\n"


def model_folders(rng: random.Random, folder: Path) -> str:
    """A model folder with damaged or foreign files loads, or is refused in one line; none of its code runs."""
    model = folder / "model"
    shutil.copytree(tiny_model(), model)
    (model / "evil.py").write_text(EVIL)
    files = sorted(
        path for path in model.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors", ".txt")
    )
    path = rng.choice(files)
    if path.suffix == ".json" and rng.random() < 0.5:
        values = json.loads(path.read_text())
        if isinstance(values, dict) and values:
            values[rng.choice([*values, "auto_map", "_class_name"])] = rng.choice(
                [None, [], -1, text(rng), {"AutoModel": "evil.X"}, ["evil", "X"]]
            )
        path.write_text(json.dumps(values))
    else:
        path.write_bytes(rng.choice([b"", mutate(rng, path.read_bytes())]))
    fault = call_fault(lambda: load_backbone(str(model), device="cpu"))
    return "its code ran" if list(model.rglob("RAN")) else fault


def loras(rng: random.Random, folder: Path) -> str:
    """A damaged LoRA is loaded or refused in one line."""
    weights = folder / "weights"
    shutil.copytree(tiny_lora(), weights)
    path = next(weights.glob("*.safetensors"))
    if rng.random() < 0.5:
        path.write_bytes(mutate(rng, path.read_bytes()))
    else:
        state = load_file(path)
        name = rng.choice(sorted(state))
        state[rng.choice([name, f"{name}\x1b", text(rng)[:100]])] = torch.full((rng.choice([1, 3]),), float("nan"))
        save_file(state, path, {"x": text(rng, 1).encode("utf-8", "replace").decode()})
    return call_fault(lambda: load_backbone(str(tiny_model()), device="cpu").load_weights(weights))


CLASSES = {
    "folders of pictures": folders_of_pictures,
    "links out of the folder": links,
    "tar and zip files": archives,
    "group ids and splits": groups_and_splits,
    "damaged datasets": damaged_datasets,
    "earlier outputs of `score`": earlier_outputs,
    "captions, metadata, prompts, labels": side_cars,
    "damaged run directories": run_directories,
    "model folders": model_folders,
    "LoRA files": loras,
}
