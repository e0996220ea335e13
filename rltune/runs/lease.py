"""Who works on a run that lies on object storage: a claim that its owner renews, where there is no lock to hold.

A claim is an object of its owner's own. Whoever wants the run writes one, looks at all of them, and takes his own back
if there is another that still counts: of two that come at once, the later writer sees the earlier one's, so that never
both hold it, and at worst neither. How old a claim is, the clock of the store says for all of them. It needs no
conditional writes, which not every store has.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from rltune.errors import StorageError, UserError
from rltune.runs.objects import Entry, ObjectStore

CLAIMS = ".claims/"
LASTS_S = 60.0
"""A claim counts for so long after its last renewal."""
RENEWED_S = 5.0
"""Between two renewals."""


@dataclass(frozen=True)
class Owner:
    """Who has a claim."""

    host: str
    pid: int
    machine: str
    """Says whether ``pid`` is one of this machine's, since it was started."""
    since: str

    @property
    def is_dead(self) -> bool:
        """Whether it is known to be gone: a process of this machine."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lease:
    """A claim to a run.

    Args:
        store: Where the run lies.
        lasts_s: How long a claim counts that is not renewed.
    """

    def __init__(self, store: ObjectStore, *, lasts_s: float = LASTS_S) -> None:
        self._store, self._lasts_s = store, lasts_s
        self._key = f"{CLAIMS}{uuid4().hex}.json"
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._text = json.dumps(asdict(Owner(socket.gethostname(), os.getpid(), _machine(), now))).encode()
        self._renewed_s = 0.0

    def take(self) -> None:
        """Claim the run.

        Raises:
            UserError: Somebody else works on it; the message says who.
            StorageError: The store cannot be written.
        """
        self._renewed_s = _now_s()
        self._store.write(self._key, self._text)
        claims = self._store.list(CLAIMS)
        mine = claims.get(self._key)
        for key, entry in claims.items():
            if key == self._key:
                continue
            owner = _owner(self._store, key)
            left_s = self._lasts_s - _age_s(entry, mine)
            if owner is None or owner.is_dead or left_s <= 0:
                self._store.delete(key)
                continue
            self._store.delete(self._key)
            raise UserError(
                f"{self._store.uri}: {owner} works on this run; wait for it, or give another --name. If it is gone, "
                f"its claim ends in {max(left_s, 1):.0f} s"
            )

    def renew(self) -> None:
        """Say that the owner is still at it.

        Raises:
            StorageError: The store cannot be written, or the claim has run out meanwhile.
        """
        self.check()
        start_s = _now_s()
        self._store.write(self._key, self._text)
        self.check()  # one that was held up for long comes after another has taken the run
        self._renewed_s = start_s

    def check(self) -> None:
        """Check that the claim still counts: nothing may be written after it has run out.

        Raises:
            StorageError: It has.
        """
        if _now_s() - self._renewed_s >= self._lasts_s:
            raise StorageError(
                f"{self._store.uri}: could not be written for {self._lasts_s:.0f} s, so that another process may work "
                "on this run by now; the same command resumes"
            )

    def release(self) -> None:
        """Give the run back."""
        self._store.delete(self._key)


def owner_of(store: ObjectStore, *, lasts_s: float = LASTS_S) -> Owner | None:
    """Return who works on a run, as far as this machine's clock can say; None where nobody does."""
    for key, entry in store.list(CLAIMS).items():
        owner = _owner(store, key)
        if owner is not None and not owner.is_dead and time.time() - entry.modified_ns / 1e9 < lasts_s:
            return owner
    return None


def _owner(store: ObjectStore, key: str) -> Owner | None:
    content = store.read(key)
    return None if content is None else Owner(**json.loads(content))


def _age_s(entry: Entry, mine: Entry | None) -> float:
    """Return how long before this process's own claim another was written, by the clock of the store."""
    assert mine is not None  # a listing has what was written before it
    return (mine.modified_ns - entry.modified_ns) / 1e9


def _now_s() -> float:
    """Return a time that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine() -> str:
    """Return what tells this machine, since it was started, from others: a container is one of its own."""
    parts = [socket.gethostname()]
    for file in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(file) if os.path.islink(file) else Path(file).read_text().strip())
        except OSError:
            parts.append("")
    return " ".join(parts)
