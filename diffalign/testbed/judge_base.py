"""Make small genuine Qwen3-VL models, with tokenizer and processor, that describe and rate the embedded world.

`diffalign testbed judge-base` makes one in CPU-minutes; none is shipped. A base has seen images of training prompts
with the reasons that a rater would note and with scores that are mostly noise, like a model that was never asked to
rate. It is the zero-shot row of a comparison, and the start of teachers and students.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.progress import Say
from diffalign.rewards.judge import Judge
from diffalign.rewards.judge_prompt import LABELS, Wording
from diffalign.testbed.judge_data import (
    CUTS,
    DEGREES,
    DIMENSIONS,
    FaultyImage,
    faulty_image,
    random_prompt,
    rating_distribution,
)
from diffalign.testbed.pretrain import learning_rate
from diffalign.testbed.tokenizers import WORDS, apply_merges, byte_symbols

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen3VLProcessor

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Every word of a question costs a token, and these models learn a question rather than read it.
WORDING = Wording(question="{prompt}\n", ask="{rubric} {how}", direct="label", reasoning="reasons", marker="Score:\n")
RUBRICS = {name: name for name in DIMENSIONS}
PATCH = 8  # 64 x 64 pixels: 64 patches, merged to 16 tokens


@dataclass(frozen=True)
class Size:
    """Widths and layers of the text model and of the image tower."""

    width: int
    layers: int
    seen_width: int
    seen_layers: int


# The dimensions of training samples in turn: comparing an image with its prompt takes longest to learn.
TAUGHT = ("alignment", "realism", "alignment", "plausibility")
SIZES = {"teacher": Size(128, 3, 96, 3), "student": Size(64, 2, 64, 2)}


@dataclass(frozen=True)
class BaseSettings:
    """How a base is trained.

    noise: the share of its scores that are uniform random, whatever the image. direct: the share of samples that answer
    without reasons.
    """

    steps: int = 3_000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 100
    noise: float = 0.6
    direct: float = 0.3


def judge_tokenizer() -> Qwen2Tokenizer:
    """Return a genuine Qwen2 tokenizer in which each word of the world is one token, with or without a space before it."""
    from transformers import Qwen2Tokenizer

    extra = [
        "reasons",
        "label",
        "user",
        "assistant",
        "Score",
        "all",
        "wrong",
        "shape",
        "color",
        "count",
        "place",
        "blur",
    ]
    words = [*WORDS, *DIMENSIONS, *DEGREES, *CUTS, *extra, "noise", "cut", "cuts", "one"]
    merges: list[tuple[str, str]] = []
    for word in sorted({form for w in words for form in (w, "Ġ" + w)} | {":Ċ", "Ġ."}, key=lambda w: (len(w), w)):
        symbols = apply_merges(merges, list(word))
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    tokens = [*byte_symbols(), *dict.fromkeys(a + b for a, b in merges), "<|endoftext|>"]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        unk_token=None,
        additional_special_tokens=list(SPECIAL),
    )


def judge_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """Return Qwen3-VL's processor for 64 x 64 images; larger ones are shrunk to about that size."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    images = Qwen2VLImageProcessor(
        size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64},
        patch_size=PATCH,
        merge_size=2,
        # Those of rendered scenes, which are mostly light ground; with 0.5 and 0.5 they have little contrast.
        image_mean=[0.85] * 3,
        image_std=[0.25] * 3,
    )
    return Qwen3VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=Qwen3VLVideoProcessor(), chat_template=TEMPLATE
    )


def untrained_judge(size: str, seed: int = 0) -> Judge:
    """Return a judge with random weights from `seed`."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer, s = judge_tokenizer(), SIZES[size]
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": s.width, "intermediate_size": 3 * s.width, "num_hidden_layers": s.layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": s.width // 4, "max_position_embeddings": 1024,
        # With the usual 0.02, which is made for widths of thousands, such a model hardly learnt to see: docs/judge.md.
        "initializer_range": s.width**-0.5, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
        "tie_word_embeddings": True, "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True,
            "mrope_section": [s.width // 8 - 2 * (s.width // 32), s.width // 32, s.width // 32],
        },
    }  # fmt: skip
    vision = {
        "depth": s.seen_layers, "hidden_size": s.seen_width, "num_heads": 4, "intermediate_size": 3 * s.seen_width,
        "patch_size": PATCH, "out_hidden_size": s.width, "num_position_embeddings": 64, "spatial_merge_size": 2,
        "deepstack_visual_indexes": [0], "initializer_range": s.seen_width**-0.5,
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    return Judge(model.eval(), judge_processor(tokenizer), rubrics=RUBRICS, wording=WORDING)


def samples(seed: int, step: int, batch: int) -> list[FaultyImage]:
    """Return a batch of images of training prompts with their faults, the dimensions of `TAUGHT` in turn."""
    rng = np.random.default_rng([seed, step, 11])
    return [
        faulty_image(random_prompt("train", rng), TAUGHT[i % len(TAUGHT)], int(rng.integers(5)), rng)
        for i in range(batch)
    ]


def noisy_level(score: float, noise: float, rng: np.random.Generator) -> int:
    """Return the index of a level: one rater's or, with probability `noise`, a uniform random one."""
    flat = np.full(len(LABELS["digits"]), 1 / len(LABELS["digits"]))
    return int(rng.choice(len(flat), p=noise * flat + (1 - noise) * rating_distribution(score)))


def base_loss(judge: Judge, shown: list[FaultyImage], settings: BaseSettings, rng: np.random.Generator) -> Tensor:
    """Return the cross-entropy of reasons, marker and label, mean over tokens; a share of the batch answers at once."""
    cut = round(settings.direct * len(shown))
    total = torch.zeros(())
    tokens = 0
    for part, reasons in ((shown[:cut], False), (shown[cut:], True)):
        if not part:
            continue
        traces = (
            [judge.tokenizer(one.reasons, add_special_tokens=False)["input_ids"] for one in part] if reasons else None
        )
        inputs = judge.inputs([o.image for o in part], [o.prompt for o in part], [o.dimension for o in part], traces)
        levels = [noisy_level(one.score, settings.noise, rng) for one in part]
        labels = torch.tensor([judge.token_ids[level] for level in levels])
        lengths = [judge.marker_length(reasons) + (len(traces[i]) if traces else 0) for i in range(len(part))]
        keep = max(lengths) + 1
        logits = judge.model(**inputs, logits_to_keep=keep, use_cache=False).logits
        targets = torch.cat([inputs["input_ids"], labels[:, None]], dim=1)[:, -keep:]
        # Left padding: a sample's own tokens are the last of the window, the label among them.
        own = torch.arange(keep)[None] >= keep - 1 - torch.tensor(lengths)[:, None]
        total = total + (F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none") * own).sum()
        tokens += int(own.sum())
    return total / tokens


def make_base(out: Path, size: str, seed: int = 0, settings: BaseSettings | None = None, say: Say = print) -> Judge:
    """Train a judge from random weights and save it in `out`; takes minutes on a CPU core."""
    settings = settings or BaseSettings()
    judge = untrained_judge(size, seed)
    judge.model.train()
    optimizer = torch.optim.AdamW(judge.model.parameters(), lr=settings.lr, weight_decay=0.01)
    started = time.monotonic()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr, settings.warmup)
        loss = base_loss(judge, samples(seed, step, settings.batch), settings, np.random.default_rng([seed, step, 13]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == settings.steps - 1:
            say(f"step {step + 1}/{settings.steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s")
    judge.model.eval()
    judge.save(out)
    return judge
