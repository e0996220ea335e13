"""What an export format is: it writes a trained adapter as the files of a tool, and loads them as that tool does.

A new format is one file in this room: a class that registers itself, and thereby joins ``rltune export --format`` and
the conformance suite, ``tests/export/test_conformance.py``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import fold_scale
from rltune.errors import RunError
from rltune.registry import Registry
from rltune.training.adapters.base import LoraValues

DEFAULT_FORMATS = ("diffusers",)
MAGNITUDE = ".lora_magnitude_vector"
"""How the names of DoRA's norms end."""


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA. One that is broken, or does nothing at all, cannot be made.

    Raises:
        RunError: Its update is exactly zero, or not finite.
    """

    state: Mapping[str, Tensor]
    """Its weights, peft's key names."""
    rank: int
    alpha: float
    targets: str | Sequence[str]
    """Layers that it was attached to, as in ``add_lora``."""
    use_rslora: bool = False
    about: Mapping[str, str] = field(default_factory=dict)
    """What headers say of it, by ModelSpec's names: ``title``, ``description``, ``date``, ``resolution``."""

    def __post_init__(self) -> None:
        for name, tensor in self.state.items():
            if not tensor.isfinite().all():
                raise RunError(f"the adapter's {name} is not finite; lower the learning rate")
        if not any(tensor.any() for name, tensor in self.state.items() if ".lora_B." in name):
            raise RunError("the adapter is exactly zero, so that the LoRA would be the base model; was it trained?")

    @classmethod
    def of(cls, values: LoraValues, *, about: Mapping[str, str]) -> "Adapter":
        """Return a trained LoRA with what is said of it."""
        return cls(values.state, values.rank, values.alpha, values.targets, values.use_rslora, about)

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / rank, of rsLoRA alpha / sqrt(rank)."""
        return self.alpha / (sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def use_dora(self) -> bool:
        """Whether it has DoRA's magnitudes."""
        return any(name.endswith(MAGNITUDE) for name in self.state)

    def folded(self) -> dict[str, Tensor]:
        """Return the weights with the scale in them: an adapter of the same effect whose alpha is its rank.

        It is no rsLoRA any more; DoRA's magnitudes are among the weights.

        Readers that ignore alpha, those that take it as the rank, and those that read it then agree.
        """
        folded = fold_scale(dict(self.state), scale=self.scale)
        return {name: tensor.contiguous() for name, tensor in folded.items()}


What = TypeVar("What", contravariant=True)
"""What a format is of: ``Adapter``, a LoRA, of all those that are registered."""


class ExportFormat(Protocol[What]):
    """How a LoRA is laid down for one tool. A frozen dataclass without settings, registered under the format's name.

    Several formats share a folder, so each has file names of its own. What it writes counts as exported only once it
    has been loaded into a fresh base model and compared with the trained adapter (``rltune/export/proof.py``).
    """

    @property
    def reader(self) -> str:
        """The tool that loads it, as messages name it: ``diffusers``."""
        ...

    def write(self, model: ModelFamily, adapter: What, folder: Path) -> tuple[Path, ...]:
        """Write the adapter so that at strength 1 it has the trained effect, and return every file.

        Args:
            model: The base model in float32 with the adapter attached; left as it is.
            adapter: The same adapter.
            folder: Receives the files; made if it is not there.
        """
        ...

    def load(self, model: ModelFamily, folder: Path) -> Iterable[tuple[str, Tensor]]:
        """Load what ``write`` left in a folder as a user of the tool would, and return what that adds to the network.

        Args:
            model: A fresh base model in any number format, without adapters. It draws with the LoRA afterwards.
            folder: Where the files are; files of other formats may lie beside them.

        Returns:
            Every layer's name and what is added to its weight, in the weight's shape. Made one by one while it is
            gone through: together they may be as large as the network.

        Raises:
            UserError: A file is missing or damaged, or the tool does not take all of it, or finds less than it needs.
        """
        ...

    def how_to_load(self, model: ModelFamily, folder: Path) -> str:
        """Return the lines of Python that load it into a diffusers pipeline of the name ``pipeline``."""
        ...


EXPORT_FORMATS: Registry[ExportFormat[Adapter]] = Registry("export format", "rltune.export")
"""Built without options."""
