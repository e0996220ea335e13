"""Runs side by side, in words and tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rltune.cli.tables import format_value
from rltune.cli.terminal import console
from rltune.errors import UserError
from rltune.report.comparison import attained_by, comparison_page, interval, is_sure, notes, shares
from rltune.runs.compare import Comparison, Group, compare_runs, comparison_as_dict
from rltune.runs.store import write_atomically

LONGEST = 24
"""Characters of a setting's value."""


def show_comparison(runs: Sequence[Path], objectives: str, *, as_json: bool, page: Path | None = None) -> None:
    """Print runs side by side, and write them as a page where one is named.

    Args:
        runs: Their folders.
        objectives: What fronts are over, with commas between; the runs' own if empty.
        as_json: For programs.
        page: HTML to write.

    Raises:
        UserError: A run is not there, what they measured does not compare, or the page cannot be
            written.
    """
    names = [name.strip() for name in objectives.split(",") if name.strip()]
    comparison = compare_runs(runs, objectives=names)
    if page is not None:
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(page, comparison_page(comparison))
        except OSError as error:
            raise UserError(f"--output: {page} cannot be written, {error.strerror}; name another file") from error
    if as_json:
        typer.echo(json.dumps(comparison_as_dict(comparison), indent=2))
    else:
        console.print(comparison_view(comparison))
        if page is not None:
            console.print(f"\n{page}", soft_wrap=True)


def comparison_view(comparison: Comparison) -> RenderableType:
    """Return the tables: groups, pairs, what seeds attain, settings that differ; and what it all is."""
    parts: list[RenderableType] = [_groups(comparison)]
    if comparison.pairs:
        parts += [Text(), _pairs(comparison)]
    several = [group for group in comparison.groups if len(group.entries) > 1]
    if several:
        parts += [Text(), _attained(several)]
    if comparison.differing:
        parts += [Text(), _settings(comparison)]
    return Stack(*parts, Text(" ".join(notes(comparison)), style="dim"))


def _table(*columns: str) -> Table:
    """Return an empty table whose first column is text and whose others are numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def _groups(comparison: Comparison) -> Table:
    table = _table("", "hypervolume", "front", "trials", "seed")
    table.add_column("run", overflow="fold")
    for group in comparison.groups:
        for i, entry in enumerate(group.entries):
            table.add_row(
                "" if i else group.label,
                "" if i else interval(*group.hypervolume),
                str(len(entry.members)),
                str(entry.num_trials),
                str(entry.seeds["seed"]),
                str(entry.path),
            )
    return table


def _pairs(comparison: Comparison) -> Table:
    table = _table("", "hypervolume", "dominated by the other", "")
    for pair in comparison.pairs:
        difference = Text(interval(*pair.difference, sign="+"), style="bold" if is_sure(pair) else "")
        table.add_row(f"{pair.first.label} - {pair.second.label}", difference, *shares(pair))
    return table


def _attained(groups: Sequence[Group]) -> Table:
    table = _table("hypervolume attained by", "some run", "half of them", "every run")
    for group in groups:
        table.add_row(group.label, *attained_by(group))
    return table


def _settings(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("settings that differ", overflow="fold")
    for group in comparison.groups:
        table.add_column(group.label, overflow="fold")
    for path, row in comparison.differing.items():
        table.add_row(path, *map(_short, row))
    return table


def _short(value: Any) -> str:
    text = "-" if value is None else format_value(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"
