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
from rltune.runs.compare import Comparison, Group, Pair, compare_runs, comparison_as_dict

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
LONGEST = 24
"""Characters of a setting's value."""


def show_comparison(runs: Sequence[Path], objectives: str, *, as_json: bool) -> None:
    """Print runs side by side.

    Args:
        runs: Their folders.
        objectives: What fronts are over, with commas between; the runs' own if empty.
        as_json: For programs.

    Raises:
        UserError: A run is not there, or what they measured does not compare.
    """
    names = [name.strip() for name in objectives.split(",") if name.strip()]
    comparison = compare_runs(runs, objectives=names)
    if as_json:
        typer.echo(json.dumps(comparison_as_dict(comparison), indent=2))
    else:
        console.print(comparison_view(comparison))


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
    return Stack(*parts, Text(" ".join(_notes(comparison, has_seeds=bool(several))), style="dim"))


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
                "" if i else _interval(*group.hypervolume),
                str(len(entry.members)),
                str(entry.num_trials),
                str(entry.seeds["seed"]),
                str(entry.path),
            )
    return table


def _pairs(comparison: Comparison) -> Table:
    table = _table("", "hypervolume", "dominated by the other", "")
    for pair in comparison.pairs:
        table.add_row(f"{pair.first.label} - {pair.second.label}", _difference(pair), *_dominated(pair))
    return table


def _difference(pair: Pair) -> Text:
    value, half = pair.difference
    return Text(_interval(value, half, sign="+"), style="bold" if half is not None and abs(value) > half else "")


def _dominated(pair: Pair) -> list[str]:
    labels = (pair.first.label, pair.second.label)
    return [
        f"{label} has none" if share is None else f"{share:.0%} of {label}"
        for label, share in zip(labels, pair.dominated, strict=True)
    ]


def _attained(groups: Sequence[Group]) -> Table:
    table = _table("hypervolume attained by", "some run", "half of them", "every run")
    for group in groups:
        volumes = group.attained
        row = (volumes[0], volumes[(len(volumes) + 1) // 2 - 1], volumes[-1])
        table.add_row(group.label, *(f"{volume:.3f}" for volume in row))
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


def _interval(value: float, half: float | None, *, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if half is None else f" {PLUS_MINUS} {half:.2g}")


def _notes(comparison: Comparison, *, has_seeds: bool) -> list[str]:
    num, is_fresh = comparison.num_prompts, comparison.is_fresh
    over = "prompts and, within a group, seeds" if has_seeds else "prompts"
    if is_fresh:
        parts = [f"Measured again on {num} prompts, and noise, that no trial was chosen by."]
        parts.append(f"{PLUS_MINUS}: 95 % intervals over {over}; differences are paired by prompt, bold where that")
        parts.append("excludes zero.")
    else:
        parts = [
            "By the numbers that members were chosen by, since not every front was measured again: luck has raised"
        ]
        parts.append("them, and intervals over prompts are not known.")
    if has_seeds:
        parts.append("Runs of a letter differ in their seeds alone. Attained: where so many of them have a member that")
        parts.append("is as good, by its mean.")
    if comparison.pairs:
        parts.append("Dominated: the share of a front's members that the other has a better one of, by their means.")
    units = ", ".join(
        f"{name} {size:.3g}" for name, size in zip(comparison.objectives, comparison.unit_D.tolist(), strict=True)
    )
    reference = ", ".join(
        f"{name} {value:.3f}"
        for name, value in zip(comparison.objectives, comparison.reference_D.tolist(), strict=True)
    )
    parts.append(f"Hypervolumes are in units of the base model ({units}), from the reference point {reference};")
    parts.append("the base model alone has 1.")
    return parts
