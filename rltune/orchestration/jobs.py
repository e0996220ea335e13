"""Jobs of rltune on a cluster, through its dashboard: list, find, follow, stop them; and run a script on the head."""

import asyncio
import json
import logging
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rltune.errors import RltuneError, RunError, UserError
from rltune.orchestration import on_head
from rltune.orchestration.job_server import JobServer
from rltune.runs.addresses import is_address, written
from rltune.runs.objects import check_address

logger = logging.getLogger(__name__)

ID_PREFIX = "rltune-"
STOP_WAIT_S = 60
"""What Ray gives a job between SIGTERM and SIGKILL: more than ``sweep.GRACE_S``. Its own is 3 s."""
LOOK_S = 120.0
"""For what a script on the head finds: a folder is unpacked and Python starts, on a machine that may be busy."""
AGENT_S = 60.0
"""For the agent of a head, which starts after its dashboard; a dashboard takes no job without one, and looks for it
for ten seconds before it says so."""
NO_AGENT = "No available agent to submit job"
POLL_S = 0.5
MAX_BREAKS = 5
"""Connections that may break in a row before a log is given up."""
ENDED = ("succeeded", "failed", "stopped")
OF_RAY = re.compile(r"^/tmp/ray(/|$)|/ray/session_|/runtime_resources/")
"""Paths that Ray takes away again."""
WANTED = (
    "give the absolute path of a folder that all nodes share, such as --storage /shared/runs, or s3://BUCKET/FOLDER"
)


@dataclass(frozen=True)
class Job:
    """A run on a cluster."""

    id: str
    name: str
    """Of the run."""
    experiment: str
    """The file that was submitted, as it was called."""
    run: str
    """The run folder, on the cluster."""
    state: str
    """Ray's word in lower case: pending, running, succeeded, failed, stopped."""
    began_s: float
    """When it was handed in, in seconds since 1970."""
    ended_s: float | None

    @property
    def has_ended(self) -> bool:
        """Whether it is over."""
        return self.state in ENDED


def check_storage(storage: str | None) -> str:
    """Return a storage that outlives a job on a cluster.

    Raises:
        UserError: It is none, an address that none can be, or a path that goes with the job.
    """
    if storage is None:
        raise UserError(f"--storage: where on the cluster the run folder goes is not said; {WANTED}")
    if is_address(storage):
        check_address(written(storage))
        return written(storage)
    if not PurePosixPath(storage).is_absolute():
        raise UserError(
            f"--storage: a job runs in a folder that Ray unpacks and takes away again, in which a relative path would "
            f"lie, got {storage!r}; {WANTED}"
        )
    if OF_RAY.search(storage):
        raise UserError(f"--storage: Ray takes its own folders away with its session, got {storage!r}; {WANTED}")
    return str(PurePosixPath(storage))


def list_jobs(server: JobServer) -> list[Job]:
    """Return the runs that were submitted to a cluster, the newest first.

    Raises:
        RunError: The dashboard does not say.
    """
    with told(server):
        found = [job_of(details) for details in server.client().list_jobs()]
    return sorted((job for job in found if job), key=lambda job: -job.began_s)


def job_of(details: Any) -> Job | None:
    """Return what Ray's details say of a job; None where it is not one of ours."""
    about: Mapping[str, str] = details.metadata or {}
    if not {"rltune", "name", "experiment", "run"} <= about.keys() or not details.submission_id:
        return None
    return Job(
        id=details.submission_id,
        name=about["name"],
        experiment=about["experiment"],
        run=about["run"],
        state=str(getattr(details.status, "value", details.status)).lower(),
        began_s=(details.start_time or 0) / 1000,
        ended_s=details.end_time / 1000 if details.end_time else None,
    )


def find_job(server: JobServer, named: str) -> Job:
    """Return a job by its id, or the newest of a run by its name.

    Raises:
        UserError: There is none.
        RunError: The dashboard does not say.
    """
    jobs = list_jobs(server)
    found = [job for job in jobs if job.id == named] or [job for job in jobs if job.name == named]
    if not found:
        known = ", ".join(job.id for job in jobs[:10]) or "none"
        raise UserError(f"{server.url} has no job {named!r} of rltune; the newest there: {known}")
    return found[0]


def free_id(name: str, taken: Collection[str]) -> str:
    """Return what the next job of a run is called: ``rltune-mix``, then ``rltune-mix-2``; Ray takes each id once."""
    job_id, number = f"{ID_PREFIX}{name}", 1
    while job_id in taken:
        number += 1
        job_id = f"{ID_PREFIX}{name}-{number}"
    return job_id


def read_log(server: JobServer, job: Job) -> str:
    """Return what a job has printed so far.

    Raises:
        RunError: The dashboard does not say.
    """
    with told(server):
        return str(server.client().get_job_logs(job.id))


def follow(server: JobServer, job: Job, write: Callable[[str], None]) -> Job:
    """Hand on what a job prints until it ends, and return it as it ended. A connection that breaks is made again.

    Raises:
        RunError: The dashboard can no longer be reached.
        KeyboardInterrupt: The job goes on.
    """
    with told(server):
        client = server.client()
    num_seen = num_breaks = 0

    async def tail() -> None:
        nonlocal num_seen
        num_now = 0
        async for text in client.tail_job_logs(job.id):
            new = text[max(0, num_seen - num_now) :]
            num_now += len(text)
            if new:
                write(new)
                num_seen = num_now

    while True:
        before = num_seen
        try:
            asyncio.run(tail())
        except Exception as error:  # of three libraries; whatever it is, the job may go on
            logger.debug("the log broke off", exc_info=True)
            num_breaks = 1 if num_seen > before else num_breaks + 1
            if num_breaks > MAX_BREAKS:
                raise RunError(
                    f"{server.url}: the log of {job.id} broke off ({error}); the job goes on by itself, see "
                    f"'rltune logs {job.id} --follow'"
                ) from error
            time.sleep(num_breaks * POLL_S)
        with suppress(RunError):
            now = find_job(server, job.id)
            if now.has_ended:
                return now


def stop(server: JobServer, job: Job) -> Job:
    """Ask a job to end, wait until it has, and return it: its trials write checkpoints first.

    Raises:
        RunError: The dashboard does not answer, or the job does not end.
    """
    with told(server):
        server.client().stop_job(job.id)
    deadline = time.monotonic() + STOP_WAIT_S + LOOK_S
    while not (now := find_job(server, job.id)).has_ended:
        if time.monotonic() > deadline:
            raise RunError(f"{job.id}: was told to stop and is still {now.state}; see the dashboard, {server.url}")
        time.sleep(POLL_S)
    return now


@contextmanager
def on_the_head(server: JobServer, *words: str) -> Iterator[Mapping[str, Any]]:
    """Run ``on_head.py`` as a job, hand out what it finds, and end it.

    What opens an address goes along, as a package of its own that hides no rltune that is there.

    Raises:
        RunError: It found nothing, or the cluster did not run it.
    """
    job_id = f"{ID_PREFIX}{words[0]}-{uuid.uuid4().hex[:8]}"
    with told(server), tempfile.TemporaryDirectory() as folder:
        client = server.client()
        shutil.copyfile(on_head.__file__, Path(folder, "on_head.py"))
        for name in on_head.SEAM:
            place = Path(folder, on_head.SEAM_FOLDER, "rltune", name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(on_head.__file__).parents[1] / name, place)
            (place.parent / "__init__.py").touch()  # or an rltune that is there would be imported
        command = f"exec python on_head.py {shlex.join(words)}"
        _hand_in(client, entrypoint=command, submission_id=job_id, runtime_env={"working_dir": folder})
    try:
        with told(server):
            found = _found(client, job_id)
        yield found
    finally:
        with suppress(RltuneError), told(server):
            client.stop_job(job_id)
            _wait(lambda: client.get_job_status(job_id).is_terminal(), 15.0)
            client.delete_job(job_id)


def _hand_in(client: Any, **what: Any) -> None:
    """Submit a job, on a head that may have started a moment ago.

    A second cluster on the head's machine, such as that of a sweep, may have the port of its agent: Ray has one number
    for all of them.
    """
    deadline, is_told = time.monotonic() + AGENT_S, False
    while True:
        try:
            client.submit_job(**what)
        except RuntimeError as error:
            if NO_AGENT not in str(error):
                raise
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the head has no agent that takes jobs, {AGENT_S:g} s after it was first asked; another Ray on "
                    "its machine, such as a sweep's own, may have the agent's port 52365: end that one, or start the "
                    "head with --dashboard-agent-listen-port=0"
                ) from error
            if not is_told:
                logger.warning("waiting for the head's agent, which takes jobs")
                is_told = True
            time.sleep(POLL_S)
        else:
            return


def _found(client: Any, job_id: str) -> Mapping[str, Any]:
    """Return what the script has said, or raise what became of it instead."""

    def said() -> Mapping[str, Any] | None:
        has_ended = client.get_job_status(job_id).is_terminal()
        lines = str(client.get_job_logs(job_id)).splitlines()
        line = next((line for line in lines if line.startswith(on_head.MARK)), None)
        if line is not None:
            return dict(json.loads(line.removeprefix(on_head.MARK)))
        if has_ended:
            why = client.get_job_info(job_id).message or ""
            raise RuntimeError(f"a job on the head ended without a word: {' '.join([*lines[-5:], why]).strip()}")
        return None

    found = _wait(said, LOOK_S)
    if found is None:
        raise RuntimeError(
            f"a job on the head has found nothing within {LOOK_S:g} s; is the head too busy to start one?"
        )
    return dict(found)


def _wait(look: Callable[[], Any], patience_s: float) -> Any:
    deadline = time.monotonic() + patience_s
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found


@contextmanager
def told(server: JobServer) -> Iterator[None]:
    """Say in one message what Ray's client or the cluster did not like.

    Raises:
        RunError: It was something.
    """
    try:
        yield
    except RltuneError:
        raise
    except Exception as error:  # Ray's client raises whatever its layers raise
        logger.debug("the job server failed", exc_info=True)
        text = " ".join(str(error).split())
        raise RunError(f"{server.url}: {text[:600] or type(error).__name__}") from error
