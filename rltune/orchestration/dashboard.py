"""The dashboard of a cluster: where it is, how one gets there, what it shows."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rltune.errors import RltuneError
from rltune.orchestration.cluster import find_address, prepare
from rltune.orchestration.handshake import check_cluster, check_kind
from rltune.orchestration.job_server import JobServer, connect_to_jobs
from rltune.orchestration.jobs import Job, list_jobs, told

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Shown:
    """What a dashboard has to show."""

    server: JobServer
    num_nodes: int
    jobs: Sequence[Job]
    """Of rltune."""
    train_runs: Sequence[str] | None
    """Names of Ray Train runs that go on; None where the cluster does not keep them."""


def find_dashboard(address: str | None) -> JobServer:
    """Return the dashboard of a cluster that is named by any of its addresses, once it has answered.

    Args:
        address: ``http://HOST:8265``, or what one attaches to; else the variables of Ray, else what runs here.

    Raises:
        UserError: The address is none, or the token is not the cluster's.
        RunError: Nothing answers.
    """
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    if named.startswith(("http://", "https://")):
        return connect_to_jobs(named)
    found = find_address(address)
    if found is None:
        return connect_to_jobs(None)
    check_kind(found)
    prepare(found)
    check_cluster(found)
    from ray.job_submission import JobSubmissionClient

    with told(JobServer(found, "")):
        url = str(JobSubmissionClient(found).get_address())
    return connect_to_jobs(url)


def look(server: JobServer) -> Shown:
    """Return what a dashboard shows.

    Raises:
        RunError: It does not say.
    """
    return Shown(server, len(server.node_rows()), list_jobs(server), train_runs(server))


def train_runs(server: JobServer) -> list[str] | None:
    """Return the names of Ray Train runs that go on, the newest first; None where the cluster does not keep them."""
    try:
        found = server.get("/api/train/v2/runs/v1")
    except RltuneError:  # it says so where nothing has told it of one
        return None
    rows: Sequence[Mapping[str, Any]] = found.get("train_runs", [])
    going_on = [row for row in rows if row.get("end_time_ns") is None]
    return [str(row["name"]) for row in sorted(going_on, key=lambda row: -row["start_time_ns"])]


def tunnel(url: str) -> str:
    """Return the command that brings a dashboard to this machine; empty where it is here already."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return "" if parts.hostname in LOOPBACK else f"ssh -N -L {port}:127.0.0.1:{port} {parts.hostname}"
