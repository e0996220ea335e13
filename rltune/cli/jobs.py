"""Runs on a cluster, from a machine that reaches its dashboard alone: ``rltune submit``, ``jobs`` and their like."""

import json
import re
import time
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from rltune.cli.arguments import DryRunOption, ExperimentArgument, NameOption, SetOption, at_home
from rltune.cli.dashboard import dashboard
from rltune.cli.terminal import console, errors, marked
from rltune.errors import RunError, UserError
from rltune.runs.addresses import is_address, written

if TYPE_CHECKING:
    from rltune.config.load import Experiment
    from rltune.orchestration.job_server import JobServer
    from rltune.orchestration.jobs import Job
    from rltune.orchestration.submission import Submission

STATE_STYLES = {"running": "cyan", "succeeded": "green", "failed": "red", "stopped": "yellow", "pending": "dim"}

JobsOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Dashboard of the cluster, http://HOST:8265. Else RAY_API_SERVER_ADDRESS, else a RAY_ADDRESS that is one, "
        "else this machine's.",
    ),
]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="Id of a job, or the name of its run.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (submit, jobs, logs, stop, fetch, dashboard):
        app.command()(command)


def submit(
    experiment: ExperimentArgument,
    overrides: SetOption = None,
    address: JobsOption = None,
    name: NameOption = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Holds run folders: a folder on the cluster, the same for all nodes, or s3://BUCKET/FOLDER, gs://..",
            metavar="PATH",
        ),
    ] = None,
    package: Annotated[
        bool | None,
        typer.Option(
            "--package/--no-package",
            help="Have this machine's rltune go along, or take the cluster's; left out, it goes along where there is "
            "none or another version.",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print what the job prints until it ends.")] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Run an experiment as a job on a cluster, whose driver stays there. The same command again resumes."""
    import tempfile

    from rltune.orchestration.job_server import connect_to_jobs
    from rltune.orchestration.jobs import check_storage

    found = check_storage(storage)
    server = connect_to_jobs(address)  # before torch and diffusers take their seconds
    from rltune.orchestration.submission import prepare_submission
    from rltune.orchestration.submission import submit as hand_in

    loaded = _load(experiment, overrides or [], name)
    with tempfile.TemporaryDirectory() as folder:
        submission = prepare_submission(loaded, server, Path(folder), storage=found, ships_package=package)
        _print_submission(submission, server)
        if dry_run:
            return
        job = hand_in(submission, server)
    at = "" if address is None else f" --address {quote(address)}"
    console.print(f"submitted {job.id}, which writes {job.run}", soft_wrap=True)
    for label, text in {
        "follow": f"rltune logs {job.id} --follow{at}",
        "stop": f"rltune stop {job.id}{at}",
        "fetch": f"rltune fetch {job.id}{at}",
        "dashboard": f"{server.url}/#/jobs/{job.id}",
    }.items():
        console.print(marked(f"{label:>11} ", "dim", text), soft_wrap=True)
    if follow:
        _follow(server, job)


def jobs(address: JobsOption = None) -> None:
    """List the runs that were submitted to a cluster, the newest first."""
    from rltune.orchestration.job_server import connect_to_jobs
    from rltune.orchestration.jobs import list_jobs

    server = connect_to_jobs(address)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("job", "experiment", "state", "since", "run folder"):
        table.add_column(column, overflow="fold")
    found = list_jobs(server)
    for job in found:
        since = _ago(time.time() - (job.ended_s or job.began_s))
        state = Text(job.state, STATE_STYLES.get(job.state, ""))
        table.add_row(job.id, job.experiment, state, since, job.run)
    if found:
        console.print(table)
    else:
        errors.print(f"{server.url} has no job of rltune; 'rltune submit' hands one in", soft_wrap=True)


def logs(
    job: JobArgument,
    address: JobsOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Print what a job has printed; with --follow, until it ends."""
    from rltune.orchestration.job_server import connect_to_jobs
    from rltune.orchestration.jobs import find_job, read_log

    server = connect_to_jobs(address)
    found = find_job(server, job)
    if follow:
        _follow(server, found)
    else:
        _write(read_log(server, found))


def stop(job: JobArgument, address: JobsOption = None) -> None:
    """Have a job write checkpoints and end; submitting the experiment again goes on from them."""
    from rltune.orchestration.job_server import connect_to_jobs
    from rltune.orchestration.jobs import find_job
    from rltune.orchestration.jobs import stop as end

    server = connect_to_jobs(address)
    found = find_job(server, job)
    if found.has_ended:
        console.print(f"{found.id} has ended: {found.state}", soft_wrap=True)
        return
    errors.print(f"{found.id} writes checkpoints and ends, which takes up to a minute", soft_wrap=True)
    ended = end(server, found)
    console.print(
        f"{ended.id} {ended.state}; the same 'rltune submit {found.experiment} ..' resumes {ended.run}", soft_wrap=True
    )


def fetch(
    job: Annotated[
        str,
        typer.Argument(
            metavar="JOB", help="Id of a job, the name of its run, or s3://BUCKET/FOLDER/RUN.", show_default=False
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Argument(help="Folder for the copy; runs/NAME if left out.", show_default=False, callback=at_home),
    ] = None,
    address: JobsOption = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Bring the checkpoints too.")] = False,
) -> None:
    """Copy a run to this machine: results, report, exported LoRAs. An older copy is replaced.

    That of a job on a folder comes by the dashboard; one on object storage from there, with this machine's credentials.
    """
    from rich.progress import Progress

    from rltune.orchestration.fetching import check_target, fetch_from_store
    from rltune.orchestration.fetching import fetch as bring
    from rltune.orchestration.job_server import connect_to_jobs
    from rltune.orchestration.jobs import find_job
    from rltune.rewards.weights import format_size

    if is_address(job):
        run, name, who = written(job).rstrip("/"), written(job).partition("?")[0].rstrip("/").rpartition("/")[2], ""
    else:
        server = connect_to_jobs(address)
        found = find_job(server, job)
        run, name, who = found.run, found.name, "" if found.has_ended else found.id
    target = to or Path("runs", name)
    check_target(target)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(f"packing {run}", total=None)

        def show(size: int) -> None:
            progress.update(task, advance=size, description=f"fetching {run}")

        if is_address(run):
            fetched = fetch_from_store(run, target, with_checkpoints=checkpoints, on_bytes=show)
        else:
            fetched = bring(server, run, target, with_checkpoints=checkpoints, on_bytes=show)
    state = f", as it was a moment ago: {who} goes on" if who else ""
    console.print(f"{fetched.folder}: {format_size(fetched.size / 1e6)}{state}", soft_wrap=True)
    console.print(marked(f"{'front':>11} ", "dim", f"rltune front {quote(str(fetched.folder))}"), soft_wrap=True)


def _load(path: Path, overrides: list[str], name: str | None) -> "Experiment":
    from rltune.config.load import load_experiment
    from rltune.config.settings import NAME_PATTERN, NAME_RULE
    from rltune.orchestration.known import known_names

    if name is not None:
        if not re.fullmatch(NAME_PATTERN, name):
            raise UserError(f"--name: must be {NAME_RULE}, got {name!r}")
        overrides = [*overrides, f"name={json.dumps(name)}"]
    return load_experiment(path, overrides, known_names(), must_find_files=False)


def _print_submission(submission: "Submission", server: "JobServer") -> None:
    """Print the plan on the cluster's nodes, and what of this machine goes up."""
    from rltune.cli.sweep import print_plan
    from rltune.orchestration.cluster import Cluster
    from rltune.rewards.weights import format_size

    print_plan(submission.plan, Cluster(server.url, False, server.url, server.nodes()))
    upload = submission.upload
    parts = [
        f"{', '.join(upload.files[:6])}{' ..' if len(upload.files) > 6 else ''} ({format_size(upload.size / 1e6)})"
    ]
    if submission.package_size:
        parts.append(f"this machine's rltune ({format_size(submission.package_size / 1e6)})")
    lines = {"goes up": "; ".join(parts), "run folder": submission.run}
    for label, text in [*lines.items(), *(("note", note) for note in upload.notes)]:
        errors.print(marked(f"{label:>11} ", "dim", text), soft_wrap=True)


def _follow(server: "JobServer", job: "Job") -> None:
    """Print what a job prints until it ends.

    Raises:
        RunError: It failed.
    """
    from rltune.orchestration.jobs import follow

    try:
        ended = follow(server, job, _write)
    except KeyboardInterrupt:
        errors.print(f"{job.id} goes on; rltune stop {job.id} ends it", soft_wrap=True)
        raise
    if ended.state == "failed":
        raise RunError(f"{ended.id} failed; what it printed last says why")
    errors.print(f"{ended.id} {ended.state}", soft_wrap=True)


def _write(text: str) -> None:
    console.print(text, end="", soft_wrap=True)


def _ago(seconds: float) -> str:
    """Return a time for people: ``40 s``, ``12 min``, ``3.1 h``, ``2 days``."""
    if seconds < 100:
        return f"{max(0, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{round(seconds / 86400)} days"
