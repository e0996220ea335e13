"""Prompts with pictures, as inpainting needs them: from tables, folders, or the built-in world; masks drawn or given.

H, W: image rows and columns.
"""

import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from rltune.assets import BUILTIN_PROMPTS
from rltune.builtin.illustration import illustrate
from rltune.canvas import Canvas, Picture
from rltune.config.experiment import RunConfig
from rltune.errors import UserError
from rltune.training.prompts import PromptSet, load_prompts, shortened

Masks = Literal["mixed", "box", "border"]
SetName = Literal["train", "eval"]
SETS: tuple[SetName, ...] = ("train", "eval")
BUILTIN = "builtin"
"""In a column ``image``: the picture that the built-in world draws of the prompt."""
COLUMNS = ("image", "mask", "image_sha256", "mask_sha256")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
GRID = 8
"""Drawn masks are made of this many rows and columns of tiles: of whole latents for sides that are multiples of 64."""
HOLE = re.compile(r"(box|border) ([0-7]) ([0-7]) ([1-8]) ([1-8])")
"""A mask in words: first tile row and column, and those behind the last."""
LIGHT, DARK, TILE_PX = 176, 144, 4
"""Greys of the squares, and their side, that stand for what is to be drawn where a picture is shown."""
MAX_KEPT = 64
"""Pictures that stay in memory, a worker."""


@dataclass(frozen=True)
class Pictured:
    """An image and a mask by their names."""

    image: str
    """Absolute path, or ``builtin``."""
    mask: str
    """Absolute path, or the words of a mask that is drawn."""
    prompt: str = ""
    """Of a picture of the built-in world."""
    image_sha256: str = ""
    """Of the file as it was when a run was started; empty if any will do."""
    mask_sha256: str = ""

    def read(self, height: int, width: int) -> Picture:
        """Return image and mask at a size in pixels, resized as diffusers does.

        Raises:
            UserError: A file cannot be read, or is not what it was; or the mask is of another size, or black.
        """
        return _read(self, height, width)

    def check(self) -> None:
        """Check that both are there, of one size, and that something is to be drawn.

        Raises:
            UserError: As ``read``.
        """
        image = self._image()
        self._mask(image.size)

    def _image(self) -> Image.Image:
        if self.image != BUILTIN:
            return _open(self.image, self.image_sha256).convert("RGB")
        pixels_HW3 = illustrate(self.prompt)
        if pixels_HW3 is None:
            raise UserError(
                f"prompts: the built-in world has no picture of {shortened(self.prompt)}; give an image in a column "
                "image, or a prompt such as 'a red circle on a white background'"
            )
        return Image.fromarray(pixels_HW3)

    def _mask(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Return the mask of an image of ``size``, width and height."""
        if words := HOLE.fullmatch(self.mask):
            return draw_hole(words, size[1], size[0])
        mask = _open(self.mask, self.mask_sha256)
        if mask.size != size:
            raise UserError(
                f"prompts: the mask {self.mask} is {mask.width} x {mask.height} px, its image {size[0]} x {size[1]}; "
                "give one of the same size, white where the image is to be drawn"
            )
        mask_HW: npt.NDArray[np.bool_] = np.asarray(mask.convert("L")) >= 128
        if not mask_HW.any():
            raise UserError(f"prompts: the mask {self.mask} is black, so that nothing is to be drawn; paint it white")
        return mask_HW


@lru_cache(maxsize=MAX_KEPT)
def _read(picture: Pictured, height: int, width: int) -> Picture:
    image = picture._image()
    mask_HW = picture._mask(image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        grey = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize((width, height), Image.Resampling.LANCZOS)
        mask_HW = np.asarray(grey) >= 128
    image_HW3 = np.asarray(image)
    for array in (image_HW3, mask_HW):
        array.setflags(write=False)  # it is handed out again
    return image_HW3, mask_HW


def _open(path: str, sha256: str) -> Image.Image:
    try:
        if sha256 and digest_of(path) != sha256:
            raise UserError(f"prompts: {path} is not the image that the run was started with; bring that back")
        image = Image.open(path)
        image.load()
    except OSError as error:  # Pillow's own for what is no image is one too
        raise UserError(
            f"prompts: an image cannot be read ({error.strerror or type(error).__name__}), got {path}; give the path "
            "of a PNG, JPEG or WebP file, relative to the table that names it"
        ) from error
    return image


def digest_of(path: str) -> str:
    """Return the sha256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def draw_hole(words: re.Match[str], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return the mask that words stand for, ``(H, W)``, true where an image is to be drawn."""
    top, left, bottom, right = (int(word) for word in words.groups()[1:])
    is_inside_HW = np.zeros((height, width), np.bool_)
    rows = slice(top * height // GRID, bottom * height // GRID)
    is_inside_HW[rows, left * width // GRID : right * width // GRID] = True
    return is_inside_HW if words.group(1) == "box" else ~is_inside_HW


def hole_in_words(prompt: str, index: int, masks: Masks) -> str:
    """Return a mask for prompt number ``index``: a function of its arguments alone.

    A box has sides of 3 to 5 of 8 tiles. A border leaves a box of 4 to 6 tiles a side, as for outpainting.
    """
    rng = np.random.default_rng([zlib.crc32(prompt.encode()), index])
    kind = masks if masks != "mixed" else ("box", "border")[int(rng.integers(2))]
    least, most = (3, 5) if kind == "box" else (4, 6)
    height, width = (int(side) for side in rng.integers(least, most, 2, endpoint=True))
    top, left = (int(rng.integers(0, GRID - side, endpoint=True)) for side in (height, width))
    return f"{kind} {top} {left} {top + height} {left + width}"


def prompt_set(config: RunConfig, name: SetName) -> PromptSet:
    """Return the prompts of an experiment: text, or for ``task: inpaint`` each a ``Canvas``.

    Raises:
        UserError: They cannot be read, or one has no image.
    """
    source, where = getattr(config.prompts, name), f"prompts.{name}"
    if config.task != "inpaint":
        return load_prompts(source, where=where)
    return load_canvases(source, where=where, masks=config.prompts.masks)


def load_canvases(source: str | Sequence[str], *, where: str, masks: Masks) -> PromptSet:
    """Return prompts with pictures; the pictures are read when they are asked for.

    Args:
        source: ``builtin`` or ``builtin-heldout``; a table with columns prompt, image and perhaps mask, whose paths are
            relative to it; or a folder with ``NAME.png``, ``NAME.txt`` and perhaps ``NAME.mask.png``.
        where: Path of the setting, for messages.
        masks: What is drawn where none is given.

    Raises:
        UserError: The prompts cannot be read, or one has no image.
    """
    if not isinstance(source, str):
        raise UserError(
            f"{where}: prompts that are written out have no images, which task: inpaint fills, got a list of "
            f"{len(source)}; give a table with columns prompt and image, a folder of images, or {BUILTIN}"
        )
    path = Path(source).expanduser()
    if source in BUILTIN_PROMPTS:
        found = load_prompts(source, where=where)
        rows: Sequence[Mapping[str, Any]] = [{"image": BUILTIN}] * len(found.prompts)
    elif path.is_dir():
        found, rows = _read_folder(path, where)
    else:
        found = load_prompts(source, where=where, beside=COLUMNS)
        rows = found.beside or [{}] * len(found.prompts)
    root = (path if path.is_dir() else path.parent).absolute()
    canvases = tuple(
        canvas_of({"prompt": prompt, **row}, root, where=f"{where}: prompt {i + 1}", index=i, masks=masks)
        for i, (prompt, row) in enumerate(zip(found.prompts, rows, strict=True))
    )
    return PromptSet(canvases, (*found.notes, "with pictures"))


def canvas_of(row: Mapping[str, Any], root: Path, *, where: str, index: int = 0, masks: Masks = "mixed") -> Canvas:
    """Return the canvas that a row of a table stands for.

    Raises:
        UserError: It has no image, or what is there is no path.
    """
    prompt, image, mask = str(row["prompt"]), row.get("image"), row.get("mask") or ""
    if not image:
        raise UserError(f"{where}: there is no image for task: inpaint to fill, got {shortened(prompt)}; give its path")
    if not isinstance(image, str) or not isinstance(mask, str):
        odd = image if not isinstance(image, str) else mask
        raise UserError(f"{where}: image and mask must be paths, got {type(odd).__name__}; write the images to files")
    if mask and HOLE.fullmatch(mask) is None:
        mask = str(root / Path(mask).expanduser())
    return Canvas(
        prompt,
        Pictured(
            image if image == BUILTIN else str(root / Path(image).expanduser()),
            mask or hole_in_words(prompt, index, masks),
            prompt if image == BUILTIN else "",
            row.get("image_sha256") or "",
            row.get("mask_sha256") or "",
        ),
    )


def _read_folder(folder: Path, where: str) -> tuple[PromptSet, list[dict[str, str]]]:
    prompts, rows = [], []
    for image in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        if image.stem.endswith(".mask"):
            continue
        text, mask = image.with_suffix(".txt"), image.with_suffix(".mask.png")
        try:
            prompts.append(" ".join(text.read_text(encoding="utf-8").split()))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: {image.name} has no prompt beside it; write one into {text}") from error
        rows.append({"image": image.name, **({"mask": mask.name} if mask.is_file() else {})})
    if not prompts:
        raise UserError(
            f"{where}: the folder holds no image ({', '.join(SUFFIXES)}), got {str(folder)!r}; name another"
        )
    return PromptSet(tuple(prompts)), rows


def kept_form(prompts: Sequence[str]) -> list[Any]:
    """Return prompts as a run keeps them, in JSON's types: text, or a row of names and digests for a canvas.

    Raises:
        UserError: A picture cannot be read.
    """
    return [_row(prompt) if isinstance(prompt, Canvas) else prompt for prompt in prompts]


def _row(canvas: Canvas) -> dict[str, str]:
    picture = canvas.source
    assert isinstance(picture, Pictured)
    row = {"prompt": str(canvas), "image": picture.image, "mask": picture.mask, "image_sha256": "", "mask_sha256": ""}
    try:
        for name in ("image", "mask"):
            if row[name] != BUILTIN and HOLE.fullmatch(row[name]) is None:
                row[f"{name}_sha256"] = getattr(picture, f"{name}_sha256") or digest_of(row[name])
    except OSError as error:
        raise UserError(f"prompts: an image cannot be read ({error.strerror}), got {error.filename}") from error
    return row


def check_pictures(prompts: Sequence[str]) -> None:
    """Check the picture of every prompt that has one.

    Raises:
        UserError: One cannot be read, or its mask is of another size or leaves nothing open.
    """
    for prompt in prompts:
        if isinstance(prompt, Canvas) and isinstance(prompt.source, Pictured):
            prompt.source.check()


def shown(canvas: Canvas, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return a canvas to look at, ``(H, W, 3)``: grey squares where it is to be drawn."""
    image_HW3, mask_HW = canvas.read(height, width)
    rows, columns = np.indices((height, width)) // TILE_PX
    squares_HW = np.where((rows + columns) % 2 == 0, LIGHT, DARK).astype(np.uint8)
    return np.where(mask_HW[..., None], squares_HW[..., None], image_HW3)
