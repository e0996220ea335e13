"""A byte-level CLIP tokenizer whose merges are learnt from our own captions.

Every caption word becomes one token; any other UTF-8 text still tokenises, byte by byte. The two special tokens have
the largest ids because open_clip finds the end of a text as the position of its largest id.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor
from transformers import CLIPTokenizer

CONTEXT_LENGTH = 32


def byte_alphabet() -> tuple[str, ...]:
    """One printable character a byte, in GPT-2's order (openai/gpt-2, ``encoder.py``, ``bytes_to_unicode``)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(c) for c in printable) + tuple(chr(256 + i) for i in range(len(others)))


def learn_merges(captions: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Byte-pair merges, most frequent pair first, until every word of ``captions`` is one token."""
    counts = Counter(word for caption in captions for word in _words(caption))
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return tuple(merges)
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}


def build_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A tokenizer with the merges of ``captions``; pads with its end token to ``CONTEXT_LENGTH``."""
    merges = learn_merges(captions)
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=CONTEXT_LENGTH)


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids, ``(B, CONTEXT_LENGTH)`` int64, padded the way the diffusers pipeline pads."""
    ids = tokenizer(captions, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True).input_ids
    return torch.tensor(ids)


def _words(caption: str) -> list[str]:
    # The tokenizer's pre-tokenisation splits punctuation off; commas are the only kind here.
    return caption.lower().replace(",", " , ").split()


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
