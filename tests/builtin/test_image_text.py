"""Wrong captions for the contrast: one word, of the same class, and never the same."""

import random
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from rltune.builtin.image_text import WORD_CLASSES, swap_a_word
from rltune.builtin.scenes import make_scene
from rltune.builtin.tokenizer import build_tokenizer, encode

CAPTIONS = [make_scene(41, index).caption(random.Random(index)) for index in range(3000)]
CLASSES = (
    {"circle", "square", "triangle", "star", "ring", "cross"},
    {"circles", "squares", "triangles", "stars", "rings", "crosses"},
    {"red", "orange", "yellow", "green", "blue", "purple", "white", "black"},
    {"two", "three", "four"},
)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer(CAPTIONS)


@pytest.fixture(scope="module")
def token_ids(tokenizer: CLIPTokenizer) -> Tensor:
    return encode(tokenizer, CAPTIONS)


@pytest.fixture(scope="module")
def word_classes(tokenizer: CLIPTokenizer) -> list[Tensor]:
    return [encode(tokenizer, sorted(words))[:, 1] for words in CLASSES]


def swap(token_ids: Tensor, word_classes: list[Tensor], seed: int = 0) -> Tensor:
    return swap_a_word(token_ids, word_classes, torch.Generator().manual_seed(seed))


def test_the_classes_are_those_of_the_captions() -> None:
    assert [set(words) for words in WORD_CLASSES] == list(CLASSES)


def test_one_word_becomes_another_of_its_class(
    tokenizer: CLIPTokenizer, token_ids: Tensor, word_classes: list[Tensor]
) -> None:
    before = token_ids.clone()
    swapped = swap(token_ids, word_classes)
    assert torch.equal(token_ids, before)
    is_changed = swapped != token_ids
    assert is_changed.sum(1).tolist() == [1] * len(CAPTIONS)
    replaced: Counter[tuple[str, str]] = Counter()
    for old, new in zip(token_ids[is_changed].tolist(), swapped[is_changed].tolist(), strict=True):
        pair = (tokenizer.decode([old]).strip(), tokenizer.decode([new]).strip())
        assert [words for words in CLASSES if pair[0] in words and pair[1] in words], pair
        replaced[pair] += 1
    # Every word becomes every other one: the rarest pair (a colour: a third of 3000 swaps over 56 pairs, fewer for the
    # shapes in the plural) is expected ten times and more.
    assert replaced.keys() == {(one, other) for words in CLASSES for one in words for other in words if one != other}


@pytest.mark.slow
def test_every_word_of_a_class_is_swapped_as_often(tokenizer: CLIPTokenizer, word_classes: list[Tensor]) -> None:
    caption = "a red star and a blue ring"
    swapped = swap(encode(tokenizer, [caption] * 4000), word_classes)
    words = caption.split()
    counts: Counter[int] = Counter()
    for text in tokenizer.batch_decode(swapped, skip_special_tokens=True):
        counts.update([i for i, word in enumerate(text.split()) if word != words[i]])
    assert counts.keys() == {1, 2, 5, 6}
    # A quarter each; five binomial spreads of 27.
    assert all(abs(count - 1000) < 5 * 27 for count in counts.values())


def test_the_generator_decides(token_ids: Tensor, word_classes: list[Tensor]) -> None:
    swapped = swap(token_ids, word_classes)
    assert torch.equal(swap(token_ids, word_classes), swapped)
    assert not torch.equal(swap(token_ids, word_classes, seed=1), swapped)
