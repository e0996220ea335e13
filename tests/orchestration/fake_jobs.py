"""A cluster's dashboard without a cluster: the script for the head runs here, other jobs are written down."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.job_submission import JobDetails, JobStatus, JobType

from rltune.orchestration.job_server import JobServer

NODE = {
    "node_id": "ab",
    "is_head_node": True,
    "state": "ALIVE",
    "resources_total": {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100": 1.0},
}


@dataclass
class FakeJob:
    details: dict[str, Any]
    environment: Mapping[str, Any]
    files: Mapping[str, str]
    """Of its working folder, relative -> content."""
    process: subprocess.Popen[bytes] | None = None


@dataclass(frozen=True)
class FakeServer(JobServer):
    """Stands in for ``JobServer`` and for Ray's client; ``folder`` is the head's log folder."""

    url: str = "http://head:8265"
    ray_version: str = ray.__version__
    folder: Path = Path()
    rows: Sequence[Mapping[str, Any]] = (NODE,)
    jobs: dict[str, FakeJob] = field(default_factory=dict)
    chunks: list[list[str | Exception]] = field(default_factory=list)
    """What each connection to a log gives."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of the script on the head."""

    def client(self) -> Any:
        return self

    def node_rows(self) -> Sequence[Mapping[str, Any]]:
        return self.rows

    def read_log(self, filename: str) -> Iterator[bytes]:
        yield (self.folder / filename).read_bytes()

    def list_jobs(self) -> list[JobDetails]:
        return [self.get_job_info(job_id) for job_id in self.jobs]

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        assert submission_id not in self.jobs
        work = Path(runtime_env["working_dir"])
        files = {str(p.relative_to(work)): p.read_text() for p in sorted(work.rglob("*")) if p.is_file()}
        details = {
            "type": JobType.SUBMISSION,
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "metadata": dict(metadata or {}),
            "status": JobStatus.RUNNING,
            "start_time": 1_000_000 + 1000 * len(self.jobs),
        }
        job = self.jobs[submission_id] = FakeJob(details, runtime_env, files)
        if "on_head.py" in files:
            copy = shutil.copytree(work, self.folder / "unpacked" / submission_id)
            words = [sys.executable, *shlex.split(entrypoint)[2:]]
            with self._log(submission_id).open("wb") as log:
                job.process = subprocess.Popen(words, cwd=copy, stdout=log, env={**os.environ, **self.environment})
        return submission_id

    def end(self, job_id: str, status: JobStatus) -> None:
        """Let a job be over."""
        self.jobs[job_id].details |= {"status": status, "end_time": 2_000_000}

    def get_job_status(self, job_id: str) -> JobStatus:
        process = self.jobs[job_id].process
        if process is not None and process.poll() is not None:
            self.end(job_id, JobStatus.FAILED if process.returncode else JobStatus.SUCCEEDED)
        return JobStatus(self.jobs[job_id].details["status"])

    def get_job_info(self, job_id: str) -> JobDetails:
        return JobDetails(**self.jobs[job_id].details)

    def get_job_logs(self, job_id: str) -> str:
        return self._log(job_id).read_text()

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for chunk in self.chunks.pop(0):
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
        self.end(job_id, JobStatus.SUCCEEDED)

    def stop_job(self, job_id: str) -> bool:
        process = self.jobs[job_id].process
        if process is not None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=10)
        self.end(job_id, JobStatus.STOPPED)
        return True

    def delete_job(self, job_id: str) -> bool:
        del self.jobs[job_id]
        return True

    def _log(self, job_id: str) -> Path:
        return self.folder / f"job-driver-{job_id}.log"


def details_of(job_id: str, status: str = "RUNNING", **about: str) -> JobDetails:
    """What Ray says of a job of ours."""
    metadata = {"rltune": "0.1.0", "name": "mix", "experiment": "mix.yaml", "run": "/shared/runs/mix"} | about
    raw = {"type": "SUBMISSION", "entrypoint": "", "submission_id": job_id, "metadata": metadata, "status": status}
    return JobDetails(**json.loads(json.dumps(raw)))
