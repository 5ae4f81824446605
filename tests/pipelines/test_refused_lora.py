"""Files that are no plain LoRA of the model are refused by every consumer: one line, no output, the model untouched."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from helpers.lora_files import (
    SD3,
    UNET,
    Deltas,
    as_kohya,
    as_peft,
    deltas,
    kohya,
    peft_folder,
    predict,
    untouched,
    write,
)


def added(**tensors: Tensor) -> Callable[[Deltas], dict[str, Tensor]]:
    return lambda layers: as_kohya(layers) | {f"{kohya(UNET[0])}.{k.replace('__', '.')}": v for k, v in tensors.items()}


def changed(name: str, value: Any) -> Callable[[Deltas], dict[str, Tensor]]:
    def save(layers: Deltas) -> dict[str, Tensor]:
        state = as_kohya(layers)
        key = f"{kohya(UNET[0])}.{name}"
        state[key] = value(state[key])
        return {k: v for k, v in state.items() if v is not None}

    return save


REFUSED: dict[str, tuple[Callable[[Deltas], dict[str, Tensor]], str]] = {
    "DoRA of kohya": (added(dora_scale=torch.ones(16, 1)), r"belongs to a DoRA \(dora_scale\), not to a plain LoRA"),
    "DoRA of PEFT": (
        lambda d: as_peft(d, "unet.") | {f"unet.{UNET[0]}.lora_magnitude_vector": torch.ones(16)},
        r"belongs to a DoRA \(lora_magnitude_vector\)",
    ),
    "DoRA of PEFT with a weight": (
        lambda d: as_peft(d, "unet.") | {f"unet.{UNET[0]}.lora_magnitude_vector.weight": torch.ones(16)}, "belongs to a DoRA",
    ),
    "LoHa": (added(hada_w1_a=torch.ones(16, 2)), "belongs to a LoHa"),
    "LoKr": (added(lokr_w1=torch.ones(2, 2)), "belongs to a LoKr"),
    "LoKr alone": (lambda _: {f"{kohya(UNET[0])}.lokr_w1": torch.ones(2, 2)}, "belongs to a LoKr"),
    "a core": (added(lora_mid__weight=torch.ones(2, 2, 3, 3)), "belongs to a LoCon with a core"),
    "OFT": (added(oft_blocks=torch.ones(2, 2, 2)), "belongs to a OFT"),
    "a full difference": (added(diff=torch.ones(16, 16)), "belongs to a full difference"),
    "a difference of a bias": (added(diff_b=torch.ones(16)), "belongs to a full difference"),
    "a bias": (added(lora_up__bias=torch.ones(16)), "is no part of a LoRA"),
    "an unknown key": (added(magic=torch.ones(2)), "is no part of a LoRA"),
    "a long key": (lambda d: as_kohya(d) | {"x" * 9999: torch.ones(2)}, "is no part of a LoRA"),
    "a model's own weights": (lambda _: {"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "is no part of a LoRA"),
    "no tensors": (lambda _: {}, "holds no LoRA of a unet; it has 0 tensors"),
    "half a pair": (changed("lora_up.weight", lambda _: None), "lacks its up matrix"),
    "the other half": (changed("lora_down.weight", lambda _: None), "lacks its down matrix"),
    "an alpha alone": (lambda d: as_kohya(d) | {"lora_unet_x.alpha": torch.ones(())}, "lacks its down matrix"),
    "alphas of a vector": (changed("alpha", lambda _: torch.ones(2)), "not one number"),
    "infinite": (changed("lora_up.weight", lambda t: t / 0), "not finite"),
    "not a number": (changed("alpha", lambda t: t * float("nan")), "not finite"),
    "ranks that do not fit": (changed("lora_down.weight", lambda t: t[:1].clone()), "do not fit each other"),
    "a vector": (changed("lora_down.weight", lambda t: t.flatten()), "do not fit each other"),
    "of no rank": (changed("lora_down.weight", lambda t: t[:0].clone()), "do not fit each other"),
    "too narrow": (changed("lora_down.weight", lambda t: t[:, :-1].clone()), "goes from 15 to 16 values"),
    "too short": (changed("lora_up.weight", lambda t: t[:-1].clone()), "goes from 16 to 15 values"),
    "another layer": (
        lambda d: as_peft(d, "unet.") | as_peft({"mid_block.nothing": d[UNET[0]]}, "unet."), "has no layer mid_block.nothing",
    ),
    "a norm": (
        lambda d: as_peft(d, "unet.") | as_peft({"conv_norm_out": d[UNET[0]]}, "unet."), "has no layer conv_norm_out",
    ),
    "kohya's name of nothing": (
        lambda d: as_kohya(d) | {k.replace("down_blocks_1", "down_blocks_7"): v for k, v in as_kohya(d).items()},
        "this LoRA does not fit the model",
    ),
    "two adapters": (
        lambda d: as_peft(d, "unet.", (".lora_A.one.weight", ".lora_B.one.weight"))
        | as_peft(d, "unet.", (".lora_A.two.weight", ".lora_B.two.weight")),
        "holds several adapters",
    ),
    "a transformer's": (lambda d: as_peft(d, "transformer."), "adapts transformer, but only a LoRA of this model's unet"),
}  # fmt: skip


def refused(folder: Path, path: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Return the line with which every consumer refuses a LoRA; nothing else is written, and the model stays as it was."""
    plain = untouched(folder)
    before = predict(plain)
    capfd.readouterr()
    with pytest.raises(DiffalignError) as error:
        plain.load_weights(path)
    with pytest.raises(DiffalignError):
        plain.add_lora(2, 2, init=path)
    seen = capfd.readouterr()
    assert seen.out + seen.err == "" and "\n" not in str(error.value) and len(str(error.value)) < 600
    assert torch.equal(predict(plain), before)
    return str(error.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_are_refused(kind: str, sd15_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save, words = REFUSED[kind]
    layers = deltas(untouched(sd15_dir), UNET, (2,))
    write(tmp_path, save(layers))
    line = refused(sd15_dir, tmp_path, capfd)
    assert re.search(words, line) and str(tmp_path) in line, line


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("[", "cannot be read"),
        ("[]", "cannot be read"),
        ("3", "cannot be read"),
        ("[" * 99999, "cannot be read"),
        ({"unet.r": "two", "unet.lora_alpha": 2}, "rank and alpha cannot be read"),
        ({"unet.r": 2, "unet.lora_alpha": [2]}, "rank and alpha cannot be read"),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 3}}, "rank and alpha cannot be read"),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": [3]}, "rank and alpha cannot be read"),
        ({"unet.r": 8, "unet.lora_alpha": 8}, "has rank 2, its config says 8"),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True}, "use_dora is set"),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.bias": "all"}, "bias is 'all'"),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.modules_to_save": ["x"]}, "modules_to_save is set"),
    ],
)
def test_metadata_that_is_refused(
    metadata: object, words: str, sd15_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layers = deltas(untouched(sd15_dir), UNET, (2,))
    write(tmp_path, as_peft(layers, "unet."), lora_adapter_metadata=metadata)
    assert words in refused(sd15_dir, tmp_path, capfd)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA, not a plain LoRA"),
        ({"lora_alpha": None}, "cannot be read"),
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"r": 3}, "has rank 2, its config says 3"),
        ({"lora_alpha": "much"}, "cannot be read"),
    ],
)
def test_peft_configs_that_are_refused(
    config: dict[str, object], words: str, sd3_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layers = deltas(untouched(sd3_dir), SD3, (2,))
    peft_folder(tmp_path, layers, **({"r": 2, "lora_alpha": 2} | config))
    assert words in refused(sd3_dir, tmp_path, capfd)
    for content, said in (("{", "cannot be read"), ("[" * 99999, "cannot be read"), ("{}", "cannot be read")):
        (tmp_path / "adapter_config.json").write_text(content)
        assert said in refused(sd3_dir, tmp_path, capfd)
    (tmp_path / "adapter_config.json").unlink()
    assert "adapter_config.json is missing beside it" in refused(sd3_dir, tmp_path, capfd)


@pytest.mark.parametrize("content", [b"", b"junk" * 99, bytes(4096), b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_files(content: bytes, sd15_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(content)
    line = refused(sd15_dir, tmp_path, capfd)
    assert "is damaged or no safetensors file" in line or "git lfs pull" in line
