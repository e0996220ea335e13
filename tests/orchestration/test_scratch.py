"""What a cluster of our own leaves: nothing, or logs for a day. Nothing here starts Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rltune.errors import RunError, UserError
from rltune.orchestration import scratch as module
from rltune.orchestration.places import Place
from rltune.orchestration.scratch import KEPT_S, LOCK_FILE, Scratch, forget_old, scratch
from tests.orchestration.processes import age

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


def place_at(root: Path) -> Place:
    return Place(root, python_folder=root)


def use(found: Scratch) -> None:
    """Leave what Ray leaves: a session, a link to it, and a socket's folder of its dashboard."""
    session = found.ray / "session_1"
    (session / "logs").mkdir(parents=True)
    (session / "logs" / "raylet.out").write_text("a line")
    (found.ray / "session_latest").symlink_to(session)
    (found.python / "pymp-1").mkdir()


def use_and_fail(root: Path, error: BaseException) -> Scratch:
    """Use the folders of a cluster, and end as a run does that raises an error."""
    made: list[Scratch] = []

    def run() -> None:
        with scratch(place_at(root)) as found:
            use(found)
            made.append(found)
            raise error

    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error
    return made[0]


def test_nothing_stays_of_a_run_that_ends_well(tmp_path: Path) -> None:
    with scratch(place_at(tmp_path)) as found:
        use(found)
        assert found.logs.joinpath("raylet.out").read_text() == "a line"
        assert list(tmp_path.iterdir()) == [found.ray]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("not this way")])
def test_nothing_stays_of_a_run_that_is_interrupted_or_did_not_begin(tmp_path: Path, error: BaseException) -> None:
    use_and_fail(tmp_path, error)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_s_logs_stay_until_a_run_of_the_next_day(tmp_path: Path) -> None:
    found = use_and_fail(tmp_path, RunError("no trial ended well"))
    assert found.logs.joinpath("raylet.out").read_text() == "a line"
    with scratch(place_at(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == [found.ray]
    age(found.ray, KEPT_S - 60)
    forget_old(tmp_path)
    assert list(tmp_path.iterdir()) == [found.ray]
    age(found.ray, KEPT_S + 60)
    with scratch(place_at(tmp_path)) as later:
        assert list(tmp_path.iterdir()) == [later.ray]


def test_logs_that_are_asked_for_stay_too(tmp_path: Path) -> None:
    with scratch(place_at(tmp_path)) as found:
        use(found)
        found.is_kept = True
    assert found.logs.is_dir()


def test_the_day_begins_with_the_last_line_of_a_log(tmp_path: Path) -> None:
    with scratch(place_at(tmp_path)) as found:
        use(found)
        found.is_kept = True
    age(found.ray, KEPT_S + 60)
    with (found.logs / "raylet.out").open("a") as log:
        log.write("another")
    forget_old(tmp_path)
    assert found.logs.is_dir()


def test_a_cluster_that_is_alive_is_left_alone_however_quiet_it_is(tmp_path: Path) -> None:
    with scratch(place_at(tmp_path)) as found:
        use(found)
        age(found.ray, KEPT_S + 60)
        forget_old(tmp_path)
        assert found.logs.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_leaves_has_no_owner(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from rltune.orchestration.places import Place\nfrom rltune.orchestration.scratch import scratch\n"
        "root = Path(sys.argv[1])\n"
        "with scratch(Place(root, python_folder=root)):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    (folder,) = tmp_path.iterdir()
    forget_old(tmp_path)
    assert folder.is_dir()
    age(folder, KEPT_S + 60)
    forget_old(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_marked_as_a_cluster_of_ours_is_left_alone(tmp_path: Path) -> None:
    """A user's own ``ray start``, a checkpoint on its way, a run folder by an unlucky name."""
    others = [tmp_path / "ray" / "session_1", tmp_path / "rltune-abcdefgh", tmp_path / "rltune-mix"]
    for folder in others:
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
    (tmp_path / "ray" / LOCK_FILE).touch()
    age(tmp_path, 10 * KEPT_S)
    forget_old(tmp_path)
    assert all((folder / ".lock").is_file() for folder in others)


def test_what_another_user_has_left_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "rltune-abcdefgh"
    folder.mkdir()
    (folder / LOCK_FILE).touch()
    age(folder, 2 * KEPT_S)
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    forget_old(tmp_path)
    assert folder.is_dir()
    monkeypatch.setattr(os, "getuid", lambda: own)
    forget_old(tmp_path)
    assert not folder.is_dir()


def test_files_of_python_may_lie_elsewhere_and_go_as_well(tmp_path: Path) -> None:
    short, long = tmp_path / "a", tmp_path / "b"
    for folder in (short, long):
        folder.mkdir()
    with scratch(Place(short, python_folder=long)) as found:
        use(found)
        assert (found.ray.parent, found.python.parent) == (short, long)
    assert list(short.iterdir()) == list(long.iterdir()) == []


@pytest.mark.slow
def test_processes_of_the_cluster_that_do_not_end_are_ended_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ENDING_S", 0.2)
    processes = []
    with scratch(place_at(tmp_path)) as found:
        for temporary in (found.python, tmp_path):
            environment = os.environ | {"TMPDIR": str(temporary)}
            process = subprocess.Popen([sys.executable, "-c", DEAF], env=environment, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            processes.append(process)
    ours, other = processes
    try:
        assert ours.wait(timeout=10) in (-9, 0)  # psutil may have taken the status, of which Python then makes 0
        assert other.poll() is None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
