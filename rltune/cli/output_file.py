"""Pictures that a command writes: what stands in the way is said before anything is drawn."""

import io
import os
from pathlib import Path

from PIL import Image

from rltune.errors import UserError

COMMON = (".png", ".jpg", ".webp", ".tif")


def check_output(path: Path) -> None:
    """Check that a picture can be written to ``path``, whose folder is made.

    Raises:
        UserError: It has no ending that Pillow writes, is a folder, or lies where nothing can be written.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        if kind is None:
            raise ValueError
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"--output: must end as a picture does, got {str(path)!r}; write {', '.join(COMMON[:-1])} or {COMMON[-1]}"
        ) from error
    check_place(path, "samples.png")


def check_place(path: Path, example: str) -> None:
    """Check that a file can be written to ``path``, whose folder is made.

    Raises:
        UserError: It is a folder, or lies where nothing can be written.
    """
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; name a file in it, such as {path / example}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {path.parent} cannot be made, {error.strerror}; name another folder") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--output: {path} cannot be written, permission denied; name another folder")


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a picture and return where it is: as PNG where the kind that was asked for has no room for its size.

    Raises:
        UserError: It cannot be written.
    """
    places = [path] if path.suffix.lower() == ".png" else [path, path.with_suffix(".png")]
    for place in places:
        try:
            picture.save(place)
        except (OSError, ValueError) as error:
            reason = error
            place.unlink(missing_ok=True)
        else:
            return place
    raise UserError(f"--output: {path} could not be written ({reason}); name another file or folder") from reason
