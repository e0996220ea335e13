"""The command line: ``rltune COMMAND``. Heavy imports stay inside commands, so that ``--help`` is instant."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from rltune import __version__
from rltune.cli.arguments import (
    AddressOption,
    DeviceOption,
    DryRunOption,
    ExperimentArgument,
    ImageOption,
    NameOption,
    PromptOption,
    RewardArgument,
    RewardOption,
    RunArgument,
    SetOption,
    StorageOption,
    at_home,
)
from rltune.cli.audit import audit
from rltune.cli.doctor import doctor
from rltune.cli.evaluate import evaluate
from rltune.cli.export import export
from rltune.cli.finetune import finetune
from rltune.cli.jobs import register as register_jobs
from rltune.cli.report import report
from rltune.cli.sample import sample
from rltune.cli.soup import soup
from rltune.cli.terminal import errors, marked, take_any_text
from rltune.errors import RltuneError
from rltune.redaction import Redacting
from rltune.training.quiet import quiet_imports

INTERRUPTED = 130
app = typer.Typer(
    name="rltune",
    help="Align text-to-image diffusion models with rewards, by experiment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
builtin = typer.Typer(help="The built-in text-to-image model: its scenes and its recipe.", no_args_is_help=True)
app.add_typer(builtin, name="builtin")
rewards = typer.Typer(help="List the rewards that an experiment can name; check one, audit one, fine-tune its head.")
app.add_typer(rewards, name="rewards")
models = typer.Typer(help="Weights: which there are, which are on this machine, and fetching the others.")
app.add_typer(models, name="models")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    is_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    is_verbose: Annotated[bool, typer.Option("--verbose", help="Log what the libraries underneath do.")] = False,
) -> None:
    if is_version:
        typer.echo(f"rltune {__version__}")
        raise typer.Exit
    handler = logging.StreamHandler()
    handler.addFilter(Redacting())
    level = logging.INFO if is_verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", handlers=[handler])


@app.command()
def sweep(
    experiment: ExperimentArgument,
    overrides: SetOption = None,
    address: AddressOption = None,
    name: NameOption = None,
    storage: StorageOption = Path("runs"),
    dry_run: DryRunOption = False,
) -> None:
    """Search the knobs of an experiment: plan, train, evaluate, export. The same command again resumes."""
    from rltune.orchestration.cluster import prepare

    prepare(address)  # before anything imports ray
    from rltune.cli.sweep import run_experiment

    run_experiment(
        experiment, overrides or [], address=address, name=name, storage=storage, dry_run=dry_run, is_sweep=True
    )


@app.command()
def train(
    experiment: ExperimentArgument,
    overrides: SetOption = None,
    address: AddressOption = None,
    name: NameOption = None,
    storage: StorageOption = Path("runs"),
    dry_run: DryRunOption = False,
) -> None:
    """Train one LoRA with fixed knobs, as one Ray Train job. The same command again resumes."""
    from rltune.orchestration.cluster import prepare

    prepare(address)  # before anything imports ray
    from rltune.cli.sweep import run_experiment

    run_experiment(
        experiment, overrides or [], address=address, name=name, storage=storage, dry_run=dry_run, is_sweep=False
    )


@app.command()
def status(
    run: RunArgument,
    usage: Annotated[bool, typer.Option("--usage", help="Show where the time of its slots went instead.")] = False,
) -> None:
    """Show the trial table of a running or finished run, from any terminal."""
    from rltune.cli.show import show_status

    show_status(run, with_usage=usage)


@app.command()
def front(
    run: RunArgument,
    objectives: Annotated[
        str | None, typer.Option(help="What it is over, with commas between: any rewards and judges; else the run's.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Only trials with 'diversity > 0.8', 'rank <= 4', and so on. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as front.json has it.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print it as front.csv has it.")] = False,
) -> None:
    """Show the Pareto front, its hypervolume, its knee, and the settings of its members."""
    from rltune.cli.show import show_front
    from rltune.errors import UserError

    if as_json and as_csv:
        raise UserError("--json and --csv: got both; give one")
    names = [name.strip() for name in (objectives or "").split(",") if name.strip()]
    show_front(run, objectives=names, where=where or [], form="json" if as_json else "csv" if as_csv else "table")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run folders, two or more.", show_default=False, callback=at_home),
    ],
    objectives: Annotated[str | None, typer.Option(help="What fronts are over, as of front.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers, points and surfaces for programs.")] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="HTML to write, with the fronts drawn.", show_default=False, callback=at_home
        ),
    ] = None,
) -> None:
    """Show runs side by side: hypervolumes, who dominates whom, what several seeds attain, which settings differ."""
    from rltune.cli.compare import show_comparison

    show_comparison(runs, objectives or "", as_json=as_json, page=page)


app.command()(report)
app.command()(export)
app.command()(sample)
app.command()(evaluate)
app.command()(soup)


app.command()(doctor)


@rewards.callback(invoke_without_command=True)
def rewards_list(context: typer.Context) -> None:
    """List the rewards that an experiment can name; ``check`` proves one, ``audit`` says what it hangs on, and
    ``finetune`` makes that the object."""
    if context.invoked_subcommand is None:
        from rltune.cli.rewards import show_rewards

        show_rewards()


@rewards.command("check")
def rewards_check(
    name: RewardArgument,
    images: ImageOption = None,
    prompts: PromptOption = None,
    options: RewardOption = None,
    device: DeviceOption = None,
) -> None:
    """Score images, or four built-in scenes, and prove shape, range, gradient and independence."""
    from rltune.cli.rewards import check_reward

    check_reward(name, images=images or [], prompts=prompts or [], options=options or [], device=device)


rewards.command()(audit)
rewards.command()(finetune)


@app.command()
def estimators() -> None:
    """List the estimators that an experiment can name, with their options."""
    from rltune.cli.show import show_estimators

    show_estimators()


@app.command()
def schema() -> None:
    """Print the JSON schema of an experiment file, for editors."""
    import json

    from rltune.config.schema import json_schema
    from rltune.orchestration.known import known_names

    typer.echo(json.dumps(json_schema(known_names()), indent=2))


register_jobs(app)


@models.callback(invoke_without_command=True)
def list_models(context: typer.Context) -> None:
    """List the published weights that rewards need, and the base models on this machine."""
    if context.invoked_subcommand is None:
        from rltune.cli.models import show_models

        show_models()


@models.command("fetch")
def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Rewards, base models as OWNER/NAME of the Hugging Face hub, or .safetensors checkpoints, whose "
            "settings are fetched.",
            metavar="NAME",
        ),
    ],
) -> None:
    """Fetch what rewards or base models need and is not on this machine yet."""
    from rltune.cli.models import fetch_models

    fetch_models(names)


@builtin.command("train")
def builtin_train(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where weights, prompts and card go.", callback=at_home)
    ],
    work: Annotated[
        Path, typer.Option(help="Data and checkpoints; the same folder again resumes.", callback=at_home)
    ] = Path("builtin"),
    seed: Annotated[int, typer.Option(min=0, help="Of data, initial weights and batches.")] = 0,
    scale: Annotated[float, typer.Option(min=0.0, help="Multiplies the steps of every stage.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Train the built-in model from nothing: scenes, autoencoder, image-text model, denoiser."""
    from rltune.cli.builtin import train_model

    train_model(output, work, seed=seed, scale=scale, device=device)


@builtin.command("scenes")
def builtin_scenes(
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.", callback=at_home)] = Path(
        "scenes.png"
    ),
    count: Annotated[int, typer.Option(min=1, help="Scenes.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = 0,
) -> None:
    """Write a grid of the scenes that the built-in model was trained on, and print their captions."""
    from rltune.cli.builtin import show_scenes

    show_scenes(output, count=count, seed=seed)


def main() -> None:
    """Run the command line; exit codes: 2 for what the user wrote, 1 for a failed run, 130 for Ctrl-C."""
    take_any_text()
    quiet_imports()
    try:
        app()
    except RltuneError as error:
        errors.print(marked("error", "bold red", str(error)), soft_wrap=True)
        sys.exit(error.exit_code)
    except SystemExit as end:  # typer's own: 0, 2 for a usage error that it has printed, 130 for Ctrl-C
        if end.code == INTERRUPTED:
            errors.print("interrupted")
        raise
