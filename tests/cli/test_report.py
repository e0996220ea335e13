"""``rltune report``, and how a sweep names the page."""

from pathlib import Path

import pytest

from rltune.cli import sweep as running
from rltune.cli.sweep import run_experiment
from rltune.orchestration.campaign import Reported
from tests.cli.conftest import Call
from tests.run_folders import experiment, result, write_run

ROOT = Path(__file__).parents[2]


def test_the_page_and_its_figures(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "mix", experiment(), [result("000", 0.5, 0.0), result("001", 0.8, 0.1)])
    monkeypatch.chdir(tmp_path)
    assert call("report", "mix") == (0, "mix/report.html\n", "")
    assert (tmp_path / "mix" / "report.html").read_text().startswith("<!DOCTYPE html>")
    code, out, _ = call("report", "mix", "--figures", "pictures")
    assert (code, out) == (0, f"{len(list((tmp_path / 'pictures').iterdir()))} files in pictures\n")


def test_what_cannot_be_reported_is_one_message(call: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "mix", experiment())
    code, _, err = call("report", tmp_path / "mix")
    assert code == 2
    assert "the base model has no result yet, so there is nothing to report" in err


@pytest.mark.parametrize("why_not", ["", "OSError: no space left on device"])
def test_a_sweep_ends_by_naming_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why_not: str
) -> None:
    page = tmp_path / "runs" / "mix" / "report.html"
    monkeypatch.setattr(running, "run_campaign", lambda *_, notify, **__: notify(Reported(page, why_not)))
    file = ROOT / "experiments" / "mix.yaml"
    monkeypatch.chdir(tmp_path)
    run_experiment(file, [], address=None, name=None, storage=Path("runs"), dry_run=False, is_sweep=True)
    out, err = capsys.readouterr()
    if why_not:
        assert "report.html could not be written, OSError: no space" in " ".join(err.split())
        assert "report.html" not in out
    else:
        assert out.splitlines()[-1].endswith("runs/mix/report.html")
