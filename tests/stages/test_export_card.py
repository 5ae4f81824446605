"""What an export tells others: the card, the names in it, no path of this machine, the same bytes each time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffalign.config import TrainConfig
from diffalign.files.published import load_base, public_name
from diffalign.report.model_card import front_matter, licence_name, licence_of, plain
from diffalign.stages.export import export
from diffalign.training.readme import train_readme
from helpers.command_line import refused
from helpers.processes import finish
from helpers.run_directory import SCRIPT
from helpers.tuned_run import tuned_run

# --- the card --------------------------------------------------------------------------------------------------------


def exported_card(run: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    return (export(run, out, "diffusers", **options) / "README.md").read_text()


def test_the_card(tmp_path: Path, sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_run(tmp_path / "run", sdxl_dir)
    text = exported_card(tmp_path / "run", tmp_path / "out", monkeypatch, licence="mit")
    head = front_matter(tmp_path / "out/README.md")
    assert "base_model" not in head  # a folder of this machine
    assert head["license"] == "mit"
    assert head["library_name"] == "diffusers"
    assert "lora" in head["tags"]
    assert head["pipeline_tag"] == "text-to-image"
    for said in ("## Training", "| rank | 4 |", "+0.200", "load_lora_weights", "health checks found nothing"):
        assert said in text, said
    assert (tmp_path / "out/samples/0-tuned.png").is_file()
    assert "![tuned](samples/0-tuned.png)" in text


def test_text_from_data_is_inert_in_a_card(tmp_path: Path, sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_run(tmp_path / "run", sdxl_dir)
    lines = (tmp_path / "run/eval/scores.jsonl").read_text().splitlines()
    wild = SCRIPT + " | ![x](https://evil) \n# no"
    rows = [{**json.loads(line), "prompt": wild} for line in lines]
    (tmp_path / "run/eval/scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = exported_card(tmp_path / "run", tmp_path / "out", monkeypatch)
    assert "<script" not in text
    assert "![x](" not in text
    assert "\n# no" not in text
    assert plain("a|b\n<i>") == r"a\|b &lt;i&gt;"


def test_the_licence_is_the_bases(tmp_path: Path) -> None:
    assert licence_of("stabilityai/stable-diffusion-xl-base-1.0") == ("openrail++", None)
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: my-terms\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == ("other", "my-terms") and licence_name(str(tmp_path)) == "my-terms"
    (tmp_path / "README.md").write_text("---\n[broken\n---\n")
    assert licence_of(str(tmp_path)) == licence_of("some/model") == ("unknown", None)
    assert licence_name("shapes-sd3") == "apache-2.0" and licence_name("some/model") is None


def test_the_front_matter_is_yaml_whatever_the_names(tmp_path: Path, sdxl_dir: Path) -> None:
    tuned_run(tmp_path / "run", sdxl_dir)
    out = export(tmp_path / "run", tmp_path / "out", "diffusers", licence="odd: [name")
    assert yaml.safe_load((out / "README.md").read_text().split("---")[1])["license"] == "odd: [name"


# --- what others get to see ------------------------------------------------------------------------------------------


def test_a_local_base_is_not_pushed_without_a_name(
    tmp_path: Path, sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the repository is created, for what cannot be used without the base."""
    import huggingface_hub

    calls: list[str] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append(name)

        def upload_folder(self, **options: Any) -> None:
            calls.append("upload")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    tuned_run(tmp_path / "run", sdxl_dir)
    said = (
        "others cannot load the base model model, which is not on the hub; give its name there with --base OWNER/NAME"
    )
    for form in ("weights", "diffusers", "kohya"):
        assert said in refused(capsys, "export", tmp_path / "run", "--format", form, "--push", "me/model")
    assert "--base them: the base model's name on the hub is owner/name" in refused(
        capsys, "export", tmp_path / "run", "--push", "me/model", "--base", "them"
    )
    assert not calls and not (tmp_path / "run/export").exists()
    export(tmp_path / "run", tmp_path / "out", "merged", push="me/model")
    assert calls == ["me/model", "upload"]
    head = front_matter(tmp_path / "out/README.md")
    assert "base_model" not in head and "lora" not in head["tags"]
    assert 'DiffusionPipeline.from_pretrained("me/model")' in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_no_path_of_this_machine_is_exported(kind: str, tmp_path: Path, sdxl_dir: Path) -> None:
    from diffusers import DiffusionPipeline

    tuned_run(tmp_path / "run", sdxl_dir, kind)
    for form in ("weights", "merged", "single-file"):
        out = export(tmp_path / "run", tmp_path / form, form)
        for file in out.rglob("*"):
            if file.is_file():
                found = file.read_bytes()
                for path in (str(tmp_path), str(sdxl_dir), str(sdxl_dir.parent), str(Path.home()) + "/"):
                    assert path.encode() not in found, file
                assert b"_name_or_path" not in found, file
    assert DiffusionPipeline.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/ann/models/sdxl", "sdxl"),
        ("../models/my model", "my model"),
        ("~/sdxl", "sdxl"),
        ("a/b/c", "c"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("shapes-sd3", "shapes-sd3"),
    ],
)
def test_public_names(name: str, shown: str) -> None:
    assert public_name(name) == shown


def test_snippets_of_a_base_run(tmp_path: Path, sdxl_dir: Path) -> None:
    """A run's README shows its own base, also that of the embedded world; a card shows no folder of this machine."""
    for base, published in ((str(sdxl_dir), False), ("shapes-sdxl", False), ("shapes-sd3", True)):
        found: dict[str, Any] = {}
        exec(load_base(base, published=published), found)
        assert found["pipeline"].unet if "sdxl" in base else found["pipeline"].transformer
    assert str(sdxl_dir.parent) not in load_base(str(sdxl_dir), published=True)
    config = TrainConfig.model_validate({"model": {"path": "shapes-sdxl"}, "data": {"path": "d"}, "run_dir": "runs/a"})
    assert load_base("shapes-sdxl", published=False) in train_readme(config)
    assert "`diffalign export runs/a` writes it, as `kohya_lora.safetensors`" in train_readme(config)


def test_equal_weights_are_equal_bytes_whatever_the_hash_seed(tmp_path: Path, sdxl_dir: Path) -> None:
    program = """
import sys
from pathlib import Path
from diffalign.pipelines import load_backbone
from diffalign.pipelines.export import export_diffusers, export_kohya
from diffalign.pipelines.hub import component_config, find_index
backbone = load_backbone(sys.argv[1])
backbone.add_lora(2, 3.0)
out = Path(sys.argv[2])
backbone.save_weights(out / "weights")
(out / "export").mkdir()
export_diffusers(out / "weights", "unet", out / "export")
found = find_index(sys.argv[1], None, None, True)
config = component_config(sys.argv[1], *found, "unet", None, True)
export_kohya(out / "weights", type(backbone), config, out / "export")
"""
    for seed in ("1", "2"):
        finish([sys.executable, "-c", program, str(sdxl_dir), str(tmp_path / seed)], PYTHONHASHSEED=seed)
    files = [file.relative_to(tmp_path / "1") for file in sorted((tmp_path / "1").rglob("*.safetensors"))]
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file
