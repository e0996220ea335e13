"""Runs side by side in a terminal of 80 columns."""

from pathlib import Path

import pytest

from rltune.cli.compare import comparison_view, show_comparison
from rltune.cli.front_table import PLUS_MINUS
from rltune.errors import UserError
from rltune.runs.compare import compare_runs
from tests.cli.test_tables import render, words
from tests.runs.test_compare import a_run


def test_groups_pairs_surfaces_and_settings_have_a_table_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = {"lr": 1e-3, "steps": 20, "batch": 4}
    paths = [a_run(Path("a"), 0.3), a_run(Path("b"), 0.4, seed=1), a_run(Path("c[red]"), 0.1, 0.05, optim=other)]
    lines = render(comparison_view(compare_runs(paths)), 80)
    assert all(len(line) <= 80 for line in lines)
    rows = [line.split() for line in lines]
    assert rows[0] == ["hypervolume", "front", "trials", "seed", "run"]
    assert rows[1][0] == "A"
    assert (rows[1][2], rows[1][-4:]) == (PLUS_MINUS, ["1", "1", "0", "a"])
    assert rows[2] == ["1", "1", "1", "b"]
    assert (rows[3][0], rows[3][-1]) == ("B", "c[red]")
    pair = next(row for row in rows if row[:3] == ["A", "-", "B"])
    assert pair[3].startswith("+")
    assert pair[-6:] == ["0%", "of", "A", "100%", "of", "B"]
    surfaces = next(row for row in rows if row[-2:] == ["every", "run"])
    assert surfaces[:3] == ["hypervolume", "attained", "by"]
    assert ["optim.steps", "10", "20"] in rows
    assert "paired by prompt, bold where that excludes zero" in words(lines)


def test_where_there_are_no_fresh_numbers_it_says_so(tmp_path: Path) -> None:
    paths = [a_run(tmp_path / "a", 0.3), a_run(tmp_path / "b", 0.4, is_fresh=False, optim={"lr": 1e-3})]
    text = words(render(comparison_view(compare_runs(paths)), 80))
    assert "luck has raised them" in text
    assert PLUS_MINUS not in text
    assert "Attained" not in text


def test_a_page_is_written_beside_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [a_run(tmp_path / "a", 0.3), a_run(tmp_path / "b", 0.4, optim={"lr": 1e-3})]
    page = tmp_path / "pages" / "a.html"
    show_comparison(paths, "", as_json=False, page=page)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out.endswith(f"\n{page}\n")
    with pytest.raises(UserError, match=r"--output: .* cannot be written, Is a directory; name another file"):
        show_comparison(paths, "", as_json=True, page=tmp_path / "pages")
