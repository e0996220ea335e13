"""Reads captions back: what a prompt of the built-in world asks for, whatever way it is said."""

import re
from dataclasses import dataclass

from rltune.builtin.scenes import GROUND_COLORS, NUMBERS, OBJECT_COLORS, SHAPES, STYLE_WORDS, TEXTURES, Group

_SINGULAR = {shape: shape for shape in SHAPES}
_PLURAL = {Group(2, "plain", "red", shape).phrase().split()[-1]: shape for shape in SHAPES}
_MIDDLE = rf"(?:({'|'.join(TEXTURES[1:])}) )?({'|'.join(OBJECT_COLORS)})"
_ONE = re.compile(rf"(a|an|one) {_MIDDLE} ({'|'.join(_SINGULAR)})")
_MANY = re.compile(rf"({'|'.join(NUMBERS[2:])}) {_MIDDLE} ({'|'.join(_PLURAL)})")
_GROUND = re.compile(rf" (?:on|over|against) a (?:striped )?({'|'.join(GROUND_COLORS)}) background$")
_OPENING = re.compile(r"^(?:a picture|an image) of ")


@dataclass(frozen=True)
class Content:
    """What a caption asks for. ``ground`` is None where it leaves the ground open; texture is part of a group."""

    groups: tuple[Group, ...]
    ground: str | None


def parse(caption: str) -> Content | None:
    """The content of a caption of this world, or None if it is none.

    Words of style, after a comma, are checked and not returned: what is neither content nor style might be content that
    we would miss.
    """
    text, *style = (part.strip() for part in " ".join(caption.lower().split()).split(","))
    if not set(style) <= set(STYLE_WORDS):
        return None
    text = _OPENING.sub("", text)
    ground = _GROUND.search(text)
    groups = [_parse_group(phrase) for phrase in (text[: ground.start()] if ground else text).split(" and ")]
    found = tuple(group for group in groups if group is not None)
    if len(found) < len(groups):
        return None
    return Content(found, ground.group(1) if ground else None)


def _parse_group(phrase: str) -> Group | None:
    if match := _ONE.fullmatch(phrase):
        _, texture, color, noun = match.groups()
        return Group(1, texture or "plain", color, _SINGULAR[noun])
    if match := _MANY.fullmatch(phrase):
        number, texture, color, noun = match.groups()
        return Group(NUMBERS.index(number), texture or "plain", color, _PLURAL[noun])
    return None
