"""The options of a family: known before torch is imported, checked before any weights are read."""

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import DiffalignError
from diffalign.pipelines import BACKBONES, load_backbone
from diffalign.pipelines.options import OPTIONS, FluxOptions, Options, SD3Options, read_options

WITHOUT_TORCH = """
import sys
from diffalign.pipelines.options import OPTIONS, read_options
from diffalign.pipelines.settings import SamplingSettings
assert read_options("flux", {"guidance": 2.0}, "m").guidance == 2.0
assert not {"torch", "numpy", "diffusers"} & set(sys.modules)
from diffalign.pipelines import Backbone, Flow, load_backbone
assert "torch" in sys.modules and "diffusers" not in sys.modules
"""


def test_options_are_read_without_torch(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT_TORCH], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_family_has_its_options_with_a_meaning() -> None:
    assert set(OPTIONS) == {kind.family for kind in BACKBONES.values()}
    assert [f.name for f in fields(SD3Options)] == ["use_t5", "max_sequence_length"]
    assert [f.name for f in fields(FluxOptions)] == ["guidance", "max_sequence_length"]
    for kind in OPTIONS.values():
        assert all(f.metadata["description"] for f in fields(kind)) and kind() == kind()


def test_options_left_out_are_at_their_defaults() -> None:
    assert read_options("sd3", {}, "m") == SD3Options(use_t5=True, max_sequence_length=None)
    assert read_options("sd3", {"use_t5": False, "max_sequence_length": 512}, "m") == SD3Options(False, 512)
    assert read_options("flux", {"guidance": 2}, "m") == FluxOptions(2.0)
    assert read_options("sdxl", {}, "m") == Options()


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("sdxl", {"use_t5": True}, "use_t5: here/m is of family sdxl, which has no such option; it has none"),
        ("flux", {"use_t5": True}, "no such option; its options are guidance, max_sequence_length"),
        ("sd3", {"use_t5": 1}, "use_t5: 1 is not possible; it must be true or false"),
        ("sd3", {"max_sequence_length": 0}, r"a whole number or null \(greater than 0, at most 512\)"),
        ("sd3", {"max_sequence_length": 513}, "513 is not possible"),
        ("sd3", {"max_sequence_length": True}, "True is not possible"),
        ("sd3", {"max_sequence_length": 12.0}, "12.0 is not possible"),
        ("flux", {"guidance": -1.0}, r"-1.0 is not possible; it must be a number \(at least 0\)"),
        ("flux", {"guidance": float("nan")}, "nan is not possible"),
        ("flux", {"guidance": None}, "None is not possible"),
        ("flux", {"guidance": "3"}, "'3' is not possible"),
    ],
)
def test_what_does_not_fit_is_refused(family: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffalignError, match=message) as error:
        read_options(family, given, "here/m")
    assert str(error.value).startswith(f"model.options.{next(iter(given))}: ") and "\n" not in str(error.value)


def test_they_are_checked_before_weights_are_read(sd3_dir: Path, sdxl_dir: Path, tmp_path: Path) -> None:
    for name, folder, options in (("a", sdxl_dir, {"guidance": 2.0}), ("b", sd3_dir, {"max_sequence_length": -1})):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "model_index.json", tmp_path / name)  # and nothing else
        with pytest.raises(DiffalignError, match=f"model.options.{next(iter(options))}"):
            load_backbone(tmp_path / name, **options)
        with pytest.raises(DiffalignError, match="is missing"):
            load_backbone(tmp_path / name)


def test_a_backbone_carries_its_options(sd3_dir: Path, flux_dir: Path) -> None:
    backbone = load_backbone(sd3_dir, use_t5=False, max_sequence_length=5)
    assert backbone.options == SD3Options(False, 5) and backbone.guidance is None
    assert load_backbone(flux_dir, guidance=2.0).guidance == 2.0 and load_backbone(flux_dir).guidance == 3.5


def test_a_plain_call_needs_the_length_that_was_chosen(sd3_dir: Path, sdxl_dir: Path, flux_dir: Path) -> None:
    for folder in (sd3_dir, flux_dir):
        assert load_backbone(folder).call_options() == {}
        assert load_backbone(folder, max_sequence_length=5).call_options() == {"max_sequence_length": 5}
    assert load_backbone(sdxl_dir).call_options() == {}
