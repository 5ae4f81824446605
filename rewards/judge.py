"""Read a judge's score as in Z-Reward (arXiv 2606.09076): a distribution from one position of an image-text model.

The chat ends with an answer marker that this code appends. The next-token logits at that one position, kept for nine
label tokens only, give the distribution by a closed-set softmax. So nothing is parsed from text, and a label inside a
reasoning trace cannot be mistaken for the answer. The student answers at once; the teacher's chat has a trace before
the marker. The paper does not say which tokens carry the nine scores: "4.5" is three tokens in every Qwen tokenizer, so
the labels are the digits 1 to 9, with score (k + 1) / 2, or the letters A to I. Nor does it print its instruction; the
words here are ours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.files import replacing_folder
from diffalign.files.published import drop_local_paths
from diffalign.pretrained import load_part
from diffalign.rewards.chat import written_chat
from diffalign.rewards.image_tensors import tensor_inputs
from diffalign.rewards.judge_prompt import LABELS, Wording, escaped, load_settings, write_settings
from diffalign.rewards.published_weights import pretrained
from diffalign.rewards.rubric import load_rubrics
from diffalign.rewards.score_distribution import LEVELS, ScoreDistribution
from diffalign.rewards.shared_prefix import shareable, shared_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Pictures = Sequence[Image.Image] | Tensor
"""Images, or float pixels [B, 3, H, W] in [0, 1] whose gradient is wanted."""


class Judge:
    """An image-text model with its processor, asked for ratings of images.

    model: what `AutoModelForImageTextToText` loads, in any state of training; nothing here freezes it. processor: its
    own. labels: "digits" or "letters". rubrics: dimension to text; default: our four. token_ids: those of the nine
    labels. levels: their scores.

    Raises DiffalignError if the processor has no image processor or chat template, or if the tokenizer does not write
    each label after the marker as one token of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        labels: str = "digits",
        rubrics: Mapping[str, str] | None = None,
        wording: Wording | None = None,
    ) -> None:
        if labels not in LABELS:
            raise DiffalignError(f"labels {labels!r}: one of {', '.join(LABELS)}")
        self.model = model
        self.processor = processor
        self.labels = labels
        self.rubrics = dict(load_rubrics() if rubrics is None else rubrics)
        self.levels = LEVELS
        self.wording = wording or Wording()
        self.tokenizer = checked_tokenizer(processor)
        self.token_ids = label_tokens(self.tokenizer, LABELS[labels], self.wording.marker)
        self.tokenizer.padding_side = "left"  # the last position is the answer's for every sample
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the model."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def chat(self, prompt: str, dimension: str, reasoning: bool = False) -> tuple[str, str]:
        """Return the chat up to the model's answer, in two parts that are tokenised separately.

        The first, with the template's place for the image, ends with the question and is the same for every dimension;
        the second begins with the rubric. Raises DiffalignError for a dimension without one.
        """
        if dimension not in self.rubrics:
            raise DiffalignError(f"dimension {dimension!r}: unknown; there are {', '.join(self.rubrics)}")
        rubric = escaped(self.rubrics[dimension], self.tokenizer)
        ask = self.wording.rating(rubric, LABELS[self.labels], self.levels, reasoning)
        text = self.wording.question.replace("{prompt}", escaped(prompt, self.tokenizer)) + ask
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        written = written_chat(self.processor, chat)
        # The template may strip or wrap the text, so the cut is found in what it wrote.
        at = written.rfind(ask)
        return (written[:at], written[at:]) if at >= 0 else (written, "")

    def opening(self, images: Pictures, prompts: Sequence[str], dimension: str | Sequence[str]) -> dict[str, Tensor]:
        """Return inputs that end where a reasoning trace begins, padded on the left, for `model.generate`."""
        heads, tails = self._chats(prompts, dimension, reasoning=True)
        return self._append(self.encode(images, heads), [self._ids(tail) for tail in tails])

    def inputs(
        self,
        images: Pictures,
        prompts: Sequence[str],
        dimension: str | Sequence[str],
        rationales: Sequence[str | Sequence[int]] | None = None,
    ) -> dict[str, Tensor]:
        """Return inputs that end with the answer marker, padded on the left.

        dimension: one for all, or one a sample. rationales: the teacher's traces, as text or as the sampled token ids
        (cut by `trace`); they stand between the question, which then asks for reasons, and the marker. Token ids are
        used as they are, so the last len(rationale) + `marker_length(True)` positions are the trace and the marker.
        """
        heads, tails = self._chats(prompts, dimension, reasoning=rationales is not None)
        ends = [self.tail(tail) for tail in tails]
        if rationales is not None:
            if len(rationales) != len(prompts):
                raise DiffalignError(f"{len(rationales)} rationales and {len(prompts)} prompts; one a sample is needed")
            after = self._ids("\n" + self.wording.marker)
            traces = [self._ids(escaped(r, self.tokenizer)) if isinstance(r, str) else list(r) for r in rationales]
            ends = [self._ids(tail) + trace + after for tail, trace in zip(tails, traces, strict=True)]
        return self._append(self.encode(images, heads), ends)

    def tail(self, text: str) -> list[int]:
        """Return the second part of a chat and the marker, as token ids."""
        return self._ids(text) + self._ids(self.wording.marker)

    def marker_length(self, reasoning: bool = False) -> int:
        """Return how many tokens `inputs` appends after the question, or after a trace."""
        return len(self._ids("\n" + self.wording.marker if reasoning else self.wording.marker))

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the next-token logits of the nine labels at the last position, float32 [B, 9], with their gradient."""
        found = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        return self.closed(found)

    def closed(self, logits: Tensor) -> Tensor:
        """Select the nine labels from next-token logits [B, vocabulary]: float32 [B, 9]."""
        return logits[:, list(self.token_ids)].float()

    def trace(self, tokens: Sequence[int]) -> list[int]:
        """Return a sampled answer up to its end or up to the marker: the reasoning trace, as token ids."""
        ends = {*self.tokenizer.all_special_ids}
        kept = list(tokens)
        kept = kept[: next((i for i, token in enumerate(kept) if token in ends), len(kept))]
        word = self.wording.marker.strip()
        at = str(self.tokenizer.decode(kept)).find(word)
        if at < 0:
            return kept
        # The first token that reaches beyond the marker's beginning is cut, with all after it.
        lengths = range(len(kept) + 1)
        return kept[: max(0, bisect_left(lengths, at + 1, key=lambda n: len(self.tokenizer.decode(kept[:n]))) - 1)]

    def distribution(
        self, images: Pictures, prompts: Sequence[str], dimensions: Sequence[str] | None = None, *, share: bool = True
    ) -> ScoreDistribution:
        """Return the judge's distribution without reasoning, [B, dimensions, 9], with its gradient.

        share: run image and question through the model once for all dimensions, if `shared_prefix.shareable` allows it.
        """
        names = tuple(dimensions or self.rubrics)
        found = shared_logits(self, images, prompts, names) if share and len(names) > 1 and shareable(self) else None
        if found is None:
            found = torch.stack([self.logits(self.inputs(images, prompts, name)) for name in names], 1)
        return ScoreDistribution.from_logits(found, self.levels, names)

    def save(self, folder: Path) -> None:
        """Write model, processor and the settings that they were trained for, which `load_settings` reads."""
        with replacing_folder(folder) as part:
            self.model.save_pretrained(part)
            self.processor.save_pretrained(part)
            drop_local_paths(part)
            write_settings(part, self.labels, self.rubrics, self.wording)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _chats(
        self, prompts: Sequence[str], dimension: str | Sequence[str], reasoning: bool
    ) -> tuple[list[str], list[str]]:
        names = [dimension] * len(prompts) if isinstance(dimension, str) else list(dimension)
        if len(names) != len(prompts):
            raise DiffalignError(f"{len(prompts)} prompts and {len(names)} dimensions; one a sample is needed")
        chats = [self.chat(prompt, name, reasoning) for prompt, name in zip(prompts, names, strict=True)]
        return [head for head, _ in chats], [tail for _, tail in chats]

    def encode(self, images: Pictures, heads: Sequence[str]) -> dict[str, Tensor]:
        """Return model inputs for one image and one text each, padded on the left."""
        if len(images) != len(heads):
            raise DiffalignError(f"{len(images)} images and {len(heads)} prompts; one each is needed")
        shown = stand_ins(images) if isinstance(images, Tensor) else [image.convert("RGB") for image in images]
        begin = self.tokenizer.bos_token  # a template may write it already
        batch = dict(
            self.processor(
                text=list(heads),
                images=[[image] for image in shown],
                padding=True,
                return_tensors="pt",
                add_special_tokens=not (begin and heads[0].startswith(begin)),
            )
        )
        if isinstance(images, Tensor):
            batch |= tensor_inputs(self.processor.image_processor, images.to(self.device))
        return {k: v.to(self.device, self.dtype if v.is_floating_point() else None) for k, v in batch.items()}

    def _append(self, batch: dict[str, Tensor], tails: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Append token ids to each sample, and pad on the left again."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        found = dict(batch)
        for name, value in batch.items():
            if value.shape != ids.shape or value.is_floating_point():
                continue  # pixels and grids have no row a token
            # Appended tokens are attended to; any other row a token, such as Qwen's token types, gets 0.
            pad, after = {"input_ids": (self.tokenizer.pad_token_id, None), "attention_mask": (0, 1)}.get(name, (0, 0))
            rows = [
                torch.cat([value[i][mask[i]], value.new_tensor(tail if after is None else [after] * len(tail))])
                for i, tail in enumerate(tails)
            ]
            longest = max(len(row) for row in rows)
            found[name] = torch.stack([torch.cat([row.new_full((longest - len(row),), pad), row]) for row in rows])
        return found


def load_judge(
    folder: Path,
    *,
    labels: str | None = None,
    rubrics: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Judge:
    """Load the judge in a folder of transformers: one that `Judge.save` wrote, or any image-text model.

    labels, rubrics: replace those that a trained judge's folder names. Raises DiffalignError if the folder holds no
    image-text model with processor and chat template, or if its tokenizer splits a label.
    """
    from transformers import AutoModelForImageTextToText

    processor = load_processor(folder)
    checked_tokenizer(processor)  # before weights are read
    settings = load_settings(folder)
    settings |= {k: v for k, v in (("labels", labels), ("rubrics", rubrics)) if v is not None}
    model = pretrained(AutoModelForImageTextToText, folder, "zreward", dtype)
    return Judge(model.to(device).eval(), processor, **settings)


def load_processor(folder: Path) -> ProcessorMixin:
    """Load the processor in a folder. Raises DiffalignError if there is none that can be loaded."""
    from transformers import AutoProcessor

    return load_part(AutoProcessor, folder, f"{folder}: holds no processor of an image-text model")


def stand_ins(pixels: Tensor) -> list[Image.Image]:
    """Return a black image for each of [B, 3, H, W]: the processor writes everything but the pixels from their sizes."""
    return [Image.new("RGB", (pixels.shape[-1], pixels.shape[-2]))] * len(pixels)


def checked_tokenizer(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """Return the processor's tokenizer. Raises DiffalignError without tokenizer, image processor or chat template."""
    kind = type(processor).__name__
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise DiffalignError(
            f"{kind} has no image processor: this is no image-text model's folder, or preprocessor_config.json is missing"
        )
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise DiffalignError(
            f"{kind} has no chat template, so no question can be asked; use an instruction-tuned model, or add its "
            "chat_template.jinja"
        )
    return processor.tokenizer


def label_tokens(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], marker: str) -> tuple[int, ...]:
    """Return the ids of labels as they follow the marker. Raises DiffalignError unless each is one token of its own."""
    other = f"try the other labels ({', '.join(LABELS)})"
    start = tokenizer(marker, add_special_tokens=False)["input_ids"]
    found: dict[int, str] = {}
    for label in labels:
        whole = tokenizer(marker + label, add_special_tokens=False)["input_ids"]
        if whole[: len(start)] != start:
            raise DiffalignError(f"the tokenizer joins label {label!r} with the marker {marker!r} before it; {other}")
        if len(whole) != len(start) + 1:
            raise DiffalignError(
                f"the tokenizer writes label {label!r} as {len(whole) - len(start)} tokens; one is needed: {other}"
            )
        if whole[-1] in found:
            raise DiffalignError(
                f"the tokenizer writes labels {found[whole[-1]]!r} and {label!r} as the same token; {other}"
            )
        found[whole[-1]] = label
    return tuple(found)
