"""Embedded prompts: each computed once, a group of prompts at a time, and kept in memory or in a file."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rltune.diffusion.families.base import ENCODE_BATCH, Conditioning, ModelFamily, TextBatch
from rltune.errors import writing

MAX_BYTES = 2**30
"""Embeddings kept in memory, a worker; what is more lies in a file. 10,000 prompts of SDXL take 3.2 GB in 16 bits."""
GROUPS_AT_A_TIME = 16
"""Groups embedded in one stay of the text encoder on the device."""


class PromptEmbeddings:
    """Embeddings of prompts, each computed once and kept on the CPU in the encoder's own number format.

    Prompts are embedded by groups of those that were announced together, in their order, whichever of a group is asked
    for: how an embedding rounds depends on what it is computed with, and must not on which prompts come up first.

    Args:
        model: Its text encoder.
        prompts: Announced: none is embedded before it, or one of its group, is asked for.
        max_bytes: Kept in memory; what is more goes into a file without a name, which goes when the process does.
    """

    def __init__(self, model: ModelFamily, prompts: Sequence[str] = (), *, max_bytes: int = MAX_BYTES) -> None:
        self._model, self._max_bytes = model, max_bytes
        self._groups: list[tuple[str, ...]] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._kept: dict[int, _Group] = {}
        self._negative: dict[str, Conditioning] = {}
        self.announce(prompts)

    def announce(self, prompts: Sequence[str]) -> None:
        """Say that these prompts may be asked for; new ones form groups of their own, behind those before."""
        # text alone: with another picture the words of a prompt are the same
        new = [prompt for prompt in dict.fromkeys(map(str, prompts)) if prompt not in self._places]
        for start in range(0, len(new), ENCODE_BATCH):
            group = tuple(new[start : start + ENCODE_BATCH])
            self._places.update({prompt: (len(self._groups), row) for row, prompt in enumerate(group)})
            self._groups.append(group)

    def add(self, prompts: Sequence[str]) -> None:
        """Embed the groups of these prompts that are new.

        Raises:
            StorageError: The file for what memory is not to hold cannot be written.
        """
        self.announce(prompts)
        missing = sorted({self._places[str(prompt)][0] for prompt in prompts} - self._kept.keys())
        while missing:
            together = missing[:GROUPS_AT_A_TIME]
            partial = [i for i, group in enumerate(together) if len(self._groups[group]) < ENCODE_BATCH]
            together = together[: partial[0] + 1] if partial else together  # or the groups behind it would be cut anew
            missing = missing[len(together) :]
            rows = self._model.encode_prompts([prompt for group in together for prompt in self._groups[group]])
            for number, group in enumerate(together):
                embedded = _Group.of(rows[number * ENCODE_BATCH : (number + 1) * ENCODE_BATCH])
                held = sum(kept.num_bytes for kept in self._kept.values())
                self._kept[group] = embedded if held + embedded.num_bytes <= self._max_bytes else embedded.in_files()

    def rows(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Return what each prompt tells the network, as the encoder gave it."""
        self.add(prompts)
        return [self._kept[group].row(row) for group, row in (self._places[str(prompt)] for prompt in prompts)]

    def negative(self, prompt: str) -> Conditioning:
        """Return what a negative prompt tells the network."""
        if prompt not in self._negative:
            found = self._model.encode_negative(prompt)
            self._negative[prompt] = self.rows([prompt])[0] if found is None else found
        return self._negative[prompt]

    def get(self, prompts: Sequence[str], device: torch.device) -> TextBatch:
        """Return what prompts tell the network, as ``predict`` takes it."""
        return self._model.collate(self.rows(prompts), device)


@dataclass(frozen=True)
class _Group:
    """Conditionings of prompts that were embedded together: of each name all tensors end to end, of any shapes."""

    flat: Mapping[str, Tensor]
    shapes: Mapping[str, Sequence[torch.Size]]

    @classmethod
    def of(cls, rows: Sequence[Conditioning]) -> "_Group":
        names = rows[0].keys()
        return cls(
            {name: torch.cat([row[name].flatten() for row in rows]) for name in names},
            {name: [row[name].shape for row in rows] for name in names},
        )

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.flat.values())

    def in_files(self) -> "_Group":
        return _Group({name: in_a_file(tensor) for name, tensor in self.flat.items()}, self.shapes)

    def row(self, number: int) -> Conditioning:
        return {name: self._part(name, number) for name in self.flat}

    def _part(self, name: str, number: int) -> Tensor:
        shapes = self.shapes[name]
        start = sum(shape.numel() for shape in shapes[:number])
        return self.flat[name][start : start + shapes[number].numel()].view(shapes[number])


def in_a_file(tensor: Tensor) -> Tensor:
    """Return a copy that lies in a file of the temporary folder, which has no name there and goes with the copy.

    Raises:
        StorageError: There is no room for it.
    """
    with writing(tempfile.gettempdir()), tempfile.TemporaryFile(prefix="rltune-") as file:
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk is found here, not by a signal at a write
        array = np.memmap(file, np.uint8, "r+", shape=(tensor.nbytes,))
    copy: Tensor = torch.from_numpy(array).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
