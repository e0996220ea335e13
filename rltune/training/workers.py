"""The data-parallel workers of one run, seen from one of them. accelerate finds devices and process group."""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from rltune.diffusion.memory import GIB
from rltune.errors import UserError


class Workers:
    """This worker's rank, device and collectives. Alone in a process it is rank 0 of 1 and collectives do nothing."""

    def __init__(self) -> None:
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.rank = int(self._accelerator.process_index)
        self.count = int(self._accelerator.num_processes)
        self.device = cast(torch.device, self._accelerator.device)

    def second_gpu(self) -> torch.device:
        """Return the GPU after this worker's device; those of a worker follow one another.

        Raises:
            UserError: There is none.
        """
        after = (self.device.index or 0) + 1
        count = torch.cuda.device_count() if self.device.type == "cuda" else 0
        if after >= count:
            raise UserError(
                f"resources.rewards_on: second_gpu: the worker on {self.device} sees {count} GPUs; "
                "write resources.gpus_per_worker: 2, on nodes that have them, or rewards_on: same"
            )
        return torch.device("cuda", after)

    @property
    def is_main(self) -> bool:
        """Whether this is the worker that writes files."""
        return self.rank == 0

    def share(self, num_images: int, *, together: int = 1) -> range:
        """Return which of a batch's images are this worker's: consecutive ones, as many as the others' or one group.

        Args:
            num_images: Of the batch, numbered from 0.
            together: Images that follow each other and stay on one worker; divides ``num_images``.
        """
        num_groups = num_images // together
        first, last = (rank * num_groups // self.count for rank in (self.rank, self.rank + 1))
        return range(first * together, last * together)

    def limit_memory(self, fraction: float) -> None:
        """Let this worker fill no more than a fraction of its GPU, which others share; on a CPU do nothing."""
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(fraction, self.device)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the workers, in one collective call."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the element-wise sum of a tensor over the workers."""
        return cast(Tensor, self._accelerator.reduce(tensor, reduction="sum"))

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the items of every worker, in the order of ranks, on every worker."""
        return cast(list[Any], gather_object(items)) if self.count > 1 else items

    def wait(self) -> None:
        """Block until every worker is here."""
        self._accelerator.wait_for_everyone()


class Stopwatch:
    """Seconds spent in the named parts of a step; waits for the device, so that the parts are true."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part``."""
        start = self._now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def peak_gib(device: torch.device) -> float:
    """Return the peak of device memory allocated by tensors, or on the CPU the peak resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
