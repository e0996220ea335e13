import itertools
import math
import random
import re
from dataclasses import replace

import pytest

from rltune.builtin.corpus import CAPTIONS_PER_PICTURE
from rltune.builtin.scenes import (
    GROUND_COLORS,
    MAX_OBJECTS,
    MIN_RADIUS,
    OBJECT_COLORS,
    SHAPES,
    Group,
    Scene,
    Style,
    distinct_scenes,
    make_scene,
    make_scenes,
)

MANY = tuple(make_scene(7, index) for index in range(2000))

COLORS, GROUNDS = "|".join(OBJECT_COLORS), "|".join(GROUND_COLORS)
NOUNS = "|".join((*SHAPES, *(f"{shape}s" for shape in SHAPES if shape != "cross"), "crosses"))
GROUP = rf"(a|an|one|two|three|four) ((striped|dotted) )?({COLORS}) ({NOUNS})"
STYLE = "|".join(("glossy", "flat", "with soft shadows", "no shadows", "dark corners", "even light"))
STYLE += "|neatly arranged|scattered|vivid|muted"
GRAMMAR = re.compile(
    rf"((a picture|an image) of )?{GROUP}( and {GROUP})?( (on|over|against) a (striped )?({GROUNDS}) background)?"
    rf"(, ({STYLE})){{0,3}}"
)


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    assert make_scene(3, 5) == make_scene(3, 5)
    assert len({make_scene(3, 5), make_scene(3, 6), make_scene(4, 5)}) == 3


def test_a_known_scene_is_the_same_on_every_machine() -> None:
    assert make_scene(0, 0).canonical_caption() == "three white stars on a gray background"
    assert make_scene(0, 0).placed[0].x == pytest.approx(0.5, abs=1e-9)  # libm may differ in the last bit


def test_splits_are_disjoint_in_content_and_one_in_ten_is_held_out() -> None:
    heldout = {scene.canonical_caption() for scene in MANY if scene.is_heldout()}
    training = {scene.canonical_caption() for scene in MANY if not scene.is_heldout()}
    assert not heldout & training
    share = sum(scene.is_heldout() for scene in MANY) / len(MANY)
    assert share == pytest.approx(0.1, abs=0.04)  # scenes repeat content, so the spread is wider than binomial (.007)


def test_the_order_of_groups_and_the_style_do_not_move_a_scene_to_the_other_split() -> None:
    scene = next(scene for scene in MANY if len(scene.groups) == 2)
    swapped = replace(scene, groups=scene.groups[::-1], style=replace(scene.style, is_shaded=not scene.style.is_shaded))
    assert swapped.canonical_caption() == scene.canonical_caption()
    assert swapped.is_heldout() == scene.is_heldout()


def test_make_scenes_continues_where_it_stopped() -> None:
    whole, end = make_scenes(1, 40, is_heldout=False)
    first, middle = make_scenes(1, 25, is_heldout=False)
    second, last = make_scenes(1, 15, is_heldout=False, start=middle)
    assert first + second == whole
    assert last == end


def test_distinct_scenes_repeat_no_content() -> None:
    scenes = distinct_scenes(7, 100, is_heldout=True)
    contents = [scene.canonical_caption() for scene in scenes]
    assert len(set(contents)) == 100
    assert all(scene.is_heldout() for scene in scenes)
    assert contents == list(dict.fromkeys(scene.canonical_caption() for scene in MANY if scene.is_heldout()))[:100]


def test_every_caption_follows_the_grammar() -> None:
    rng = random.Random(0)
    captions = [scene.caption(rng) for scene in MANY for _ in range(CAPTIONS_PER_PICTURE)]
    assert [caption for caption in captions if not GRAMMAR.fullmatch(caption)] == []
    assert sum("," in caption for caption in captions) / len(captions) == pytest.approx(0.5, abs=0.03)  # 5 sigma


def test_style_words_tell_the_truth() -> None:
    for scene in MANY:
        words = scene.style.words(num_objects=scene.num_objects)
        assert ("glossy" in words) == scene.style.is_shaded
        assert ("with soft shadows" in words) == scene.style.has_shadow
        assert ("dark corners" in words) == scene.style.has_vignette
        assert ("neatly arranged" in words) == (scene.style.is_regular and scene.num_objects > 1)


def test_a_scene_can_be_drawn_and_compressed() -> None:
    for scene in MANY:
        assert 1 <= scene.num_objects <= MAX_OBJECTS
        assert len(scene.placed) == scene.num_objects
        assert all(group.color != scene.ground for group in scene.groups)
        assert len({group.color for group in scene.groups}) == len(scene.groups)
        assert all(group.texture == "plain" for group in scene.groups) or scene.num_objects <= 3
        assert all(item.radius >= MIN_RADIUS for item in scene.placed)
        for one, other in itertools.combinations(scene.placed, 2):
            assert math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius
        for item in scene.placed:
            assert min(item.x, item.y, 1 - item.x, 1 - item.y) > item.radius * 0.8


def test_the_label_depends_on_style_alone() -> None:
    style = Style(is_shaded=True, has_shadow=False, is_regular=True, has_vignette=False, saturation=0.8)
    assert style.aesthetic() == pytest.approx(2.2 + 1.7 + 1.8)  # shading, layout; saturation .80 adds nothing
    for flag in ("has_shadow", "has_vignette"):
        assert replace(style, **{flag: True}).aesthetic() > style.aesthetic()
    assert replace(style, saturation=1.0).aesthetic() > style.aesthetic()
    assert all(1 <= scene.style.aesthetic() <= 10 for scene in MANY)


def test_the_label_is_uncorrelated_with_the_content() -> None:
    def mean_label(scenes: list[Scene]) -> float:
        return sum(scene.style.aesthetic() for scene in scenes) / len(scenes)

    for color in OBJECT_COLORS:
        scenes = [scene for scene in MANY if color in {group.color for group in scene.groups}]
        # The label's standard deviation is 1.6: 5 sigma of the difference.
        assert mean_label(scenes) == pytest.approx(mean_label(list(MANY)), abs=5 * 1.6 / math.sqrt(len(scenes)))


def test_phrases() -> None:
    assert Group(1, "plain", "orange", "cross").phrase() == "an orange cross"
    assert Group(1, "striped", "orange", "cross").phrase() == "a striped orange cross"
    assert Group(1, "plain", "red", "star").phrase("one") == "one red star"
    assert Group(3, "plain", "red", "cross").phrase() == "three red crosses"
