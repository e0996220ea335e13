"""Of two that want a run, never both have it; who is gone does not keep it."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from rltune.errors import StorageError, UserError
from rltune.runs import lease as module
from rltune.runs.lease import CLAIMS, Lease, Owner, owner_of
from rltune.runs.objects import ObjectStore


def test_a_second_one_is_refused_by_name_until_the_first_is_done(store: ObjectStore) -> None:
    first, second = Lease(store), Lease(store)
    first.take()
    with pytest.raises(
        UserError, match=f"^{re.escape(store.uri)}: process {os.getpid()} on .* works on this run; wait for it"
    ):
        second.take()
    assert owner_of(store) is not None
    first.renew()
    first.release()
    assert owner_of(store) is None
    second.take()


def test_of_two_at_once_never_both_have_it(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writes before any looks: the worst that can be."""
    both = threading.Barrier(2)
    write = ObjectStore.write

    def write_together(self: ObjectStore, key: str, content: bytes) -> None:
        write(self, key, content)
        both.wait(10)

    monkeypatch.setattr(ObjectStore, "write", write_together)
    taken, refused = list[int](), list[int]()

    def take(number: int) -> None:
        try:
            Lease(store).take()
            taken.append(number)
        except UserError:
            refused.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) <= 1
    assert len(taken) + len(refused) == 2


def leave(store: ObjectStore, **changes: object) -> None:
    """Leave a claim behind, as a process that was killed does."""
    mine = Lease(store)
    mine.take()
    (key,) = store.list(CLAIMS)
    row = json.loads(store.read(key) or b"")
    store.write(key, json.dumps(row | changes).encode())


def test_one_that_is_gone_from_this_machine_does_not_keep_it(store: ObjectStore) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    leave(store, pid=process.pid)
    assert owner_of(store) is None
    Lease(store).take()


def test_one_of_another_machine_keeps_it_for_as_long_as_it_counts(store: ObjectStore) -> None:
    leave(store, machine="another", host="node-7", pid=1)
    with pytest.raises(UserError, match=r"process 1 on node-7, since .* If it is gone, its claim ends in \d+ s"):
        Lease(store).take()
    Lease(store, lasts_s=0.0).take()
    assert len(store.list(CLAIMS)) == 1


def test_one_that_could_not_renew_writes_no_more(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Lease(store)
    mine.take()
    mine.check()
    later = module._now_s() + module.LASTS_S
    monkeypatch.setattr(module, "_now_s", lambda: later)
    for action in (mine.check, mine.renew):
        with pytest.raises(StorageError, match="another process may work on this run by now"):
            action()


def test_an_owner_of_this_machine_that_lives_is_not_dead() -> None:
    me = Owner("here", os.getpid(), module._machine(), "now")
    assert not me.is_dead
    assert not dataclasses.replace(me, pid=1).is_dead  # not ours to signal, or ours: there
    assert not dataclasses.replace(me, pid=2**22 + 1, machine="another").is_dead
    assert dataclasses.replace(me, pid=2**22 + 1).is_dead
