from queue import SimpleQueue
from threading import Event, Thread, current_thread

import pytest

from rltune.beside import beside


@pytest.mark.parametrize("fails", [False, True])
def test_work_runs_beside_a_block_and_is_waited_for_however_that_ends(fails: bool) -> None:
    seen: SimpleQueue[bool | Thread] = SimpleQueue()

    def work(over: Event) -> None:
        seen.put(current_thread())
        seen.put(over.is_set())
        seen.put(over.wait(10))

    try:
        with beside(work):
            thread = seen.get(timeout=10)
            assert seen.get(timeout=10) is False
            assert seen.empty()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert seen.get_nowait() is True
    assert isinstance(thread, Thread)
    assert thread is not current_thread()
    assert thread.daemon
    assert not thread.is_alive()
