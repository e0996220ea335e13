"""The exceptions a user can meet. The command line prints them as one message, without a traceback."""

from collections.abc import Sequence
from dataclasses import dataclass


class RltuneError(Exception):
    """Something the user can act on. ``exit_code`` is what the command line leaves with."""

    exit_code = 1


class UserError(RltuneError):
    """What the user wrote is wrong; nothing was started."""

    exit_code = 2


class UnknownNameError(UserError):
    """A name that no registry knows; the message lists the known ones."""


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


class StorageError(RunError):
    """A disk that is full, read-only or gone; not the fault of what was run."""


def storage_error(error: OSError, path: object) -> StorageError:
    """Return what an ``OSError`` at ``path`` means for a run."""
    return StorageError(f"{error.filename or path}: {error.strerror}; put it right, the same command resumes")
