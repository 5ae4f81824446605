"""Write the chat that asks an image-text model, with no thought left open, and read its answer past a thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

BEGIN, END = "<think>", "</think>"


def written_chat(processor: ProcessorMixin, chat: Sequence[Mapping[str, object]]) -> str:
    """Return a chat in the model's own template, up to where the answer begins.

    Thinking is switched off where the template can do so. Some templates open a thought in any case; it is closed, since
    what follows would be taken for its text.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    more = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
    write = partial(processor.apply_chat_template, chat, tokenize=False, **more)
    written = str(write(add_generation_prompt=True))
    # Only the template's own opening counts: a prompt may contain the same words.
    opening = written.removeprefix(str(write(add_generation_prompt=False)))
    return written + "\n</think>\n\n" if opening.rfind(BEGIN) > opening.rfind(END) else written


def answer_after_thought(text: str) -> str | None:
    """Return what follows the last thought in a model's text; None if a thought did not end."""
    _, ended, answer = text.rpartition(END)
    return None if BEGIN in answer else answer if ended else text


def without_special(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text without the tokenizer's special tokens (end of a turn, padding), but with the marks of a thought."""
    for mark in {str(token) for token in tokenizer.all_special_tokens} - {BEGIN, END}:
        text = text.replace(mark, "")
    return text
