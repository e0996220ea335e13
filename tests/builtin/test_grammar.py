"""Captions read back against the scenes that they were made of, and against contents written by hand."""

import random
from collections import Counter

import pytest

from rltune.builtin.grammar import Content, parse
from rltune.builtin.scenes import Group, make_scene

SCENES = tuple(make_scene(17, index) for index in range(3000))


@pytest.mark.slow
def test_every_caption_parses_back_to_its_scene() -> None:
    rng = random.Random(0)
    num_open = 0
    for scene in SCENES:
        for _ in range(2):
            caption = scene.caption(rng)
            content = parse(caption)
            assert content is not None, caption
            assert Counter(content.groups) == Counter(scene.groups), caption
            names_ground = "background" in caption
            assert content.ground == (scene.ground if names_ground else None), caption
            num_open += not names_ground
    # One caption in ten leaves the ground open: a mean of 600, and a binomial spread of 23.
    assert abs(num_open - 600) < 5 * 23


def test_a_caption_that_always_names_the_ground_parses_to_one() -> None:
    rng = random.Random(1)
    for scene in SCENES:
        for caption in (scene.canonical_caption(), scene.caption(rng, always_names_ground=True)):
            content = parse(caption)
            assert content is not None, caption
            assert content.ground == scene.ground, caption


@pytest.mark.parametrize(
    ("caption", "content"),
    [
        ("a red circle", Content((Group(1, "plain", "red", "circle"),), None)),
        ("one red circle", Content((Group(1, "plain", "red", "circle"),), None)),
        ("an orange cross on a pink background", Content((Group(1, "plain", "orange", "cross"),), "pink")),
        ("four black crosses over a gray background", Content((Group(4, "plain", "black", "cross"),), "gray")),
        ("a dotted purple ring", Content((Group(1, "dotted", "purple", "ring"),), None)),
        (
            "an image of two striped blue stars and one white square against a striped green background, flat, muted",
            Content((Group(2, "striped", "blue", "star"), Group(1, "plain", "white", "square")), "green"),
        ),
        ("a picture of three yellow triangles, glossy", Content((Group(3, "plain", "yellow", "triangle"),), None)),
        ("  A Red Circle on a White Background ", Content((Group(1, "plain", "red", "circle"),), "white")),
    ],
)
def test_contents_written_by_hand(caption: str, content: Content) -> None:
    assert parse(caption) == content


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        ", glossy",
        "a cat",
        "a photo of a red circle",
        "a picture of",
        "red circle",
        "the red circle",
        "five red circles",
        "two red star",
        "a red circles",
        "a red stares",
        "three red crosss",
        "a red star, a blue ring",  # a second object after the comma must not be overlooked
        "a red star, in watercolor",
        "zero red circles",
        "a pink circle",  # a ground's colour, and no object's
        "a crimson circle",
        "a red hexagon",
        "a red",
        "a circle",
        "a plain red circle",
        "a red striped circle",
        "a red circle.",
        "a red circle and",
        "and a red circle",
        "a red circle and and a blue ring",
        "a red circle a blue ring",
        "a red circle and a cat",
        "a red circle indeed",
        "a red circle on a white background indeed",
        "a red circle on white",
        "a red circle on a purple background",  # an object's colour, and no ground's
        "a red circle on a white background on a black background",
        "a red circle on a white background and a blue ring",
        "on a white background",
        "an image of a picture of a red circle",
    ],
)
def test_what_is_no_caption_has_no_content(text: str) -> None:
    assert parse(text) is None
