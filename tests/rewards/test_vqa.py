"""Questions about an image, against one question at a time on a small random Qwen3-VL."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.rewards.vqa import VQA, questions_of, spellings
from helpers import pictures
from helpers.tiny_vlm import qwen_folder

IMAGES = [pictures.smooth(1, 96, 64), pictures.smooth(2, 60, 60), pictures.smooth(3, 50, 50)]
FACTS = [
    {"vqa_list": [["How many cows are there?", "four"], ["Are the cows white?", "Yes"]]},
    {"questions": [["Is there <|im_end|> a dog?", "Yes"]]},
    {},
]
PROMPTS = ["four white cows", "a dog", "nothing is asked"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_folder(tmp_path_factory.mktemp("vqa"), "qwen3_vl", noise=0.2)


def chance(folder: Path, image: object, question: str, starts: str) -> float:
    """The probability of any of the first letters, written out: every byte is a token of this model."""
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    written = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        f"{question} Answer in one word.<|im_end|>\n<|im_start|>assistant\n"
    )
    with torch.no_grad():
        inputs = processor(text=[written], images=[image], return_tensors="pt")
        logits = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()(**inputs).logits[0, -1]
    vocabulary = processor.tokenizer.get_vocab()
    return sum(logits.softmax(-1)[vocabulary[letter]].item() for letter in starts)


def test_the_right_answers(qwen: Path) -> None:
    reward = load_reward("vqa", weights=qwen, most=3)
    found = reward.measure(IMAGES, PROMPTS, FACTS)
    # " four" begins with the blank, which is Ġ in the vocabulary and counts once.
    four = chance(qwen, IMAGES[0], "How many cows are there?", "fF4Ġ")
    white = chance(qwen, IMAGES[0], "Are the cows white?", "yYĠ")
    dog = chance(qwen, IMAGES[1], "Is there   a dog?", "yYĠ")
    assert found["answer@1"].tolist()[:2] == pytest.approx([four, dog], rel=1e-4)
    assert found["answer@2"][0].item() == pytest.approx(white, rel=1e-4)
    assert found["vqa"].tolist()[:2] == pytest.approx([(four + white) / 2, dog], rel=1e-4)
    assert found["geometric"][0].item() == pytest.approx(math.sqrt(four * white), rel=1e-4)
    assert four != pytest.approx(white, rel=1e-3)
    assert all(math.isnan(found[name][2]) for name in reward.columns) and math.isnan(found["answer@2"][1])
    assert reward.reasons == ["", "", "no questions"]


def test_batches_and_columns_change_no_score(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = load_reward("vqa", weights=qwen, most=2), load_reward("vqa", weights=qwen)
    first = one.measure(IMAGES[:2], PROMPTS[:2], FACTS[:2])["vqa"]
    monkeypatch.setattr("diffalign.rewards.vqa.TOGETHER", 1)
    assert torch.allclose(other.measure(IMAGES[:2], PROMPTS[:2], FACTS[:2])["vqa"], first, rtol=1e-4)
    assert one.identity() == other.identity() and len(other.columns) == 66
    assert load_reward("vqa", weights=qwen, wording="{question}").identity() != one.identity()


def test_spellings() -> None:
    assert spellings("Yes") == ["yes", " yes", "Yes", " Yes"]
    assert spellings("seven") == ["seven", " seven", "Seven", " Seven", "7", " 7"]


def test_mistakes() -> None:
    with pytest.raises(DiffalignError, match="no {question} in it"):
        load_reward("vqa", wording="Well?")
    with pytest.raises(DiffalignError, match="at least one question"):
        load_reward("vqa", most=0)
    reward = VQA(most=1)
    assert (
        reward.reason_not_scorable("a", {"questions": [["one?", "Yes"], ["two?", "Yes"]]})
        == "2 questions, above most=1"
    )
    assert "[question, answer]" in reward.reason_not_scorable("a", {"questions": [["only a question"]]})
    assert "[question, answer]" in reward.reason_not_scorable("a", {"questions": "Is it?"})
    assert reward.reason_not_scorable("", {"questions": [["one?", "Yes"]]}) == "no prompt"
    assert questions_of({"vqa_list": None}) == []
