import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rltune.errors import UserError
from rltune.runs.layout import RunFolder, TrialSpec
from rltune.runs.store import write_atomically

HOLD = """
import fcntl, sys
handle = open(sys.argv[1], "a+")
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
"""Takes the lock as another process would, until its standard input closes."""


@contextmanager
def held_by_another_process(folder: RunFolder) -> Iterator[None]:
    folder.path.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder.path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield


def test_a_run_is_locked_for_as_long_as_a_process_works_on_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "mix")
    assert not folder.is_locked
    with folder.lock():
        assert folder.is_locked
    assert not folder.is_locked
    with folder.lock():  # and again
        pass


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mix")
    with held_by_another_process(folder):
        assert folder.is_locked
        with pytest.raises(UserError, match=r"mix: another rltune process works on this run; .* another --name"):  # noqa: SIM117
            with folder.lock():
                pass
    assert not folder.is_locked  # its end freed the lock, without anyone deleting a file
    with folder.lock():
        pass


def test_trials_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mix")
    for trial in ("1000", "101", "999", "10000", "002"):
        folder.write_trial(TrialSpec(trial, {}, {}))
    assert [spec.id for spec in folder.read_trials()] == ["002", "101", "999", "1000", "10000"]


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mix")
    with pytest.raises(KeyboardInterrupt), folder.lock():
        raise KeyboardInterrupt
    assert not folder.is_locked


def test_a_folder_that_cannot_be_made_is_the_users_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "runs" / "mix")
    with (
        pytest.raises(UserError, match=r"cannot be written \(Not a directory\); give another --storage"),
        folder.lock(),
    ):
        pass


def test_asking_about_a_run_that_is_not_there_makes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mix")
    assert not folder.is_locked
    assert folder.read_trials() == []
    assert not folder.path.exists()


def test_trials_are_read_back_by_id(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mix")
    specs = [TrialSpec(f"{n:03d}", {"optim.lr": 0.1 * n}, {"simplex[0]": 1 / n}) for n in (2, 10, 1)]
    for spec in specs:
        folder.write_trial(spec)
    (folder.trial_dir("099")).mkdir()  # a trial without its file was never suggested
    assert folder.read_trials() == sorted(specs, key=lambda spec: spec.id)


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "front.json"
    write_atomically(path, "old")
    opened = path.open()
    write_atomically(path, "new \u00fc")
    assert opened.read() == "old"  # a reader that had it open is not torn
    opened.close()
    assert path.read_text(encoding="utf-8") == "new \u00fc"
    assert [entry.name for entry in tmp_path.iterdir()] == ["front.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
