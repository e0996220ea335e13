"""``rltune soup``: the points between LoRAs, each measured beside the base model and none of them trained."""

import csv
import json
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rltune.cli.arguments import at_home, names_of, numbers_of
from rltune.cli.evaluate import about_bench
from rltune.cli.targets import Asked, Origin, Target, find_targets, shared_origin
from rltune.cli.terminal import console, told
from rltune.config.kinds import NO_LORA
from rltune.errors import UserError
from rltune.runs.addresses import as_folder

if TYPE_CHECKING:
    from rltune.diffusion.soup import Layers
    from rltune.training.assessment import Assessed, Bench
    from rltune.training.soups import Method, Weights

COMMAND = "soup"
BASE = "base"
"""The base model as a member."""


@dataclass(frozen=True)
class Point:
    """One soup."""

    method: "Method"
    weights: "Weights"
    rank: int | None
    """Of the LoRA that it is; None where it is none."""
    error: float
    """What the LoRA lacks of the update, as a share of it."""

    @property
    def name(self) -> str:
        """Method and weights, as tables show them."""
        return f"{self.method} {','.join(f'{weight:.3g}' for weight in self.weights)}"


def soup(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="LoRA folders or files, 'base' for the base model, or a run: the best in each objective. One LoRA "
            "alone is slid against the base model.",
            show_default=False,
            callback=at_home,
        ),
    ],
    points: Annotated[int, typer.Option(min=2, help="Points along each edge, its ends included.")] = 5,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="Weights of the LoRAs, with commas between, instead of --points. Repeatable."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="With commas between: exact (updates), factors, predictions (each step), draw (each step)."),
    ] = "exact",
    rank: Annotated[int | None, typer.Option(min=1, help="Reduce the LoRAs of exact and factors to this rank.")] = None,
    pick: Annotated[
        list[str] | None, typer.Option(help="Of a run: knee, best:OBJECTIVE, or a trial. Repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts; else those of the first target's figures.", callback=at_home)
    ] = None,
    rewards: Annotated[str | None, typer.Option(help="Rewards and judges; else the first target's.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model of LoRAs without a card.", callback=at_home)] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images per prompt; else the first target's.")] = None,
    export: Annotated[bool, typer.Option("--export", help="Write each point that is a LoRA, and prove it.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; else soup, of a run RUN/soup.", callback=at_home)
    ] = None,
) -> None:
    """Mix LoRAs without training: measure the points between them, and write them as LoRAs."""
    from rltune.training.soups import check_method, even_weights

    targets = [str(target) for target in targets]
    for target in targets:
        as_folder(target, COMMAND, is_read=True)
    run = Path(targets[0]) if len(targets) == 1 and (Path(targets[0]) / "results.jsonl").is_file() else None
    names = [target for target in targets if target != BASE]
    found = find_targets(names, pick or (_bests(run) if run else []), COMMAND)
    if any(target.path is None for target in found):
        raise UserError(f"soup: its members are LoRAs, got the base model {names[0]!r}; write base in its place")
    members = [*found, *[Target(BASE)] * (BASE in targets or len(found) == 1)]
    methods = tuple(dict.fromkeys(names_of(method)))
    rows = [numbers_of(text, "--weights") for text in weights or []] or even_weights(len(members), points)
    for row in rows:
        if len(row) != len(members):
            what = f"--weights: there are {len(members)} LoRAs ({', '.join(member.label for member in members)})"
            raise UserError(f"{what}, got {len(row)} weights; give one each")
    for name in methods or ("",):
        check_method(name, rows)
    asked = Asked(base, prompts, names_of(rewards), images)
    origin = shared_origin(found, asked, COMMAND)
    place = output or (run / "soup" if run else Path("soup"))
    _cook(members, [(name, row) for name in methods for row in rows], origin, place, rank=rank, is_exported=export)


def _bests(run: Path) -> list[str]:
    """Return the best trial of a run in each objective, each once."""
    from rltune.runs.fronts import read_front
    from rltune.runs.record import read_run

    folder, experiment = read_run(run)
    front = read_front(folder, experiment)
    if front is None or front.knee is None:
        raise UserError(f"soup: no trained trial of {run} is on its front; name LoRAs, or trials by --pick")
    bests = [front.best(name) for name in front.objectives.names]
    loras = [best.trial for best in bests if experiment.concrete(best.values).model.adapter.kind not in NO_LORA]
    if not loras:
        raise UserError(f"soup: what is best of {run} is no LoRA; name LoRAs, or trials by --pick")
    return list(dict.fromkeys(loras))


def _cook(
    members: Sequence[Target], asked: Sequence[Any], origin: Origin, place: Path, *, rank: int | None, is_exported: bool
) -> None:
    from rltune.training.assessment import Subject, make_bench, on_prompts
    from rltune.training.quiet import quiet_libraries
    from rltune.training.soups import FUSED, merged, of_point

    quiet_libraries()
    place = place.resolve()
    with chdir(origin.stands_in), on_prompts(origin.config, origin.prompts) as config:
        bench = make_bench(config, origin.noise, only=origin.only)
        loras = [_layers(bench, member) for member in members]
        made = []
        for name, row in asked:
            layers, error = merged(loras, row, name, rank) if name in FUSED else ({}, 0.0)
            made.append(Point(name, row, next((each.rank for each in layers.values()), None), error))
        subjects = [Subject(point.name, of_point(loras, point.weights, point.method, rank)) for point in made]
        labels = [member.label for member in members]
        about = {**about_bench(bench, origin.noise), "loras": labels}
        measured: list[Assessed] = []
        for row in bench.assess(subjects):
            measured.append(row)
            _write(place, about, made, measured)  # what is there by then is kept if a later one fails
        _show(about, made, measured)
        console.print(f"\n-> {place}", soft_wrap=True)
        if is_exported:
            again = {
                "noise": origin.noise,
                "precision": config.resources.precision,
                "prompts": list(origin.prompts),
            }
            _export(bench, loras, made, measured[1:], about, again, place, rank)


def _layers(bench: "Bench", member: Target) -> "Layers":
    from rltune.training.soups import BASE_MODEL, read_member, trained_member

    if member.path is None:
        return BASE_MODEL
    if member.is_checkpoint:
        assert member.origin is not None
        return trained_member(bench.run.model, member.origin.config, member.path)
    return read_member(bench.run.model, member.path)


def _write(place: Path, about: dict[str, Any], made: Sequence[Point], measured: Sequence["Assessed"]) -> None:
    """Write ``soup.json``, by prompt, and ``soup.csv``, a line for each point and reward."""
    from dataclasses import asdict

    base, *rows = measured
    content = {
        **about,
        "base": [asdict(figure) for figure in base.figures],
        "points": [
            {
                **asdict(point),
                "figures": [asdict(figure) for figure in row.figures],
                "values": {name: values_P.tolist() for name, values_P in row.values.items()},
            }
            for point, row in zip(made, rows, strict=False)
        ],
    }
    place.mkdir(parents=True, exist_ok=True)
    (place / "soup.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = [
        {
            "method": point.method,
            **{f"weight {label}": weight for label, weight in zip(about["loras"], point.weights, strict=True)},
            "rank": point.rank,
            "error": point.error,
            **asdict(figure),
        }
        for point, row in zip(made, rows, strict=False)
        for figure in row.figures
    ]
    text = StringIO()
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    (place / "soup.csv").write_text(text.getvalue(), encoding="utf-8")


def _show(about: dict[str, Any], made: Sequence[Point], measured: Sequence["Assessed"]) -> None:
    """Print a block for each reward: every point's weights, its value, and its gain over the base model."""
    from rich.table import Table

    base, *rows = measured
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("soup of " + ", ".join(about["loras"]), overflow="fold")
    for title in ("rank", "value", "gain over the base model"):
        table.add_column(title, justify="right")
    for i, figure in enumerate(base.figures):
        table.add_row(figure.name, style="bold")
        table.add_row("  base", "", told(figure.value, figure.half_width), "")
        for point, row in zip(made, rows, strict=True):
            own = row.figures[i]
            gain = told(own.gain, own.gain_half_width, sign="+")
            table.add_row(f"  {point.name}", str(point.rank or ""), told(own.value, own.half_width), gain)
    console.print(table)
    if worst := max((point.error for point in made), default=0.0):
        console.print(f"\nreduced LoRAs lack up to {worst:.2g} of their update", soft_wrap=True)


def _export(
    bench: "Bench",
    loras: Sequence["Layers"],
    made: Sequence[Point],
    measured: Sequence["Assessed"],
    about: dict[str, Any],
    again: dict[str, Any],
    place: Path,
    rank: int | None,
) -> None:
    from rltune.export.soup import Made, export_mixed
    from rltune.training.soups import FUSED, merged

    for number, (point, row) in enumerate(zip(made, measured, strict=True), 1):
        if point.method not in FUSED or point.rank is None:
            continue  # no LoRA, or the base model
        layers, _ = merged(loras, point.weights, point.method, rank)
        name, num_prompts = f"{number:03}", len(again["prompts"])
        told = Made(
            name,
            place / name,
            "",
            dict(zip(about["loras"], point.weights, strict=True)),
            {},
            row.figures,
            num_prompts,
            0,
            again,
            point.method,
            point.error,
        )
        export_mixed(
            told,
            layers,
            bench.run.config,
            on_export=lambda exported, point=point: console.print(  # type: ignore[misc]
                f"{point.name} -> {exported.folder}\n{exported.proof}", soft_wrap=True
            ),
        )
