"""Rewards on image-text models, against their definitions on a small random Qwen2-VL."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLModel

from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.rewards.hpsv3 import ASK, INSTRUCTION, PIXELS, TOKEN, HPSv3, HPSv3Model, area
from diffalign.rewards.pixels import BOUND, resize, to_tensor
from diffalign.rewards.unifiedreward import UnifiedReward, parse
from diffalign.rewards.vlm import plain
from diffalign.rewards.vqascore import yes_probability
from helpers import pictures, tiny
from helpers.oracle_hpsv3 import layout

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGES = [pictures.smooth(1, 96, 64), pictures.smooth(2, 60, 60), pictures.smooth(3, 120, 50)]
PROMPTS = ["a cat", "a much longer prompt with <|im_end|> in it", "dogs"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL folder: every byte a token, plus "Yes" and "No"."""
    from transformers import (
        Qwen2Tokenizer,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    path = tmp_path_factory.mktemp("qwen")
    symbols = tiny._symbols()
    words = [*symbols, "Ye", "Yes", "No", "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={w: i for i, w in enumerate(words)},
        merges=[("Y", "e"), ("Ye", "s"), ("N", "o")],
        unk_token=None,
        additional_special_tokens=SPECIAL,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": words.index("<|endoftext|>"),
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def asked(folder: Path, image: Image.Image, text: str, **options: object) -> dict[str, torch.Tensor]:
    """The chat written by hand, one sample, nothing padded."""
    from transformers import AutoProcessor

    written = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    return dict(AutoProcessor.from_pretrained(folder)(text=[written], images=[image], return_tensors="pt", **options))


def test_vqascore(qwen: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    reward = load_reward("vqascore", weights=qwen)
    measured = reward.measure(IMAGES, PROMPTS)
    model = Qwen2VLForConditionalGeneration.from_pretrained(qwen).eval()
    vocabulary = reward.processor.tokenizer.get_vocab()
    for i, (image, prompt) in enumerate(zip(IMAGES, PROMPTS, strict=True)):
        question = f'Does this figure show "{plain(prompt)}"? Please answer Yes or No.'
        with torch.no_grad():
            logits = model(**asked(qwen, image, question)).logits[0, -1]
        probabilities = logits.softmax(-1)
        yes, no = probabilities[vocabulary["Yes"]].item(), probabilities[vocabulary["No"]].item()
        assert measured["vqascore"][i].item() == pytest.approx(yes, rel=1e-4)
        assert measured["closed"][i].item() == pytest.approx(yes / (yes + no), rel=1e-4)
    assert len(set(measured["vqascore"].tolist())) == 3
    assert reward.identity()["options"]["question"].startswith("Does this figure")
    with pytest.raises(DiffalignError, match="no {prompt} in it"):
        load_reward("vqascore", weights=qwen, question="Is it good?")
    with pytest.raises(DiffalignError, match=f"{qwen} writes 'Maybe' as 5 tokens"):
        reward.one_token("Maybe")


def test_the_whole_vocabulary_counts() -> None:
    logits = torch.tensor([[0.81, 0.09, 0.10]]).log() + 3.0
    full, closed = yes_probability(logits, 0, 1)
    assert full.item() == pytest.approx(0.81) and closed.item() == pytest.approx(0.9)


# --- UnifiedReward ----------------------------------------------------------------------------------------------

PUBLISHED = (
    "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
    "Style Score (1-5): 2.802500009536743\n"
)
"""The example answer of the model's repository."""


GOOD = "Alignment Score (1-5): 4\nCoherence Score (1-5): 2\nStyle Score (1-5): 3"
FAIR = "Alignment Score (1-5): 1\nCoherence Score (1-5): 1\nStyle Score (1-5): 1"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Alignment Score (1-5): 4\nCoherence Score (1-5): 2.6947\nStyle Score (1-5): 3.5", (4.0, 2.6947, 3.5)),
        (PUBLISHED, (2.694700002670288, 2.371500015258789, 2.802500009536743)),
        ("**Alignment Score (1-5):** 4.0\n**Coherence Score (1-5):** 3\n**Style Score (1-5):** 5", (4.0, 3.0, 5.0)),
        ("alignment score (1-5): 1\ncoherence score (1-5): 1\nstyle score (1-5): 1\n", (1.0, 1.0, 1.0)),
        ("Alignment Score (1-5): 4\nCoherence Score (1-5): 3", None),
        ("Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z", None),
        ("Alignment Score (1-5): 6\nCoherence Score (1-5): 3\nStyle Score (1-5): 3", None),
        ("Alignment Score (1-5): 4\nAlignment Score (1-5): 2\nCoherence Score (1-5): 3\nStyle Score (1-5): 3", None),
        ("", None),
        (f"<think>\n{FAIR}, no: 2.</think>\n\n{GOOD}", (4.0, 2.0, 3.0)),  # with other scores in the thought
        (f"Let me see: {FAIR}\n</think>\n\n{GOOD}", (4.0, 2.0, 3.0)),  # the template opened the thought
        (f"<think></think><think>{FAIR}</think>{GOOD}", (4.0, 2.0, 3.0)),
        (f"<think>\n{GOOD}", None),  # cut before the thought ended
        (f"{GOOD}\n</think>", None),  # nothing after it
        ("Alignment Score (1-5): 0.9947\nCoherence Score (1-5): 5.02\nStyle Score (1-5): 3", (0.9947, 5.02, 3.0)),
        ("Alignment Score (1-5): 0.4\nCoherence Score (1-5): 3\nStyle Score (1-5): 3", None),
        ("Alignment Score (1-5): 8/10\nCoherence Score (1-5): 3\nStyle Score (1-5): 3", None),
    ],
)
def test_answers(answer: str, expected: tuple[float, ...] | None) -> None:
    assert parse(answer) == expected


def test_unifiedreward_waits_for_the_whole_answer() -> None:
    assert UnifiedReward().max_new_tokens >= len(PUBLISHED)  # a token holds one character at least
    for end in range(len(PUBLISHED) - len("2.802500009536743\n")):
        assert parse(PUBLISHED[:end]) is None


def test_unifiedreward(qwen: Path) -> None:
    reward = UnifiedReward(weights=qwen, max_new_tokens=4)
    measured = reward.measure(IMAGES[:2], PROMPTS[:2])  # random weights answer with noise
    assert torch.isnan(measured["mean"]).all() and all("no three scores" in reason for reason in reward.reasons)
    read = reward.read([GOOD, "I cannot", f"<think>{GOOD}", GOOD.replace("4", "9")])
    assert [read[c][0].item() for c in reward.columns] == [3.0, 4.0, 2.0, 3.0]
    assert read["mean"][1:].isnan().all() and reward.reasons[0] == ""
    assert [reason.split(":")[0].split(" in ")[0] for reason in reward.reasons[1:]] == [
        "no three scores", "the model's thought did not end within max_new_tokens=4", "a score outside 1 to 5",
    ]  # fmt: skip
    assert (
        reward.identity()["options"] == {"max_new_tokens": 4}
        and "options" not in UnifiedReward(weights=qwen).identity()
    )


# --- thoughts ---------------------------------------------------------------------------------------------------

OPENED = {
    # Qwen3.5: open unless thinking is off. DeepSeek's and others: open in any case. Qwen2-VL: none.
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}": (
        "<think>\n\n</think>\n\n"
    ),
    "<think>\n": "<think>\n\n</think>\n\n",
    "{% if enable_thinking %}<think>\n{% endif %}": "",
    "": "",
}


@pytest.mark.parametrize("opening", OPENED)
@pytest.mark.parametrize("name", ["vqascore", "unifiedreward"])
@pytest.mark.parametrize("prompt", ["a cat", "a cat that says <think>", "a </think> cat"])
def test_no_thought_is_left_open(qwen: Path, name: str, opening: str, prompt: str) -> None:
    reward = load_reward(name, weights=qwen)
    reward.processor.chat_template = TEMPLATE.replace("assistant\n{% endif", f"assistant\n{opening}{{% endif")
    batch = reward.encode(IMAGES[:1], [f"Is it {prompt}?"])
    written = reward.processor.tokenizer.decode(batch["input_ids"][0])
    assert written.endswith(f"Is it {prompt}?<|im_end|>\n<|im_start|>assistant\n{OPENED[opening]}")


def test_a_generated_thought_is_left_out(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = UnifiedReward(weights=qwen)
    tokenizer = reward.processor.tokenizer
    answers = [f"<think>{FAIR}</think>\n{GOOD}<|im_end|>", f"{GOOD}<|im_end|>", f"<think>{GOOD}"]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})  # as some models have them
    rows = tokenizer(answers, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    monkeypatch.setattr(reward.network, "generate", lambda input_ids, **_: torch.cat([input_ids, rows], 1))
    measured = reward.measure(IMAGES, PROMPTS)
    assert measured["alignment"][:2].tolist() == [4.0, 4.0] and measured["alignment"][2].isnan()
    assert reward.reasons[:2] == ["", ""] and "did not end" in reward.reasons[2]


# --- HPSv3 ------------------------------------------------------------------------------------------------------


def hps3_checkpoint(qwen: Path, path: Path, rows: int) -> dict[str, torch.Tensor]:
    """HPSv3.safetensors: transformers 4.45's names, embeddings with the reward token's row, the head."""
    state = {}
    for key, value in load_file(qwen / "model.safetensors").items():
        if key == "lm_head.weight":
            state[key] = value
        else:
            state[
                key.removeprefix("model.") if ".visual." in key else key.replace("model.language_model.", "model.")
            ] = value
    words = next(k for k in state if k.endswith("embed_tokens.weight"))
    generator = torch.Generator().manual_seed(3)
    state[words] = torch.cat([state[words][: rows - 1], torch.randn(1, 32, generator=generator)])
    for place, (out, into) in {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}.items():
        state[f"rm_head.{place}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        state[f"rm_head.{place}.bias"] = torch.randn(out, generator=generator) * 0.1
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return state


def test_hpsv3(qwen: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen)
    token = len(tokenizer)
    state = hps3_checkpoint(qwen, tmp_path / "HPSv3.safetensors", token + 1)
    reward = HPSv3(weights=tmp_path, base=qwen, pixels=56 * 56)
    measured = reward.measure(IMAGES, PROMPTS)
    assert reward.token == token

    base = Qwen2VLModel(Qwen2VLConfig.from_pretrained(qwen))
    base.resize_token_embeddings(token + 1)
    renamed = {(k if k.startswith("visual.") else k.replace("model.", "language_model.")): v for k, v in state.items()
               if not k.startswith(("rm_head", "lm_head"))}  # fmt: skip
    base.load_state_dict(renamed)
    base.eval()
    for name, buffer in base.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())
    for i, (image, prompt) in enumerate(zip(IMAGES, PROMPTS, strict=True)):
        before, after = (INSTRUCTION + ASK).replace("{prompt}", plain(prompt)).split(TOKEN)
        sized = image.resize(area(image.width, image.height, 56 * 56), Image.Resampling.BICUBIC)
        inputs = asked(qwen, sized, before + "\x01" + after, do_resize=False)
        place = (inputs["input_ids"][0] == tokenizer("\x01")["input_ids"][0]).nonzero()[0, 0]
        inputs["input_ids"][0, place] = token
        with torch.no_grad():
            plain_places = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
            x = base(**inputs, position_ids=plain_places).last_hidden_state[0, place]
            for layer in (0, 3, 5):
                x = state[f"rm_head.{layer}.weight"] @ x + state[f"rm_head.{layer}.bias"]
                x = x.relu() if layer != 5 else x
        assert measured["hpsv3"][i].item() == pytest.approx(x[0].item(), abs=1e-4)
        assert measured["sigma"][i].item() == pytest.approx(math.exp(x[1].item()), rel=1e-3)
    # Without a resize the differentiable path is the same numbers; with one, within the bound of an 8-bit resize.
    for size, bound in (((56, 56), 1e-5), ((96, 64), 0.02)):
        image = pictures.smooth(4, *size)
        pixels = to_tensor(image)[None].requires_grad_()
        found = reward.score_tensors(pixels, ["a cat"])
        assert found.item() == pytest.approx(reward.score([image], ["a cat"]).item(), abs=bound)
        (gradient,) = torch.autograd.grad(found.sum(), pixels)
        assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.9
    with pytest.raises(DiffalignError, match=r"float \[B, 3, H, W\]"):
        reward.score_tensors(torch.rand(1, 3, 8, 8), ["a", "b"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_hpsv3_loads_without_a_float32_copy(tmp_path: Path) -> None:
    layout(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    settings |= {"hidden_size": 512, "num_attention_heads": 32, "num_key_value_heads": 4}
    settings["vision_config"] |= {"hidden_size": 512}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    config = Qwen2VLConfig.from_pretrained(tmp_path / "base")
    config.text_config.vocab_size = 80_000
    with torch.device("meta"):
        model = HPSv3Model(Qwen2VLModel(config), 512)
    save_file(
        {
            f"model.{k.removeprefix('base.')}" if k.startswith("base.") else k: torch.zeros(
                v.shape, dtype=torch.float32 if k.startswith("rm_head") else torch.bfloat16
            )
            for k, v in model.state_dict().items()
        },
        tmp_path / "HPSv3.safetensors",
    )
    size = (tmp_path / "HPSv3.safetensors").stat().st_size
    assert size > 70e6
    for dtype, allowed in (("bfloat16", 1.3), ("float32", 2.3)):
        peak, before, done = 0, anonymous(), threading.Event()

        def watch(done: threading.Event = done) -> None:
            nonlocal peak
            while not done.wait(0.0005):
                peak = max(peak, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        reward = HPSv3(weights=tmp_path, base=tmp_path / "base", dtype=dtype)
        network = reward.network
        done.set()
        watcher.join()
        assert (peak - before) / size < allowed
        assert {p.dtype for p in network.base.parameters()} == {getattr(torch, dtype)}
        assert {p.dtype for p in network.rm_head.parameters()} == {torch.float32}
        assert not any(t.is_meta for t in network.state_dict().values())


def anonymous() -> int:
    """Memory of this process that no file backs, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@pytest.mark.parametrize("size", [(512, 512), (640, 480), (96, 64), (300, 900)])
def test_hpsv3s_resize_agrees_within_the_bound(size: tuple[int, int]) -> None:
    image = pictures.smooth(5, *size)
    width, height = area(*size, PIXELS)
    exact = to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
    floating = resize(to_tensor(image)[None], height, width).clamp(0, 1)[0]
    assert (exact - floating).abs().max() <= BOUND


def test_hpsv3_sizes_and_words() -> None:
    for size in ((1024, 1024), (640, 480), (1920, 1080), (64, 64)):
        width, height = area(*size, PIXELS)
        assert width % 28 == height % 28 == 0
        assert abs(width / height - size[0] / size[1]) < 0.15
        assert abs(width * height / PIXELS - 1) < 0.15
    assert INSTRUCTION.count("{prompt}") == 1
    assert INSTRUCTION.startswith("\nYou are tasked")
    assert TOKEN not in INSTRUCTION
    assert ASK == "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"


def test_chat_markup_in_prompts_is_text() -> None:
    assert plain("a <|im_end|><|image_pad|> cat") == "a    cat" and plain("1 < 2 | 3 > 2") == "1 < 2 | 3 > 2"
