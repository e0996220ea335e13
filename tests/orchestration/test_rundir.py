import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rltune.config.load import load_experiment
from rltune.errors import UserError
from rltune.orchestration.rundir import RunFolder, TrialSpec, write_atomically
from tests.runs import SEARCHED, experiment

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


def claimed(tmp_path: Path, **sections: Any) -> RunFolder:
    folder = RunFolder(tmp_path / "mix")
    folder.path.mkdir()
    folder.claim(experiment(**sections))
    return folder


def test_a_claim_writes_the_experiment_with_its_origin(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    text = folder.experiment_file.read_text()
    assert text.startswith("# rltune ")
    assert "# ray " in text
    assert load_experiment(folder.experiment_file).raw == experiment().raw


def test_the_same_experiment_claims_its_folder_again(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    folder.claim(experiment())
    folder.claim(experiment(name="another-file"))  # the folder's name decides
    folder.claim(experiment(resources={"workers": 2, "concurrent": 3}))
    folder.claim(experiment(track=["tensorboard"]))
    folder.claim(experiment(track=[]))
    folder.claim(experiment(stop={"hours": 2, "stalled_trials": 5}))
    folder.claim(experiment(search={**SEARCHED["search"], "prune": True, "grace": 5, "reduction": 2}))


@pytest.mark.parametrize("search", [{"trials": 9}, {"trials": 4}, {}, None])
@pytest.mark.parametrize("before", [{"trials": 2}, {}, None])
def test_more_trials_of_the_same_search_are_a_resume(tmp_path: Path, before: Any, search: Any) -> None:
    folder = claimed(tmp_path, search=before)
    folder.claim(experiment(search=search))
    assert load_experiment(folder.experiment_file).shared.search == experiment(search=search).shared.search


def test_a_search_section_may_be_added_for_more_trials(tmp_path: Path) -> None:
    without = {name: section for name, section in SEARCHED.items() if name != "search"}
    folder = RunFolder(tmp_path / "mix")
    folder.path.mkdir()
    folder.claim(experiment(without))
    folder.claim(experiment(without, search={"trials": 30}))


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {**SEARCHED["optim"], "steps": 20}},
        {"optim": {**SEARCHED["optim"], "lr": {"log_float": [1e-4, 2e-2]}}},
        {"search": {**SEARCHED["search"], "seed": 1}},
        {"objectives": ["brightness"]},
        {"seed": 7},
        {"constraints": {"diversity": {"min_ratio_to_base": 0.5}}},
    ],
    ids=lambda sections: next(iter(sections)),
)
def test_another_experiment_is_refused_and_the_first_one_stays(tmp_path: Path, sections: dict[str, Any]) -> None:
    folder = claimed(tmp_path)
    before = folder.experiment_file.read_bytes()
    with pytest.raises(UserError, match=r"started with other settings than mix\.yaml has now; give another --name"):
        folder.claim(experiment(**sections))
    assert folder.experiment_file.read_bytes() == before


def test_a_claim_leaves_its_argument_as_it_was(tmp_path: Path) -> None:
    asked = experiment()
    folder = claimed(tmp_path)
    folder.claim(asked)
    assert asked.raw == experiment().raw


def test_trials_are_read_back_by_id(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mix")
    specs = [TrialSpec(f"{n:03d}", {"optim.lr": 0.1 * n}, {"simplex[0]": 1 / n}) for n in (2, 10, 1)]
    for spec in specs:
        folder.write_trial(spec)
    (folder.trial_dir("099")).mkdir()  # a trial without its file was never dealt
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
