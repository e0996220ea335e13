"""From a prompt of this world back to a picture of it: one of the scenes that it may be a caption of."""

import random

import numpy as np
import numpy.typing as npt

from rltune.builtin.grammar import parse
from rltune.builtin.render import render
from rltune.builtin.scenes import GROUND_COLORS, MAX_OBJECTS, Scene, Style, place


def illustrate(prompt: str) -> npt.NDArray[np.uint8] | None:
    """Return a picture of a prompt, ``(64, 64, 3)`` RGB, always the same one; None if it is no caption of this world.

    What the caption leaves open (places, ground, style) is drawn as scenes draw it.
    """
    scene = scene_of(prompt)
    if scene is None:
        return None
    pixels: npt.NDArray[np.uint8] = (render([scene])[0] * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels


def scene_of(prompt: str) -> Scene | None:
    """Return the scene of ``illustrate``; None if there is none."""
    content = parse(prompt)
    if content is None or not 1 <= sum(group.count for group in content.groups) <= MAX_OBJECTS:
        return None
    rng = random.Random(prompt)
    taken = {group.color for group in content.groups}
    ground = content.ground or rng.choice([color for color in GROUND_COLORS if color not in taken])
    words = {part.strip() for part in prompt.lower().split(",")[1:]}
    style = Style(
        is_shaded=_said(words, "glossy", "flat", rng),
        has_shadow=_said(words, "with soft shadows", "no shadows", rng),
        is_regular=_said(words, "neatly arranged", "scattered", rng),
        has_vignette=_said(words, "dark corners", "even light", rng),
        saturation=rng.uniform(
            *((0.93, 1.0) if "vivid" in words else (0.75, 0.82) if "muted" in words else (0.75, 1.0))
        ),
    )
    placed = place(rng, content.groups, is_regular=style.is_regular)
    is_striped = f"a striped {ground} background" in " ".join(prompt.lower().split())
    return Scene(content.groups, ground, is_striped, style, placed, noise_seed=rng.getrandbits(32))


def _said(words: set[str], yes: str, no: str, rng: random.Random) -> bool:
    drawn = rng.random() < 0.45
    return yes in words or (drawn and no not in words)
