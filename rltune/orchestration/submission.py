"""Hand an experiment to a cluster as a job. The driver then lives on the cluster, and needs the submitter no more.

It runs on the head, and takes no CPU or GPU of what Ray hands out: its trials do.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path, PurePosixPath
from typing import Any

import rltune
from rltune.config.load import Experiment
from rltune.errors import UserError
from rltune.orchestration.job_server import JobServer
from rltune.orchestration.jobs import STOP_WAIT_S, WANTED, Job, find_job, free_id, list_jobs, on_the_head, told
from rltune.orchestration.plan import Plan, plan
from rltune.orchestration.upload import Upload, stage
from rltune.runs.addresses import is_address
from rltune.runs.layout import RunFolder
from rltune.runs.remote import address_of, copy_path

LOG_COLUMNS = 120
"""Width of a job's log."""


@dataclass(frozen=True)
class Head:
    """What a cluster's head has, as ``on_head.look`` found it."""

    python: str
    executable: str
    rltune: str | None
    """Version that is installed; None where there is none."""
    missing: Sequence[str]
    """Libraries that rltune needs and that are not there."""
    storage: str
    """Why run folders cannot lie in the storage; empty if they can."""


@dataclass(frozen=True)
class Submission:
    """A job that is about to be handed in, and that nothing is known to be wrong with."""

    plan: Plan
    storage: str
    upload: Upload
    package_size: int
    """Bytes of this machine's rltune, which goes along; 0 where the cluster's is taken."""

    @property
    def run(self) -> str:
        """The run folder on the cluster, or its address."""
        return _run_in(self.storage, self.plan.experiment.shared.name)

    @property
    def entrypoint(self) -> str:
        """The command of the job."""
        command = "sweep" if self.plan.experiment.is_searched else "train"
        words = ["python", "-m", "rltune", command, self.upload.experiment_file, "--storage", self.storage]
        return f"exec {shlex.join(words)}"  # a shell in between would end before the driver has


def prepare_submission(
    experiment: Experiment, server: JobServer, folder: Path, *, storage: str, ships_package: bool | None = None
) -> Submission:
    """Check all that can be known before anything of an experiment goes up, and fill ``folder`` with what does.

    Args:
        experiment: With relative paths from the current folder.
        server: The cluster.
        folder: Empty.
        storage: As ``jobs.check_storage`` returns it.
        ships_package: Whether this machine's rltune goes along; None: where the cluster has none, or another version.

    Raises:
        ExperimentError: Lists what is wrong with the experiment, on the nodes that the cluster has now.
        UserError: The cluster cannot run it, or a job works on the run already.
        RunError: The cluster does not answer.
    """
    _check_ray(server)
    run = _run_in(storage, experiment.shared.name)
    # a bucket is the cluster's: this machine need not have the right to look into it, and does not
    unseen = RunFolder(copy_path(run, "submitted") if is_address(run) else Path(run))
    found = plan(experiment, server.nodes(), unseen, is_attached=True)
    upload = stage(experiment, folder)
    busy = next((job for job in list_jobs(server) if job.run == run and not job.has_ended), None)
    if busy is not None:
        raise UserError(
            f"{run}: the job {busy.id} works on this run; follow it with 'rltune logs {busy.id} --follow', stop it "
            f"with 'rltune stop {busy.id}', or give another --name"
        )
    head = look_at_head(server, storage)
    ships = head.rltune != rltune.__version__ if ships_package is None else ships_package
    _check_head(server, head, storage, ships=ships)
    return Submission(found, storage, upload, package_size() if ships else 0)


def submit(submission: Submission, server: JobServer) -> Job:
    """Hand a job in and return it; it starts as soon as the cluster can.

    Raises:
        RunError: The cluster did not take it.
    """
    experiment = submission.plan.experiment
    environment: dict[str, Any] = {
        "working_dir": str(submission.upload.folder),
        "env_vars": {
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # or the dashboard could not say which Train runs go on
            "COLUMNS": str(LOG_COLUMNS),
        },
    }
    if submission.package_size:
        environment |= {"py_modules": [str(package_folder())], "excludes": ["__pycache__"]}
    about = {
        "rltune": rltune.__version__,
        "name": experiment.shared.name,
        "experiment": experiment.source,
        "run": submission.run,
    }
    with told(server):
        client = server.client()
        job_id = free_id(experiment.shared.name, {job.submission_id for job in client.list_jobs()})
        client.submit_job(
            entrypoint=submission.entrypoint, submission_id=job_id, runtime_env=environment, metadata=about
        )
    return find_job(server, job_id)


def _run_in(storage: str, name: str) -> str:
    return address_of(storage, name) if is_address(storage) else str(PurePosixPath(storage) / name)


def package_folder() -> Path:
    """Return where rltune is on this machine, the weights of its built-in model included."""
    return Path(rltune.__file__).parent


def package_size() -> int:
    """Return how many bytes of rltune go up."""
    files = (path for path in package_folder().rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return sum(path.stat().st_size for path in files)


def look_at_head(server: JobServer, storage: str) -> Head:
    """Return what the head of a cluster has, which a job of a few seconds looks for.

    Raises:
        RunError: The cluster did not run it.
    """
    with on_the_head(server, "look", storage, ",".join(libraries())) as found:
        return Head(**{name: found[name] for name in Head.__dataclass_fields__})


def libraries() -> tuple[str, ...]:
    """Return the distributions that rltune cannot do without."""
    try:
        lines = requires("rltune") or []
    except PackageNotFoundError:  # from a checkout that is not installed
        return ("torch", "diffusers", "transformers", "peft", "optuna")
    return tuple(re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line)  # type: ignore[index]


def _check_ray(server: JobServer) -> None:
    here = version("ray")
    if server.ray_version.split(".")[:2] != here.split(".")[:2]:
        raise UserError(
            f"--address: the cluster at {server.url} runs Ray {server.ray_version}, rltune {rltune.__version__} works "
            f"with {here}; start it with that, as cluster/ does, or install the rltune that goes with it"
        )


def _check_head(server: JobServer, head: Head, storage: str, *, ships: bool) -> None:
    where = f"{server.url}: the Python of the head ({head.executable}, {head.python})"
    if tuple(map(int, head.python.split(".")[:2])) < (3, 11):
        raise UserError(f"{where} is too old for rltune, which needs 3.11; start Ray with another")
    if head.missing:
        raise UserError(
            f"{where} lacks {', '.join(head.missing)}; install rltune there and on all nodes, as cluster/Dockerfile "
            "does. If Ray has them, start it with its environment's bin folder first in PATH"
        )
    if not ships and head.rltune is None:
        raise UserError(f"{where} has no rltune; leave --no-package out, and this machine's goes along")
    if head.storage and is_address(storage):
        raise UserError(f"--storage: cannot be used on the head: {head.storage}")
    if head.storage:
        raise UserError(f"--storage: got {storage!r}, but on the head {head.storage}; {WANTED}")
