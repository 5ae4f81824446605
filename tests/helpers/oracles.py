"""The published packages' own code, for tests and benchmarks to compare with: hpsv2 1.2.0 and image-reward 1.5.

Neither can be imported beside current libraries, so `make oracles` installs them (tests/helpers/oracles.txt) without their
dependencies into a folder of their own, and this module lends them, for the time of the import, what they ask for and lack.
Every stand-in is named here; no line of what computes a score is among them:

hpsv2 1.2.0
    open_clip/bpe_simple_vocab_16e6.txt.gz   left out of the wheel; the same file from open_clip
    turtle.forward, clint.textui.progress    imported, never used for a score
image-reward 1.5
    ImageReward, ImageReward.models          empty packages: their `__init__` import OpenAI's clip, datasets and a trainer
    fairscale's checkpoint_wrapper           used for training only
    find_pruneable_heads_and_indices         gone from transformers, called by pruning only; two more functions moved
    get_head_mask, invert_attention_mask     gone from PreTrainedModel: no head is masked, and a mask of ones hides nothing
    init_weights                             expects what newer models set up; all weights are loaded anyway
    init_tokenizer                           downloads bert-base-uncased, and an attribute it reads is gone: a given tokenizer
    create_vit, MLP's 768                    the published sizes are written into the code; here they are reduced ones

hpsv3 1.0.0 comes with the transformers 4.45.2 that it pins, so it runs in another process (oracle_hpsv3.py).
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

FOLDER = Path(os.environ.get("DIFFALIGN_ORACLES") or Path(sys.prefix) / "oracles")
HPSV3 = Path(os.environ.get("DIFFALIGN_ORACLES_HPSV3") or Path(sys.prefix) / "oracles-hpsv3")


class OraclesMissing(Exception):
    """The packages are not installed; the message says how to mend that."""


def folder() -> Path:
    """Where the packages are. Raises OraclesMissing, so that a comparison never passes by not taking place."""
    return installed(FOLDER, "hpsv2", "ImageReward")


def installed(where: Path, *packages: str) -> Path:
    for package in packages:
        if not (where / package).is_dir():
            raise OraclesMissing(
                f"{where / package} is not there: `make oracles` installs what these tests compare with"
            )
    return where


def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


@contextmanager
def lent(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """The oracle folder on the path, last, and `modules` in place, until the imports are done."""
    with mock.patch.dict(sys.modules, modules), mock.patch.object(sys, "path", [*sys.path, str(folder())]):
        before = set(sys.modules)
        yield
        loaded = {name: sys.modules[name] for name in set(sys.modules) - before}
    sys.modules.update(loaded)  # mock.patch.dict takes away what was imported meanwhile


def hpsv2_config(name: str) -> dict[str, Any]:
    """The sizes that hpsv2's own copy of open_clip knows under a name, such as ViT-H-14."""
    path = folder() / "hpsv2" / "src" / "open_clip" / "model_configs" / f"{name}.json"
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def hpsv2(config: dict[str, Any]) -> types.ModuleType:
    """`hpsv2.img_score`, whose `score(path, prompt, cp=checkpoint)` works on a network of `config`.

    The network and its transform come from the package's own factory with the arguments of its `initialize_model`, but for
    the name (ViT-H-14) and the LAION weights that it downloads and then overwrites.
    """
    import open_clip

    vocabulary = folder() / "hpsv2" / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not vocabulary.exists():
        shutil.copy(Path(open_clip.__file__).parent / vocabulary.name, vocabulary)
    clint = {"clint": module("clint"), "clint.textui": module("clint.textui", progress=None)}
    with lent({"turtle": module("turtle", forward=None), **clint}):
        package = importlib.import_module("hpsv2.img_score")
        factory = importlib.import_module("hpsv2.src.open_clip.factory")
    factory._MODEL_CONFIGS["reduced"] = config
    network, _, transform = factory.create_model_and_transforms(
        "reduced", "", precision="amp", device="cpu", jit=False, force_quick_gelu=False, force_custom_text=False,
        force_patch_dropout=False, force_image_size=None, pretrained_image=False, image_mean=None, image_std=None,
        light_augmentation=True, aug_cfg={}, output_dict=True, with_score_predictor=False, with_region_predictor=False,
    )  # fmt: skip
    package.model_dict.update(model=network, preprocess_val=transform)
    return package


def imagereward(work: Path, tokenizer: Any, *, width: int, text: int, layers: int, vocabulary: int) -> Any:
    """The package's `ImageReward` module at reduced sizes, with heads 64 wide and patches of 16 px as in the published one.

    Its `score(prompt, image)` does all the rest itself: transform, tokens, both networks, head, constants.
    """
    import transformers.modeling_utils as modelling
    from transformers import pytorch_utils

    root = folder() / "ImageReward"
    empty = {"ImageReward": module("ImageReward", __path__=[str(root)]),
             "ImageReward.models": module("ImageReward.models", __path__=[str(root / "models")])}  # fmt: skip
    parts = ["fairscale", "nn", "checkpoint", "checkpoint_activations"]
    names = [".".join(parts[:n]) for n in range(1, 5)]
    fairscale = {name: module(name, __path__=[], checkpoint_wrapper=None) for name in names}
    moved = {
        "apply_chunking_to_forward": pytorch_utils.apply_chunking_to_forward,
        "prune_linear_layer": pytorch_utils.prune_linear_layer,
        "find_pruneable_heads_and_indices": None,
    }
    with lent({**empty, **fairscale}), mock.patch.multiple(modelling, create=True, **moved):
        package = importlib.import_module("ImageReward.ImageReward")
        blip = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
        vit = importlib.import_module("ImageReward.models.BLIP.vit")
        med = importlib.import_module("ImageReward.models.BLIP.med")
    med.BertModel.init_weights = lambda self: None
    med.BertModel.get_head_mask = lambda self, mask, count: [mask] * count
    med.BertModel.invert_attention_mask = lambda self, mask: (1.0 - mask[:, None, None, :]) * -10000.0

    def create_vit(*_: Any) -> tuple[Any, int]:
        return vit.VisionTransformer(
            img_size=224, patch_size=16, embed_dim=width, depth=layers, num_heads=width // 64, drop_path_rate=0.1
        ), width

    sizes = {
        "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": text, "initializer_range": 0.02, "intermediate_size": 2 * text,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 64, "model_type": "bert", "num_attention_heads": text // 64,
        "num_hidden_layers": layers, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": vocabulary,
        "encoder_width": width, "add_cross_attention": True, "chunk_size_feed_forward": 0,
    }  # fmt: skip
    (work / "med_config.json").write_text(json.dumps(sizes))
    reduced: Any = {"create_vit": create_vit, "init_tokenizer": lambda: tokenizer}
    with mock.patch.multiple(blip, **reduced):
        model = package.ImageReward(str(work / "med_config.json"))
    model.mlp = package.MLP(text)
    return model.eval()


def hpsv3(command: str, folder: Path, **request: Any) -> Any:
    """What oracle_hpsv3.py answers to a command; the packages' folder comes first on its path, before ours."""
    script = Path(__file__).with_name("oracle_hpsv3.py")
    path = str(installed(HPSV3, "hpsv3", "transformers"))
    done = subprocess.run(
        [sys.executable, "-P", str(script), command, str(folder)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) if command == "score" else None
