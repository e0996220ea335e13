import random

import pytest
from transformers import CLIPTokenizer

from rltune.builtin.scenes import make_scene
from rltune.builtin.tokenizer import CONTEXT_LENGTH, build_tokenizer, byte_alphabet, encode

CAPTIONS = [make_scene(5, index).caption(random.Random(index)) for index in range(3000)]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer(CAPTIONS)


def test_the_alphabet_has_a_distinct_printable_character_for_every_byte() -> None:
    assert len(set(byte_alphabet())) == 256
    assert all(c.isprintable() for c in byte_alphabet())


@pytest.mark.slow
def test_every_caption_word_is_one_token_and_fits(tokenizer: CLIPTokenizer) -> None:
    for caption in CAPTIONS:
        num_words = len(caption.replace(",", " ,").split())
        ids = tokenizer(caption).input_ids
        assert len(ids) == num_words + 2  # start and end
        assert len(ids) <= CONTEXT_LENGTH


def test_special_tokens_have_the_largest_ids(tokenizer: CLIPTokenizer) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_text_from_outside_the_captions_still_tokenises(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("a zebra \u2603 caf\u00e9").input_ids
    assert len(ids) > 6
    assert max(ids) < len(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebra\u2603caf\u00e9"


def test_encoding_pads_and_truncates_to_the_context(tokenizer: CLIPTokenizer) -> None:
    ids = encode(tokenizer, ["", "a red star", "a red star " * 30])
    assert ids.shape == (3, CONTEXT_LENGTH)
    assert ids[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert ids[:, -1].tolist() == [tokenizer.eos_token_id] * 3
