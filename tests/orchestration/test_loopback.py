from pathlib import Path

import pytest

from rltune.orchestration.loopback import forget_meetings, meeting_file
from rltune.orchestration.sweep import Sweep
from tests.orchestration.test_sweep import sweep_of
from tests.orchestration.test_trials import trials_of


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_what_groups_of_a_run_leave_is_found_again_and_no_other_runs(tmp_path: Path, temporary: Path) -> None:
    mine = [meeting_file(tmp_path / "mix"), meeting_file(tmp_path / "mix")]
    other = meeting_file(tmp_path / "mix2")
    assert len({*mine, other}) == 3
    for file in (*mine, other):
        file.touch()
    forget_meetings(tmp_path / "mix")
    assert list(temporary.iterdir()) == [other]
    forget_meetings(tmp_path / "mix")  # and once more


@pytest.mark.slow
@pytest.mark.parametrize("ends", [None, KeyboardInterrupt])
def test_a_sweep_leaves_no_meeting_place(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, ends: type[BaseException] | None
) -> None:
    folder = trials_of(tmp_path).folder
    sweep = sweep_of(folder)
    meeting_file(folder.path).touch()  # of a driver that was killed

    def run(sweep: Sweep, *, needs_base: bool) -> None:
        assert list(temporary.iterdir()) == []
        meeting_file(folder.path).touch()
        if ends is not None:
            raise ends

    monkeypatch.setattr(Sweep, "_run_tune", run)
    sweep.run()
    assert list(temporary.iterdir()) == []
