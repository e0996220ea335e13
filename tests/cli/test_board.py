import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rltune.cli import board
from rltune.cli.board import Steady, watch
from rltune.cli.terminal import PlainConsole
from rltune.runs.events import append_event
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.results import append_result
from rltune.runs.status import RunStatus, StatusReader, TrialStatus, read_status
from tests.run_folders import VALUES, experiment, result, write_rows, write_run

BASE = result(BASE_TRIAL, 0.5, 0.0)
OBJECTIVES = ("brightness", "drift")


def lines_of(folder: RunFolder) -> list[str]:
    status = read_status(folder, experiment())
    return [line for trial in status.trials for _, line in board._lines(trial, OBJECTIVES)]


def test_each_state_has_its_line(tmp_path: Path) -> None:
    results = [BASE, result("001", 0.7, 0.25), result("002", reason="step 3: 'a [red] dog'")]
    folder = write_run(tmp_path / "mix", experiment(), results, started=["003", "004"])
    write_rows(folder, "003", [{"step": 5, "eval/brightness": 0.44, "eval/drift": 0.125}, {"step": 6}])
    write_rows(folder, "004", [{"step": 1}])
    with folder.lock():
        assert lines_of(folder) == [
            "base model: brightness 0.500, drift 0.000",
            "trial 001 step 10/10: brightness 0.700, drift 0.250",
            "trial 002 failed: step 3: 'a [red] dog'",
            "trial 003 step 5/10: brightness 0.440, drift 0.125",
            "trial 004 started",
        ]


def test_a_stopped_trial_and_notices_have_their_lines(tmp_path: Path) -> None:
    stopped = result("001", 0.7, 0.25, reason="rank 7 of 9 at step 5", stopped_at=5)
    folder = write_run(tmp_path / "mix", experiment(), [BASE, stopped], started=["002"])
    append_event(folder.trial_events_file("002"), "suggested")
    append_event(folder.trial_events_file("002"), "notice", text="went back to step 5")
    with folder.lock():
        assert lines_of(folder)[1:] == [
            "trial 001 stopped at 5/10: rank 7 of 9 at step 5",
            "trial 002: went back to step 5",
            "trial 002 started",
        ]


def test_a_run_that_has_just_begun_says_nothing_of_the_base_model(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", experiment())
    assert lines_of(folder) == []


class Readings:
    """Stands for the clock of the board: before each reading the run goes on by one change, at the end it stops."""

    def __init__(self, *changes: object) -> None:
        self._changes = list(changes)

    def wait(self, timeout: float) -> bool:
        change = self._changes.pop(0)
        if callable(change):
            change()
        return not self._changes


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(board, "errors", PlainConsole(file=text, width=40))
    return text


def test_every_change_is_printed_once_and_what_ended_before_is_not(tmp_path: Path, written: io.StringIO) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [BASE, result("001", 0.7, 0.25), result("002", reason="nan")])
    evaluated = {"step": 5, "eval/brightness": 0.44, "eval/drift": 0.125}
    readings = Readings(
        lambda: None,
        lambda: folder.write_trial(TrialSpec("003", VALUES, {})),
        lambda: write_rows(folder, "003", [{"step": 4}]),
        lambda: write_rows(folder, "003", [{"step": 4}, evaluated]),
        lambda: None,
        lambda: append_result(folder.results_file, result("003", 0.6, 0.2)),
        lambda: append_result(folder.results_file, result(BASE_TRIAL, reason="nan for 'a [red] dog'")),
    )
    with folder.lock():
        board._print_lines(StatusReader(folder, experiment()), OBJECTIVES, readings)  # type: ignore[arg-type]
    assert written.getvalue().splitlines() == [  # longer than 40 columns, and not wrapped
        "trial 003 started",
        "trial 003 step 5/10: brightness 0.440, drift 0.125",
        "trial 003 step 10/10: brightness 0.600, drift 0.200",
        "base model failed: nan for 'a [red] dog'",
    ]


def test_the_same_notice_twice_is_two_lines(tmp_path: Path, written: io.StringIO) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [BASE], started=["001"])

    def notice() -> None:
        append_event(folder.trial_events_file("001"), "notice", text="out of memory")

    with folder.lock():
        readings = Readings(lambda: None, notice, lambda: None, notice, lambda: None)
        board._print_lines(StatusReader(folder, experiment()), OBJECTIVES, readings)  # type: ignore[arg-type]
    assert written.getvalue().splitlines() == ["trial 001 started", *["trial 001: out of memory"] * 2]


def test_where_the_sweep_stands_is_said_once_a_minute(
    tmp_path: Path, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(
        tmp_path / "mix", experiment(), [BASE, result("001", 0.7, 0.1, duration_s=60.0)], started=["002"]
    )
    moments = iter([0, 30, 59, 61, 61, 100, 120, 122, 122])
    monkeypatch.setattr(board.time, "monotonic", lambda: next(moments))
    with folder.lock():
        readings = Readings(*[lambda: None] * 6)
        board._print_lines(StatusReader(folder, experiment()), OBJECTIVES, readings)  # type: ignore[arg-type]
    assert list(moments) == []
    lines = [line for line in written.getvalue().splitlines() if line.startswith("mix: ")]
    assert len(lines) == 2  # at 61 and 122
    assert lines[0].startswith("mix: 1 of 4 trials | front 2 | hypervolume ")
    assert "about 3 min 00 s left" in lines[0]


def test_the_end_of_the_block_is_still_shown(tmp_path: Path, written: io.StringIO) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [BASE])
    before = threading.active_count()
    with folder.lock(), watch(folder, experiment()):
        folder.write_trial(TrialSpec("001", VALUES, {}))
    assert "trial 001 started" in written.getvalue()
    assert threading.active_count() == before


def test_on_a_terminal_the_table_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [BASE])
    text = io.StringIO()
    monkeypatch.setattr(board, "errors", PlainConsole(file=text, width=100, force_terminal=True))
    with folder.lock(), watch(folder, experiment()):
        folder.write_trial(TrialSpec("001", VALUES, {}))
        append_result(folder.results_file, result("001", 0.7125, 0.25))
    assert "0.713 (+0.213)" in text.getvalue()


class Failing(StatusReader):
    """Cannot read the run every other time, the first included."""

    num_read = 0

    def read(self) -> RunStatus:
        self.num_read += 1
        if self.num_read % 2:
            raise OSError(5, "Input/output error")
        return super().read()


def test_a_reading_that_fails_ends_no_lines(tmp_path: Path, written: io.StringIO) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [BASE])
    new = [lambda n=n: folder.write_trial(TrialSpec(f"{n:03d}", VALUES, {})) for n in (1, 2, 3)]
    readings = Readings(lambda: None, lambda: None, *new, lambda: None)
    with folder.lock():
        board._print_lines(Steady(Failing(folder, experiment())), OBJECTIVES, readings)  # type: ignore[arg-type]
    assert written.getvalue().splitlines() == ["trial 001 started", "trial 002 started", "trial 003 started"]


def test_a_line_that_cannot_be_made_ends_no_others(
    tmp_path: Path, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [BASE], started=["001"])
    lines = board._lines

    def faulty(trial: TrialStatus, objectives: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        if trial.trial == "001" and not (folder.trial_dir("002") / "trial.json").exists():
            raise KeyError("eval/brightness")
        return lines(trial, objectives)

    monkeypatch.setattr(board, "_lines", faulty)
    readings = Readings(lambda: None, lambda: folder.write_trial(TrialSpec("002", VALUES, {})), lambda: None)
    with folder.lock():
        board._print_lines(StatusReader(folder, experiment()), OBJECTIVES, readings)  # type: ignore[arg-type]
    assert written.getvalue().splitlines() == ["trial 001 started", "trial 002 started"]


def test_a_table_that_cannot_be_drawn_ends_no_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty:
        def __rich_console__(self, console: PlainConsole, options: object) -> Iterator[str]:
            raise ValueError("no such style")
            yield ""

    folder = write_run(tmp_path / "mix", experiment(), [BASE])
    text = io.StringIO()
    monkeypatch.setattr(board, "errors", PlainConsole(file=text, width=100, force_terminal=True))
    monkeypatch.setattr(board, "LiveView", lambda *_: Faulty())
    monkeypatch.setattr(board, "StatusReader", Failing)
    monkeypatch.setattr(board, "REFRESH_S", 0.01)
    with folder.lock(), watch(folder, experiment()):
        while "could not be drawn" not in text.getvalue():
            time.sleep(0.01)
    assert "the table could not be drawn (ValueError); the run goes on" in text.getvalue()
