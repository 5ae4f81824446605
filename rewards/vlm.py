"""Base class of rewards on image-text models: folder, chat template, batches padded on the left.

Any model that `AutoModelForImageTextToText` and `AutoProcessor` load from one folder works. Padding is on the left, so
that the last position is the answer's for every sample of a batch.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.pretrained import load_part
from diffalign.rewards.base import Prepared
from diffalign.rewards.chat import written_chat
from diffalign.rewards.learned import LearnedOptions, LearnedReward
from diffalign.rewards.published_weights import pretrained


class VisionLanguageOptions(LearnedOptions, total=False):
    """Options of every reward on an image-text model; `VisionLanguageReward` explains them."""

    model: str | None


class VisionLanguageReward(LearnedReward):
    """A reward on an image-text model.

    model: a hub id that replaces the default. weights: a local folder with model and processor.
    """

    preprocessing = "RGB, the model's own processor"

    def __init__(self, *, model: str | None = None, **shared: Unpack[LearnedOptions]) -> None:
        shared.setdefault("dtype", "bfloat16" if str(shared.get("device", "cpu")).startswith("cuda") else "float32")
        super().__init__(**shared)
        if model is not None:
            self.repo = model
        self._processor: Any = None

    def build(self) -> torch.nn.Module:
        from transformers import AutoModelForImageTextToText

        return pretrained(AutoModelForImageTextToText, self.path, self.name, self.dtype)

    @property
    def processor(self) -> Any:
        """The processor, loaded at first use."""
        if self._processor is None:
            from transformers import AutoProcessor

            self._processor = load_part(AutoProcessor, self.processor_path, f"reward {self.name}")
            self._processor.tokenizer.padding_side = "left"
        return self._processor

    @property
    def processor_path(self) -> Path:
        """The folder of the processor."""
        return self.path

    def encode(self, images: Sequence[Image.Image], texts: list[str], **image_options: bool) -> dict[str, Tensor]:
        """Return model inputs for one image and one question each, up to where the answer begins.

        image_options: options of the image processor.
        """
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
            for image, text in zip(images, texts, strict=True)
        ]
        written = [written_chat(self.processor, chat) for chat in chats]
        batch = self.processor(
            text=written, images=[[image] for image in images], padding=True, return_tensors="pt", **image_options
        )
        return {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in batch.items()
        }

    def one_token(self, word: str) -> int:
        """Return the id of a word. Raises DiffalignError if the model's tokenizer does not write it as one token."""
        ids = self.processor.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            whose = self.repo if self.local is None else self.local
            raise DiffalignError(f"reward {self.name}: {whose} writes {word!r} as {len(ids)} tokens; one is needed")
        return int(ids[0])


def plain(prompt: str) -> str:
    """Return the prompt without chat markup such as <|im_end|> or <|image_pad|>, which would end the question or add an
    image.
    """
    return re.sub(r"<\|[^<>|]*\|>", " ", prompt)


def pictures(items: Sequence[Prepared]) -> list[Image.Image]:
    """Return the RGB images of a batch."""
    return [item.convert("RGB") for item in items if isinstance(item, Image.Image)]
