"""The exceptions a user can meet. The command line prints them as one message, without a traceback."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rltune.redaction import redact


class RltuneError(Exception):
    """Something the user can act on; its message holds no secret that is known. ``exit_code`` is the command line's."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class UserError(RltuneError):
    """What the user wrote is wrong; nothing was started."""

    exit_code = 2


class UnknownNameError(UserError):
    """A name that no registry knows; the message lists the known ones."""


def gated_remedy(repo: str) -> str:
    """Return what to do about a model of the Hugging Face hub that is for those who have accepted its licence."""
    page = f"https://huggingface.co/{repo}"
    return f"accept its licence at {page}, then run 'hf auth login' on this machine or set HF_TOKEN"


@dataclass(frozen=True)
class Fault:
    """One fault of an experiment: where it is, what is wrong with it, what to do."""

    where: str
    """Path in the file, dotted: ``optim.lr``."""
    what: str
    """What is wrong, with the value."""
    remedy: str = ""
    """What would be right."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")


class ExperimentError(UserError):
    """An experiment with at least one fault; the message lists all of them."""

    def __init__(self, source: str, faults: Sequence[Fault]) -> None:
        self.source = source
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {fault}" for fault in self.faults))


class RunError(RltuneError):
    """A run that could not go on, with the reason."""


class NonFiniteError(RunError):
    """A reward, loss or gradient that is not finite, or a gradient that is exactly zero."""


class OutOfMemory(RunError):  # noqa: N818 - what the libraries call their own ends in Error
    """Memory was used up by a batch of images.

    Args:
        message: What a user reads.
        is_evaluation: Whether images were drawn without gradient, so that only a smaller batch of those would help.
    """

    def __init__(self, message: str, *, is_evaluation: bool = False) -> None:
        super().__init__(message)
        self.is_evaluation = is_evaluation


_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory, of the device or the machine, was used up.

    PyTorch has a class for it on a GPU; its CPU allocator and CUDA's libraries raise a RuntimeError that says so.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _MEMORY_PHRASES)


class StorageError(RunError):
    """A file that could not be written: no fault of the experiment, which goes on once there is room again."""


_STORAGE_FAULTS = {
    errno.ENOSPC: "no space left on device; free some",
    errno.EDQUOT: "the disk quota is used up; free some",
    errno.EROFS: "the file system is read-only; make it writable",
    errno.EACCES: "permission denied; make it writable",
    errno.EIO: "the device failed to read or write; see to the disk",
    errno.ENOENT: "no such file or folder, it was there before; bring it back",
    errno.ESTALE: "the file server no longer knows it; mount it again",
}
"""errno -> what happened and what to do, of faults that are the machine's."""


def storage_error(error: OSError, path: Path | str) -> StorageError | None:
    """Return what a user should read of a failed write at ``path``, or None where the machine is not at fault."""
    words = _STORAGE_FAULTS.get(error.errno or 0)
    return None if words is None else StorageError(f"{error.filename or path}: {words}, the same command resumes")


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Say of a write below ``path`` that fails for the machine's fault what happened, and where.

    Raises:
        StorageError: The disk is full, read-only, broken or gone.
    """
    try:
        yield
    except OSError as error:
        fault = storage_error(error, path)
        if fault is None:
            raise
        raise fault from error
