"""Make small genuine CLIP and T5 tokenizers in which every word of the world is one token; other text encodes too."""

import itertools

from transformers import CLIPTokenizer, T5Tokenizer

from diffalign.testbed.scenes import COLORS, SHAPES
from diffalign.testbed.shape_prompts import NUMBERS, RELATIONS, plural

WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        ["a", "an", "and", *NUMBERS.values(), *COLORS, *SHAPES, *map(plural, SHAPES)]
        + list(itertools.chain.from_iterable(r.split() for r in RELATIONS))
    )
)
CLIP_LENGTH = 16
T5_LENGTH = 12


def byte_symbols() -> list[str]:
    """Return the 256 printable stand-ins for bytes of byte-level BPE, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def apply_merges(merges: list[tuple[str, str]], symbols: list[str]) -> list[str]:
    """Apply byte-pair encoding: of the merges that fit, the one learnt first comes first."""
    for pair in merges:
        i = 0
        while i < len(symbols) - 1:
            if (symbols[i], symbols[i + 1]) == pair:
                symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
            i += 1
    return symbols


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return byte-level BPE whose merges build each word of the world from its left end."""
    merges: list[tuple[str, str]] = []
    for word in sorted(WORDS, key=len):
        symbols = apply_merges(merges, [*word[:-1], word[-1] + "</w>"])
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys(a + b for a, b in merges)]
    vocab = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH, pad_token=pad_token)


def t5_tokenizer() -> T5Tokenizer:
    """Return a unigram tokenizer of the world's words and single characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    words = [("▁" + w, -1.0) for w in WORDS]
    characters = [(chr(c), -10.0) for c in range(33, 127)] + [("▁", -10.0)]
    pieces = dict([*special, *words])
    pieces |= {c: score for c, score in characters if c not in pieces}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=T5_LENGTH)
