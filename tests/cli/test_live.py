"""A sweep of sixty trials on the smallest terminal that is meant to hold it."""

import io
import re
from pathlib import Path

import pytest

from rltune.cli.live import LiveView, by_interest
from rltune.cli.notes import Note, newest
from rltune.cli.terminal import PlainConsole
from rltune.runs.events import append_event
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.status import RunStatus, read_status
from tests.run_folders import SEARCHED, experiment, result, write_rows, write_run

ASKED = experiment({**SEARCHED, "search": {"trials": 60, "sampler": "random"}})
OBJECTIVES = ("brightness", "drift")


def make_run(path: Path, num_on_front: int = 3) -> RunFolder:
    """Trials 001 .. 050 ended, the first ones on the front; two run. Every tenth failed, every third was stopped."""
    ended = [result(BASE_TRIAL, 0.5, 0.0)]
    for number in range(1, 51):
        trial = f"{number:03d}"
        if number <= num_on_front:  # brighter and further away
            ended.append(result(trial, 0.5 + number / 50, number / 200))
        elif number % 10 == 0:
            ended.append(result(trial, reason=f"step 3: nan of {trial}, " + "at length " * 20))
        elif number % 3 == 0:
            ended.append(result(trial, 0.4, 0.5, reason=f"rank 9 of {number}", stopped_at=5))
        else:
            ended.append(result(trial, 0.45, 0.5))
    folder = write_run(path, ASKED, ended, started=["051", "052"])
    write_rows(folder, "051", [{"step": 7}])
    append_event(folder.trial_events_file("051"), "notice", text="went back to step 5")
    return folder


def read(folder: RunFolder) -> RunStatus:
    with folder.lock():
        return read_status(folder, ASKED)


def render(status: RunStatus, width: int, height: int) -> list[str]:
    console = PlainConsole(record=True, width=width, height=height, file=io.StringIO())
    console.print(LiveView(status, OBJECTIVES))
    return [line.rstrip() for line in console.export_text().splitlines()]


def shown_trials(lines: list[str]) -> list[str]:
    return [match[1] for line in lines if (match := re.match(r"[*! ]  (\d{3}) ", line))]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 24), (140, 30), (60, 16)])
def test_a_long_sweep_fits_the_terminal(tmp_path: Path, width: int, height: int) -> None:
    lines = render(read(make_run(tmp_path / "mix")), width, height)
    assert height - 3 <= len(lines) < height  # full, with a line for the cursor
    assert max(len(line) for line in lines) <= width
    shown = shown_trials(lines)
    assert shown == sorted(shown)
    assert {BASE_TRIAL, "051", "052", "050", "049"} <= set(shown)
    if height >= 24:
        assert {"001", "002", "003"} <= set(shown)
    text = "\n".join(lines)
    assert "trial 050 failed: step 3: nan of 050" in text
    assert "trial 051: went back to step 5" in text
    counts = re.search(r"not shown: ([^;]*);", text)
    if counts:  # on a narrow terminal the line may be cut
        assert sum(int(part.split()[0]) for part in counts[1].split(", ")) == 53 - len(shown)
    assert "not shown: " in text


def test_a_stop_is_shown_with_its_reason(tmp_path: Path) -> None:
    text = "\n".join(render(read(make_run(tmp_path / "mix")), 100, 24))
    assert "trial 048 stopped at 5/10: rank 9 of 48" in text
    assert re.search(r"048 +stopped +5/10", text)


def test_a_short_sweep_is_shown_whole(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", ASKED, [result(BASE_TRIAL, 0.5), result("001", 0.7, 0.1)], started=["002"])
    lines = render(read(folder), 100, 24)
    assert shown_trials(lines) == [BASE_TRIAL, "001", "002"]
    assert "not shown" not in "\n".join(lines)


def test_the_newest_are_seen_beside_a_long_front(tmp_path: Path) -> None:
    status = read(make_run(tmp_path / "mix", num_on_front=40))
    order = by_interest(status.trials)
    assert order[:5] == [BASE_TRIAL, "051", "052", "050", "049"]
    assert order[5:45] == [f"{number:03d}" for number in range(40, 0, -1)]
    assert order[45:] == [f"{number:03d}" for number in range(48, 40, -1)]
    assert len(render(status, 100, 24)) < 24


def test_of_every_kind_the_newest_note_is_shown_first() -> None:
    def note(kind: str, place: int) -> Note:
        return Note(kind, f"{kind} {place}", place)

    failed = [note("failed", place) for place in (3, 9, 6)]
    notices = [note("notice", 2), note("notice", -1)]
    stopped = [note("stopped", 8), note("stopped", 7)]
    chosen = [n.text for n in newest([*stopped, *failed, *notices], 4)]
    assert chosen == ["failed 9", "failed 6", "notice -1", "stopped 8"]
    assert [n.text for n in newest(stopped, 4)] == ["stopped 8", "stopped 7"]
    assert newest([], 4) == []
