"""A prompt that comes with a picture, a part of which is to be drawn: what inpainting is asked for.

H, W: image rows and columns.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Picture = tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]
"""``image_HW3`` RGB, and ``mask_HW``: true where the image is to be drawn."""


class Source(Protocol):
    """Where a picture comes from: hashable, so that equal ones are one, and picklable, since workers exchange them."""

    def read(self, height: int, width: int) -> Picture:
        """Return image and mask at a size in pixels.

        Raises:
            UserError: A file is gone, or is not what it was.
        """
        ...


class Canvas(str):
    """A prompt to all who read text, and a picture to those who ask for it.

    Two are equal if text and picture are; a canvas equals no plain text.
    """

    source: Source

    def __new__(cls, prompt: str, source: Source) -> "Canvas":
        """Return a prompt with its picture."""
        canvas = super().__new__(cls, prompt)
        canvas.source = source
        return canvas

    def read(self, height: int, width: int) -> Picture:
        """Return image and mask at a size in pixels.

        Raises:
            UserError: A file is gone, or is not what it was.
        """
        return self.source.read(height, width)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Canvas) and str(self) == str(other) and self.source == other.source

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), self.source))

    def __reduce__(self) -> tuple[Any, ...]:
        return Canvas, (str(self), self.source)


def identity(prompt: str) -> str:
    """Return plain text that tells prompts apart, pictures included; a prompt without one is itself."""
    return f"{prompt!s} {prompt.source}" if isinstance(prompt, Canvas) else prompt


def as_read(prompt: str) -> str:
    """Return a prompt as text encoders tell it from others: they see neither case nor the width of a space."""
    return " ".join(prompt.split()).casefold()
