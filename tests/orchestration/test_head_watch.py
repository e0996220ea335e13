"""A head that goes away: sockets stand in for it, and nothing here starts Ray."""

import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from rltune.errors import RunError, UserError
from rltune.orchestration import head_watch
from rltune.orchestration.head_watch import CALL, head_watched, patience_s
from rltune.orchestration.ray_private import GCS_PATIENCE

GONE = r"the head of the cluster at '127\.0\.0\.1:\d+' has gone: .* the same command resumes$"


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_watch, "LOOK_S", 0.02)
    monkeypatch.setenv(GCS_PATIENCE[0], "0.1")


class Head:
    """Takes connections until it is told to go."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.getsockname())
        self.go = self._server.close


@pytest.fixture
def head() -> Iterator[Head]:
    found = Head()
    yield found
    found.go()


def test_a_head_may_be_away_for_less_than_ray_looks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GCS_PATIENCE[0])
    assert 30 < patience_s() < 60
    monkeypatch.setenv(GCS_PATIENCE[0], "600")  # as KubeRay does where its GCS survives
    assert 300 < patience_s() < 600
    monkeypatch.setenv(GCS_PATIENCE[0], "long")
    assert 30 < patience_s() < 60


def test_a_head_that_goes_interrupts_what_waits_for_it_and_says_what_to_do(head: Head) -> None:
    def wait() -> None:
        head.go()
        time.sleep(60)

    with pytest.raises(RunError, match=GONE) as caught, head_watched(head.address):
        wait()
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)
    assert signal.getsignal(CALL) is signal.SIG_DFL


def test_a_head_that_is_there_or_comes_back_is_not_told_of(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([True, False, True])
    asked: list[str] = []

    def answers(address: str, *, timeout_s: float) -> bool:
        asked.append(address)
        return next(seen, True)

    monkeypatch.setattr(head_watch, "answers", answers)
    with head_watched(head.address):
        while len(asked) < 9:
            time.sleep(0.01)
    assert set(asked) == {head.address}


def test_a_call_that_hears_nothing_ends_with_the_process_and_the_message(
    head: Head, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr("os._exit", end)
    with suppress(RunError), head_watched(head.address):
        head.go()
        with suppress(KeyboardInterrupt):
            time.sleep(60)
        assert codes == []
        ended.wait(60)
    assert codes == [1]
    assert [re.search(GONE, record.message) is not None for record in caplog.records] == [True]


def test_what_fails_for_want_of_the_head_is_told_of_as_that(head: Head) -> None:
    head.go()
    with pytest.raises(RunError, match=GONE) as caught, head_watched(head.address):
        raise LookupError("an actor")
    assert isinstance(caught.value.__cause__, LookupError)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LookupError("mine"), UserError("yours")])
def test_what_else_ends_the_run_stays_what_it_is(head: Head, error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt | UserError):
        head.go()
    with pytest.raises(type(error)) as caught, head_watched(head.address):
        raise error
    assert caught.value is error


def test_in_a_thread_nothing_of_the_main_one_is_interrupted(head: Head) -> None:
    ended: list[bool] = []

    def run() -> None:
        with head_watched(head.address):
            head.go()
            time.sleep(0.3)
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [True]
