"""Pages of a run that goes on, and figures as files."""

import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from rltune.errors import UserError
from rltune.report import write
from rltune.report.pictures import Shrinker
from rltune.report.write import kept_current, write_figures, write_report
from rltune.runs.results import append_result
from tests.report.synthetic import FOUR, asked, write_synthetic
from tests.run_folders import experiment, result, write_run

PNG = b"\x89PNG\r\n\x1a\n"


def soon(is_so: Callable[[], bool]) -> bool:
    for _ in range(200):
        if is_so():
            return True
        time.sleep(0.05)
    return False


def test_the_page_is_written_again_when_a_trial_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "EVERY_S", 0.01)
    monkeypatch.setattr(write, "SHARE", 1.0)
    wanted, threads = experiment(), threading.active_count()
    folder = write_run(tmp_path / "mix", wanted)
    with kept_current(folder, wanted, Shrinker()):
        append_result(folder.results_file, result("000", reason="out of memory"))
        time.sleep(0.1)
        assert not folder.report_file.exists()  # nothing to compare with: no page, and no error
        append_result(folder.results_file, result("000", 0.5, 0.0))
        assert soon(folder.report_file.exists)
        append_result(folder.results_file, result("001", 0.7, 0.1))
        assert soon(lambda: "1 of 4 trials ended" in folder.report_file.read_text())
        before = folder.report_file.stat().st_mtime_ns
        time.sleep(0.1)
        assert folder.report_file.stat().st_mtime_ns == before
    assert threading.active_count() == threads


def test_a_page_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = threading.Event()

    def fail(*_: object, **__: object) -> None:
        called.set()
        raise RuntimeError("whatever it is")

    monkeypatch.setattr(write, "EVERY_S", 0.01)
    monkeypatch.setattr(write, "write_report", fail)
    wanted = experiment()
    folder = write_run(tmp_path / "mix", wanted)
    with kept_current(folder, wanted, Shrinker()):
        append_result(folder.results_file, result("000", 0.5, 0.0))
        assert called.wait(10)


def test_without_a_base_model_there_is_nothing_to_report(tmp_path: Path) -> None:
    wanted = experiment()
    with pytest.raises(UserError, match="the base model has no result yet"):
        write_report(write_run(tmp_path / "mix", wanted), wanted)


def test_figures_are_those_of_the_page_as_svg_and_png(tmp_path: Path) -> None:
    wanted = asked(8, FOUR[:2])
    folder = write_synthetic(tmp_path / "mix", wanted, with_pictures=False)
    files = write_figures(folder, wanted, tmp_path / "figures")
    names = {file.stem for file in files}
    assert names == {
        "front-brightness-smoothness",
        "parallel",
        "importance-brightness",
        "importance-smoothness",
        "hypervolume-trials",
        "hypervolume-seconds",
        "judge-diversity-brightness",
        "judge-diversity-smoothness",
    }
    assert sorted(files) == sorted(file for file in (tmp_path / "figures").iterdir())
    for file in files:
        if file.suffix == ".svg":
            assert ElementTree.parse(file).getroot().tag.endswith("svg")
        else:
            assert file.read_bytes().startswith(PNG)
    html = write_report(folder, wanted).read_text()
    assert [name for name in names - {"parallel"} if f'id="figure-{name}"' not in html] == []


def test_figures_that_cannot_be_written_are_one_message(tmp_path: Path) -> None:
    wanted = asked(3, FOUR[:2])
    folder = write_synthetic(tmp_path / "mix", wanted, with_pictures=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--figures: .*file cannot be written"):
        write_figures(folder, wanted, tmp_path / "file")
