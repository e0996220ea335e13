"""Says that the head of a cluster has gone, before Ray ends the process without a word that helps.

Ray looks for a head for a minute, in which it may come back; then it prints a line of its own and exits, from C++,
where no exception can be caught.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rltune.beside import beside
from rltune.errors import RunError, UserError
from rltune.orchestration.handshake import answers
from rltune.orchestration.ray_private import GCS_PATIENCE

logger = logging.getLogger(__name__)

SHARE = 0.6
"""Of the time that Ray looks for it: what is left is enough to leave in order, which takes 5 s and more."""
LAST_SHARE = 0.8
"""The same, after which nothing is waited for: a call of Ray's own that asks the head hears no signal."""
LOOK_S = 2.0
CALL = signal.SIGUSR2
"""Interrupts the main thread; Ctrl-C's own signal is ignored where a shell has started us in the background."""


def patience_s(share: float = SHARE) -> float:
    """Return how long a head may be away."""
    variable, default = GCS_PATIENCE
    with suppress(ValueError):
        return share * float(os.environ.get(variable, default))
    return share * default


@contextmanager
def head_watched(address: str) -> Iterator[None]:
    """Interrupt the block once the head has not answered for ``patience_s``; in the main thread alone.

    Where the block cannot be interrupted, the message is logged and the process ends, as Ray would have it end soon.

    Args:
        address: ``HOST:PORT`` of its GCS.

    Raises:
        RunError: It has gone, and so the block ended, whatever it raised.
    """
    watch = _Watch(address)
    try:
        with _interruptible(), beside(watch.look):
            yield
    except UserError:
        raise
    except BaseException as error:
        is_fault = isinstance(error, Exception)  # not a Ctrl-C
        if watch.is_lost or (is_fault and not answers(address, timeout_s=LOOK_S)):
            raise RunError(_gone(address)) from error
        raise


def _gone(address: str) -> str:
    return (
        f"--address: the head of the cluster at {address!r} has gone: nothing answers there. Trials that ended are "
        "recorded, others go on from their checkpoints; once the cluster is there again, the same command resumes"
    )


class _Watch:
    def __init__(self, address: str) -> None:
        self._address = address
        self.is_lost = False

    def look(self, over: threading.Event) -> None:
        """Look until it is over, or lost."""
        since_s = time.monotonic()
        while not over.wait(LOOK_S):
            if answers(self._address, timeout_s=LOOK_S):
                since_s = time.monotonic()
            elif time.monotonic() - since_s >= patience_s():
                self.is_lost = True
                if signal.getsignal(CALL) is signal.default_int_handler:
                    os.kill(os.getpid(), CALL)
                    if not over.wait(patience_s(LAST_SHARE) - patience_s()):
                        self._end()
                return

    def _end(self) -> None:
        logger.error(_gone(self._address))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(RunError.exit_code)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        previous = signal.signal(CALL, signal.default_int_handler)
    except ValueError:  # not in the main thread, which is another's: Ray has the last word
        yield
        return
    try:
        yield
    finally:
        signal.signal(CALL, previous)
