"""The section of an experiment that says where prompts come from, and for inpainting their pictures."""

from typing import Annotated, Literal

from pydantic import Field

from rltune.config.strict import Int, PathText, StrictModel, Text

Prompts = PathText | Annotated[tuple[Text, ...], Field(min_length=1)]
BUILTIN_PROMPTS = ("builtin", "builtin-heldout")
"""The prompt sets that ship with the built-in model; any other text is the path of a file."""


class PromptsConfig(StrictModel):
    """Where prompts come from."""

    train: Prompts = "builtin"
    """Prompts to train on: ``builtin``, ``builtin-heldout``, a list, or a file: text with one prompt a line (lines that
    start with ``#`` are left out), or a .csv, .tsv, .json, .jsonl or .parquet with a column prompt, caption or text.
    For ``task: inpaint`` a table has a column image too, and may have a column mask: paths from the table's folder, a
    mask white where it is to be drawn. Or it is a folder with ``NAME.png``, its prompt in ``NAME.txt``, and perhaps
    ``NAME.mask.png``. ``builtin`` comes with pictures of its prompts."""
    eval: Prompts = "builtin-heldout"
    """Prompts to evaluate on, in the same forms as ``train``; keep the two apart."""
    masks: Literal["mixed", "box", "border"] = "mixed"
    """For ``task: inpaint``, what is to be drawn of images that come without a mask: a ``box`` within them, all but a
    box (``border``), or one or the other. A function of prompt and row alone."""
    images_per_prompt: Int = Field(1, ge=1)
    """Images of each prompt in a training batch; policy gradients compare them with one another."""
