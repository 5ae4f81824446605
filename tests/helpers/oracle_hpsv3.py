"""Run the hpsv3 1.0.0 package with the transformers it pins. A script: it runs in a process with its own import path.

    python -P oracle_hpsv3.py make FOLDER             base/ and HPSv3.safetensors, random, in the published layout
    python -P oracle_hpsv3.py score FOLDER < REQUEST  {"dtype", "widen", "files", "prompts", "batches"} to JSON on stdout

dtype: bfloat16 as published, or float32. widen: go over to float32 after loading, to see the network without its rounding.

`make oracles` installs hpsv3, transformers 4.45.2, tokenizers and huggingface_hub beside this project's torch. The package
builds network, tokens, pixels and numbers itself. What it imports besides is replaced here, and none of it computes a score:

fire, trl, peft, datasets, pandas, matplotlib, tensorboard    training and its plots
transformers.trainer, HfArgumentParser, TrainingArguments     the same; the published YAML is read without them
torch.autocast("cuda", float32) around the head               has no effect on a CPU: the head's input is cast to float32
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content "
    "or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture "
    "{{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)


def layout(folder: Path) -> None:
    """Write config, tokenizer and image processor as the repository Qwen/Qwen2-VL-7B-Instruct has them, at reduced sizes.

    Keys, nesting and constants are those of its files of 2024, which newer releases still have to read: text settings at
    the top of config.json, `rope_scaling` of type mrope, `min_pixels` and `max_pixels` in preprocessor_config.json.
    """
    letters = [chr(n) for n in range(256) if chr(n).isprintable() and not chr(n).isspace() and n != 0xAD]
    symbols = letters + [chr(256 + n) for n in range(256 - len(letters))]
    words = [*symbols, "th", "the", "Ġa", "in"]
    ids = {name: len(words) + i for i, name in enumerate(SPECIAL)}
    files: dict[str, Any] = {
        "vocab.json": {word: i for i, word in enumerate(words)},
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                         "special": True}
                for name, i in ids.items()
            },
            "additional_special_tokens": SPECIAL[1:], "bos_token": None, "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "padding_side": "left", "errors": "replace",
            "model_max_length": 32768, "pad_token": "<|endoftext|>", "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
        },
        "chat_template.json": {"chat_template": TEMPLATE},
        "preprocessor_config.json": {
            "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
        },
        "config.json": {
            "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
            "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
            "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"], "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
            "intermediate_size": 96, "max_position_embeddings": 32768, "max_window_layers": 2, "model_type": "qwen2_vl",
            "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
            "vision_config": {
                "depth": 2, "embed_dim": 64, "mlp_ratio": 4, "num_heads": 2, "in_chans": 3, "hidden_size": 64,
                "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
            },
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vocab_size": len(words) + len(SPECIAL) + 30,  # more rows than tokens, as in the published one
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ a\ni n\n", encoding="utf-8")


def package() -> types.ModuleType:
    """Return `hpsv3.inference`, with the stand-ins that the top of this file lists."""
    import transformers
    from transformers import AutoProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration  # noqa: F401  before its neighbours go

    assert transformers.__version__ == "4.45.2"
    anything = {
        "fire": [], "trl": ["RewardTrainer"], "peft": ["LoraConfig", "get_peft_model", "PeftModel"], "datasets": [],
        "pandas": [], "matplotlib": [], "matplotlib.pyplot": [], "matplotlib.patches": [],
        "torch.utils.tensorboard": ["SummaryWriter"],
        "transformers.trainer_pt_utils": ["IterableDatasetShard", "nested_detach", "find_batch_size"],
    }  # fmt: skip
    for name, classes in anything.items():
        made: Any = types.ModuleType(name)
        for kind in classes:
            setattr(made, kind, type(kind, (), {}))
        sys.modules[name] = made
    trl: Any = sys.modules["trl"]
    trl.get_kbit_device_map = trl.get_quantization_config = lambda *_: None
    trainer = mock.MagicMock()
    trainer.TrainerCallback = type("TrainerCallback", (), {})
    sys.modules["transformers.trainer"] = trainer
    arguments: Any = types.ModuleType("transformers.training_args")
    arguments.TrainingArguments = dataclasses.dataclass(type("TrainingArguments", (), {}))
    sys.modules["transformers.training_args"] = arguments
    for name, value in (("TrainingArguments", arguments.TrainingArguments), ("HfArgumentParser", object)):
        transformers.__dict__[name] = value
    if find_spec("omegaconf") is None:
        config: Any = types.ModuleType("omegaconf")
        config.OmegaConf = object
        sys.modules["omegaconf"] = config
    import hpsv3.inference

    return hpsv3.inference


def parts(module: Any, base: Path, dtype: str) -> Any:
    """Return a function in place of `parse_args_with_yaml`: the published YAML, base and dtype replaced."""

    def read(kinds: tuple[type, ...], path: str, is_train: bool = True) -> tuple[list[Any], str]:
        settings = yaml.safe_load(Path(path).read_text())
        settings |= {"model_name_or_path": str(base), "torch_dtype": dtype, "bf16": dtype == "bfloat16", "fp16": False}
        settings |= {"disable_flash_attn2": True}
        found = []
        for kind in kinds:
            names = {f.name for f in dataclasses.fields(kind)}
            made = kind(**{k: v for k, v in settings.items() if k in names})
            for key in ("bf16", "fp16", "output_dir"):
                if not hasattr(made, key):
                    setattr(made, key, settings[key])
            found.append(made)
        return found, path

    return read


def make(folder: Path) -> None:
    from safetensors.torch import save_file

    module = package()
    layout(folder / "base")
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(
        folder / "base"
    )  # tokenizer.json, which is published
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(folder / "base")).save_pretrained(folder / "base")
    layout(folder / "base")  # the names and values of the published files, not those that were saved just now
    _, training, model, lora = parts(module, folder / "base", "float32")(
        (module.DataConfig, module.TrainingConfig, module.ModelConfig, module.PEFTLoraConfig),
        str(module._MODEL_CONFIG_PATH / "HPSv3_7B.yaml"),
    )[0]
    network, _, _ = module.create_model_and_processor(model, lora, training)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            scale = 1 / p[0].numel() ** 0.5 if p.ndim > 1 and "embed_tokens" not in name else 0.2
            p.add_(torch.randn(p.shape, generator=generator) * scale)
    # The published file is bfloat16 but for the head.
    state = {k: (v if k.startswith("rm_head") else v.bfloat16()).contiguous() for k, v in network.state_dict().items()}
    save_file(state, folder / "HPSv3.safetensors")


def score(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    module = package()
    with mock.patch.object(module, "parse_args_with_yaml", parts(module, folder / "base", request["dtype"])):
        judge = module.HPSv3RewardInferencer(checkpoint_path=str(folder / "HPSv3.safetensors"), device="cpu")
    if request["widen"]:
        judge.model.float()
    judge.model.rm_head.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    found: list[Any] = []
    with torch.no_grad():
        for batch in request["batches"]:
            found.append(
                judge.reward([request["files"][i] for i in batch], [request["prompts"][i] for i in batch]).tolist()
            )
    frequencies = {
        "language": judge.model.model.rotary_emb.inv_freq,
        "vision": judge.model.visual.rotary_pos_emb.inv_freq,
    }
    return {"scores": found} | {name: value.float().tolist() for name, value in frequencies.items()}


if __name__ == "__main__":
    command, where = sys.argv[1], Path(sys.argv[2])
    if command == "make":
        make(where)
    else:
        print("\n" + json.dumps(score(where, json.load(sys.stdin))))
