"""``rltune evaluate``: scores with intervals and paired gains of runs, LoRAs and base models, on any prompts."""

import json
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rltune.cli.arguments import at_home, names_of, numbers_of
from rltune.cli.targets import Asked, Target, find_targets, shared_origin
from rltune.cli.terminal import console, told
from rltune.errors import UserError

if TYPE_CHECKING:
    from rltune.training.assessment import Assessed, Bench, Subject

COMMAND = "evaluate"


def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(help="Runs, LoRA folders or files, or a base model.", show_default=False, callback=at_home),
    ],
    pick: Annotated[
        list[str] | None, typer.Option(help="Of a run: knee, best:OBJECTIVE, or a trial. Repeatable; else the knee.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts; else those of the first target's figures.", callback=at_home)
    ] = None,
    rewards: Annotated[
        str | None, typer.Option(help="Rewards and judges, with commas between; else the first target's.")
    ] = None,
    strength: Annotated[str, typer.Option(help="Strengths of each LoRA, with commas between.")] = "1",
    base: Annotated[str | None, typer.Option(help="Base model of LoRAs without a card.", callback=at_home)] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images per prompt; else the first target's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; else the first target's.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; else the first target's.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write .csv or .json, the latter by prompt.", callback=at_home)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print it as CSV.")] = False,
) -> None:
    """Measure LoRAs beside their base model, on the same prompts and noise, with intervals and paired gains."""
    if as_json and as_csv:
        raise UserError("--json and --csv: got both; give one")
    if output is not None and output.suffix not in (".csv", ".json"):
        raise UserError(f"--output: must end in .csv or .json, got {str(output)!r}")
    strengths = numbers_of(strength, "--strength")
    sampler = {"steps": steps, "guidance": guidance}
    given = {name: value for name, value in sampler.items() if value is not None}
    asked = Asked(base, prompts, names_of(rewards), images, given)
    found = find_targets(targets, pick or [], COMMAND)
    origin = shared_origin(found, asked, COMMAND)
    measured, about = _measure(found, strengths, origin)
    content = {**about, "models": [_record(row) for row in measured]}
    if output is not None:
        text = as_table(measured) if output.suffix == ".csv" else json.dumps(content, indent=1) + "\n"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(content, indent=1))
    elif as_csv:
        typer.echo(as_table(measured), nl=False)
    else:
        show(measured, about)


def _measure(
    found: Sequence[Target], strengths: Sequence[float], origin: Any
) -> tuple[list["Assessed"], dict[str, Any]]:
    """Measure every target at every strength, and say what that was done on."""
    from rltune.training.assessment import make_bench, on_prompts
    from rltune.training.quiet import quiet_libraries

    quiet_libraries()
    with chdir(origin.stands_in), on_prompts(origin.config, origin.prompts) as config:
        bench = make_bench(config, origin.noise, only=origin.only)
        subjects = [subject for target in found for subject in _subjects(target, strengths)]
        return list(bench.assess(subjects)), about_bench(bench, origin.noise)


def _subjects(target: Target, strengths: Sequence[float]) -> list["Subject"]:
    from rltune.training.assessment import Subject, of_checkpoint, of_file

    if target.path is None:
        return []
    if target.is_checkpoint:
        assert target.origin is not None
        made = [of_checkpoint(target.origin.config, target.path, strength) for strength in strengths]
    else:
        made = [of_file(target.path, strength) for strength in strengths]
    return [Subject(target.label, prepare, strength) for prepare, strength in zip(made, strengths, strict=True)]


def about_bench(bench: "Bench", noise: str) -> dict[str, Any]:
    """Return what models were measured on, as a record."""
    from rltune.records import to_record

    config = bench.run.config
    return to_record(
        {
            "base_model": config.model.base,
            "revision": config.model.revision,
            "noise": noise,
            "images_per_prompt": bench.images.images_per_prompt,
            "sampler": config.sampler.model_dump(mode="json"),
            "prompts": [str(prompt) for prompt in bench.images.prompts],
        }
    )


def _record(row: "Assessed") -> dict[str, Any]:
    values = {name: values_P.tolist() for name, values_P in row.values.items()}
    figures = [asdict(figure) for figure in row.figures]
    return {"model": row.name, "strength": row.strength, "figures": figures, "values": values}


def as_table(measured: Sequence["Assessed"]) -> str:
    """Return one line for each model, strength and reward, as CSV."""
    import csv

    text = StringIO()
    rows = [
        {"model": row.name, "strength": row.strength, **asdict(figure)} for row in measured for figure in row.figures
    ]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def show(measured: Sequence["Assessed"], about: dict[str, Any]) -> None:
    """Print a block for each reward: every model at every strength, its value, and its gain over the base model."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", overflow="fold")
    for title in ("strength", "value", "gain over the base model"):
        table.add_column(title, justify="right")
    names = [figure.name for figure in measured[0].figures]
    for i, name in enumerate(names):
        table.add_row(name, style="bold")
        for row in measured:
            figure = row.figures[i]
            is_base = row is measured[0]
            gain = "" if is_base else told(figure.gain, figure.gain_half_width, sign="+")
            strength = "" if is_base else f"{row.strength:g}"
            table.add_row(f"  {row.name}", strength, told(figure.value, figure.half_width), gain)
    console.print(table)
    each, count = about["images_per_prompt"], len(about["prompts"])
    console.print(
        f"\n{count} prompts, {each} images each; 95 % intervals over prompts; gains are paired by prompt and noise",
        style="dim",
        soft_wrap=True,
    )
