"""Procedural captioned scenes: what is in the picture, how it is said and how it is styled. ``render.py`` draws them.

A scene is one or two groups of like objects on a coloured ground. Its *content* (groups and ground) is what the full
caption says and decides the split; its *style* (shading, shadow, layout, vignette, saturation) decides the aesthetic
label and is said in about half of the captions only. The two are drawn independently, so a reward on style never has
to trade against what the prompt asks for.
"""

import math
import random
import zlib
from dataclasses import dataclass

SIZE_PX = 64
MAX_OBJECTS = 4
MIN_RADIUS = 7 / SIZE_PX
"""Smaller objects do not survive an 8x autoencoder of this size: stars become blobs."""

OBJECT_COLORS = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.88, 0.15),
    "green": (0.13, 0.65, 0.22),
    "blue": (0.13, 0.32, 0.88),
    "purple": (0.55, 0.18, 0.72),
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.06),
}
GROUND_COLORS = {
    "white": (0.96, 0.96, 0.96),
    "black": (0.07, 0.07, 0.07),
    "gray": (0.55, 0.55, 0.57),
    "blue": (0.50, 0.72, 0.95),
    "green": (0.62, 0.85, 0.60),
    "pink": (0.98, 0.75, 0.82),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted")
STYLE_WORDS = (
    "glossy",
    "flat",
    "with soft shadows",
    "no shadows",
    "dark corners",
    "even light",
    "neatly arranged",
    "scattered",
    "vivid",
    "muted",
)
"""Everything that a caption may say about style."""
NUMBERS = ("zero", "one", "two", "three", "four")

_COUNTS_ALONE = ((1, 2, 3, 4), (0.40, 0.30, 0.18, 0.12))
_COUNTS_PAIRED = (((1, 1), (1, 2), (2, 1), (2, 2)), (0.50, 0.20, 0.20, 0.10))
_RADIUS_OF_COUNT = {1: 0.36, 2: 0.235, 3: 0.20, 4: 0.18}
_RING_OF_COUNT = {1: 0.0, 2: 0.25, 3: 0.28, 4: 0.30}


@dataclass(frozen=True)
class Group:
    """Objects alike in everything the caption can say."""

    count: int
    texture: str
    color: str
    shape: str

    def phrase(self, article: str = "a") -> str:
        """As a noun phrase; ``article`` is used for a single object, with ``a`` turned into ``an`` where needed."""
        noun = self.color if self.texture == "plain" else f"{self.texture} {self.color}"
        if self.count == 1:
            word = "an" if article == "a" and noun[0] in "aeiou" else article
            return f"{word} {noun} {self.shape}"
        plural = "crosses" if self.shape == "cross" else f"{self.shape}s"
        return f"{NUMBERS[self.count]} {noun} {plural}"


@dataclass(frozen=True)
class Style:
    """What makes a picture pretty here. Only this enters the aesthetic label."""

    is_shaded: bool
    has_shadow: bool
    is_regular: bool
    has_vignette: bool
    saturation: float
    """1 is the palette's colour, 0 is gray; drawn from [0.75, 1]."""

    def aesthetic(self) -> float:
        """The aesthetic label in [1, 10], a weighted sum of the style factors; the mean scene gets about 5.5."""
        score = 2.2 + 1.7 * self.is_regular + 1.8 * self.is_shaded + 1.4 * self.has_shadow + 1.3 * self.has_vignette
        return min(10.0, max(1.0, score + 6.0 * (self.saturation - 0.80)))

    def words(self, *, num_objects: int) -> tuple[str, ...]:
        """Everything a caption may say about this style. Layout is only visible with two objects or more."""
        words = [
            "glossy" if self.is_shaded else "flat",
            "with soft shadows" if self.has_shadow else "no shadows",
            "dark corners" if self.has_vignette else "even light",
        ]
        if num_objects > 1:
            words.append("neatly arranged" if self.is_regular else "scattered")
        if self.saturation > 0.92:
            words.append("vivid")
        elif self.saturation < 0.83:
            words.append("muted")
        return tuple(words)


@dataclass(frozen=True)
class Placed:
    """One object: centre and radius as fractions of the picture, rotation in radians, and which group it is of."""

    x: float
    y: float
    radius: float
    rotation: float
    group: int


@dataclass(frozen=True)
class Scene:
    """One picture, complete: rendering it needs no further chance but ``noise_seed``."""

    groups: tuple[Group, ...]
    ground: str
    is_ground_striped: bool
    style: Style
    placed: tuple[Placed, ...]
    noise_seed: int
    """For colour jitter and the phase of ground stripes."""

    @property
    def num_objects(self) -> int:
        """How many objects the picture shows."""
        return sum(group.count for group in self.groups)

    def canonical_caption(self) -> str:
        """The content alone, groups in a fixed order: two scenes that show the same thing share it."""
        return f"{' and '.join(sorted(group.phrase() for group in self.groups))} on {self._ground_phrase()}"

    def is_heldout(self) -> bool:
        """Whether training must never see this content: one in ten, by hash, so that no list has to be kept."""
        return zlib.crc32(self.canonical_caption().encode()) % 10 == 0

    def caption(self, rng: random.Random, *, always_names_ground: bool = False) -> str:
        """One of the ways to say it: order, article, wording and, in half of them, one to three style words."""
        groups = list(self.groups)
        rng.shuffle(groups)
        text = " and ".join(group.phrase(rng.choice(("a", "a", "one"))) for group in groups)
        if always_names_ground or rng.random() < 0.9:
            text += f" {rng.choice(('on', 'on', 'over', 'against'))} {self._ground_phrase()}"
        if rng.random() < 0.5:
            words = rng.sample(self.style.words(num_objects=self.num_objects), rng.choice((1, 1, 2, 2, 3)))
            text += ", " + ", ".join(words)
        return rng.choices(("", "a picture of ", "an image of "), (0.8, 0.1, 0.1))[0] + text

    def _ground_phrase(self) -> str:
        return f"a {'striped ' if self.is_ground_striped else ''}{self.ground} background"


def make_scene(seed: int, index: int) -> Scene:
    """Scene number ``index`` of the endless sequence ``seed``; the same on every machine."""
    rng = random.Random(f"{seed}/{index}")
    ground = rng.choice(tuple(GROUND_COLORS))
    is_ground_striped = rng.random() < 0.12
    groups = _draw_groups(rng, ground)
    style = Style(
        is_shaded=rng.random() < 0.45,
        has_shadow=rng.random() < 0.45,
        is_regular=rng.random() < 0.45,
        has_vignette=rng.random() < 0.45,
        saturation=rng.uniform(0.75, 1.0),
    )
    placed = place(rng, groups, is_regular=style.is_regular)
    return Scene(groups, ground, is_ground_striped, style, placed, noise_seed=rng.getrandbits(32))


def make_scenes(seed: int, num_scenes: int, *, is_heldout: bool, start: int = 0) -> tuple[tuple[Scene, ...], int]:
    """The next ``num_scenes`` scenes of one split from index ``start`` on, and the index after the last one."""
    scenes: list[Scene] = []
    index = start
    while len(scenes) < num_scenes:
        scene = make_scene(seed, index)
        index += 1
        if scene.is_heldout() == is_heldout:
            scenes.append(scene)
    return tuple(scenes), index


def distinct_scenes(seed: int, num_scenes: int, *, is_heldout: bool) -> tuple[Scene, ...]:
    """The first ``num_scenes`` scenes of one split that no earlier one shares its content with."""
    scenes: dict[str, Scene] = {}
    index = 0
    while len(scenes) < num_scenes:
        scene = make_scene(seed, index)
        index += 1
        if scene.is_heldout() == is_heldout:
            scenes.setdefault(scene.canonical_caption(), scene)
    return tuple(scenes.values())


def _draw_groups(rng: random.Random, ground: str) -> tuple[Group, ...]:
    is_single = rng.random() < 0.6
    counts = (rng.choices(*_COUNTS_ALONE)[0],) if is_single else rng.choices(*_COUNTS_PAIRED)[0]
    # An object in the ground's own colour name would be invisible or, for blue and green, ambiguous.
    colors = rng.sample([color for color in OBJECT_COLORS if color != ground], len(counts))
    groups = []
    for count, color in zip(counts, colors, strict=True):
        texture = rng.choices(TEXTURES, (0.82, 0.12, 0.06))[0]
        # Fine texture on small objects does not survive compression.
        if sum(counts) > 3 or (texture == "dotted" and not (is_single and count <= 2)):
            texture = "plain"
        groups.append(Group(count, texture, color, rng.choice(SHAPES)))
    return tuple(groups)


def place(rng: random.Random, groups: tuple[Group, ...], *, is_regular: bool) -> tuple[Placed, ...]:
    """Return where the objects of these groups are, none upon another."""
    owners = [number for number, group in enumerate(groups) for _ in range(group.count)]
    rng.shuffle(owners)
    spots = _regular_spots(rng, len(owners)) if is_regular else _scattered_spots(rng, len(owners))
    rotations = [0.0 if is_regular else rng.uniform(-0.35, 0.35) for _ in owners]
    return tuple(Placed(*spot, rotation, owner) for spot, rotation, owner in zip(spots, rotations, owners, strict=True))


def _regular_spots(rng: random.Random, count: int) -> list[tuple[float, float, float]]:
    """Equal objects on a ring around the centre, as (x, y, radius)."""
    radius = _RADIUS_OF_COUNT[count] * rng.uniform(0.92, 1.05)
    ring = _RING_OF_COUNT[count]
    if count > 1:
        radius = min(radius, 0.94 * ring * math.sin(math.pi / count))  # neighbours must not touch
    first = -math.pi / 2 if count == 3 else rng.choice((0.0, math.pi / 4, math.pi / 2))
    angles = [first + 2 * math.pi * i / count for i in range(count)]
    return [(0.5 + ring * math.cos(angle), 0.5 + ring * math.sin(angle), radius) for angle in angles]


def _scattered_spots(rng: random.Random, count: int) -> list[tuple[float, float, float]]:
    """Disjoint random circles, as (x, y, radius), by rejection; starts again when it has painted itself in."""
    while True:
        spots: list[tuple[float, float, float]] = []
        for _ in range(40 * count):
            if len(spots) == count:
                return spots
            radius = max(MIN_RADIUS, _RADIUS_OF_COUNT[count] * rng.uniform(0.72, 1.0))
            x, y = (rng.uniform(radius + 0.02, 0.98 - radius) for _ in range(2))
            if all(math.hypot(x - x2, y - y2) > radius + radius2 + 0.01 for x2, y2, radius2 in spots):
                spots.append((x, y, radius))
