"""The dashboard of a cluster, by HTTP: where it is, whether it answers, which nodes there are.

Jobs are submitted through it from a machine that reaches nothing else of the cluster. Ray's client for jobs is used
where it has a call; nodes and files of the log folder come from the REST API below ``/api/v0``.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests

from rltune.errors import RunError, UserError
from rltune.orchestration.cluster import prepare
from rltune.orchestration.nodes import Node, read_nodes
from rltune.orchestration.ray_private import auth_headers

ON_THIS_MACHINE = "http://127.0.0.1:8265"
"""Ray's own default, which a tunnel to a head's dashboard has too."""
PATIENCE_S = 10.0
"""For an answer; a wrong address must not cost more."""
TRANSFER_S = 120.0
"""For the next bytes of a file."""
TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers of Ray that tell of every package, each with a level of its own."""
UNREACHED = (
    "check host and port; a dashboard listens on its head's loopback, unless it was started with "
    "--dashboard-host=0.0.0.0: from elsewhere make a tunnel, 'ssh -N -L 8265:127.0.0.1:8265 HEAD', and give "
    f"--address {ON_THIS_MACHINE}"
)


def find_url(address: str | None) -> str:
    """Return where a cluster takes jobs: ``http://HOST:PORT``.

    The option, else ``RAY_API_SERVER_ADDRESS``, else a ``RAY_ADDRESS`` that is one, else this machine's dashboard.

    Raises:
        UserError: The address is of another kind.
    """
    if address is None and not os.environ.get("RAY_API_SERVER_ADDRESS"):
        named = os.environ.get("RAY_ADDRESS", "")
        return named.rstrip("/") if named.startswith(("http://", "https://")) else ON_THIS_MACHINE
    where = "--address" if address is not None else "RAY_API_SERVER_ADDRESS"
    found = (address or os.environ["RAY_API_SERVER_ADDRESS"]).rstrip("/")
    parts = urlsplit(found)
    if parts.scheme in ("http", "https") and parts.hostname:
        return found
    host = (parts.hostname or "HEAD") if parts.scheme == "ray" else found.partition(":")[0]
    wanted = ON_THIS_MACHINE if host in ("auto", "local", "") else f"http://{host}:8265"
    raise UserError(
        f"{where}: jobs are handed in at a cluster's dashboard, http://HOST:8265, got {found!r}, which is an address "
        f"of Ray itself; give {wanted}, or attach to the cluster with 'rltune sweep'"
    )


@dataclass(frozen=True)
class JobServer:
    """A dashboard that has answered."""

    url: str
    ray_version: str

    def client(self) -> Any:
        """Return Ray's own client for jobs: ``ray.job_submission.JobSubmissionClient``."""
        from ray.job_submission import JobSubmissionClient

        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        with _env({"RAY_API_SERVER_ADDRESS": self.url}):  # which Ray sets above its argument
            return JobSubmissionClient(self.url)

    def get(self, path: str, **query: str) -> Any:
        """Return the JSON that a path of the REST API gives.

        Raises:
            RunError: It does not answer, or refuses.
        """
        return _get(self.url, path, query).json()

    def node_rows(self) -> Sequence[Mapping[str, Any]]:
        """Return a row for each node that is alive, as the state API has it.

        Raises:
            RunError: As ``get``.
        """
        answer = self.get("/api/v0/nodes", limit="10000")
        return [row for row in answer["data"]["result"]["result"] if row["state"] == "ALIVE"]

    def nodes(self) -> tuple[Node, ...]:
        """Return what the nodes that are alive have.

        Raises:
            RunError: As ``get``.
        """
        return read_nodes({"Alive": True, "Resources": row["resources_total"]} for row in self.node_rows())

    def read_log(self, filename: str) -> Iterator[bytes]:
        """Yield the content of a file in the log folder of the head.

        Raises:
            RunError: It is not there, or the connection broke.
        """
        head = next((row["node_id"] for row in self.node_rows() if row["is_head_node"]), "")
        query = {"node_id": head, "filename": filename, "lines": "-1"}
        with _get(self.url, "/api/v0/logs/file", query, is_stream=True) as answer:
            try:
                yield from answer.iter_content(1 << 20)
            except requests.RequestException as error:
                raise RunError(f"{self.url}: the connection broke ({type(error).__name__}); try again") from error


def connect_to_jobs(address: str | None) -> JobServer:
    """Return the dashboard at ``find_url``, once it has answered. Nothing is started.

    Raises:
        UserError: The address is of another kind, or the token is not the cluster's.
        RunError: Nothing answers there.
    """
    url = find_url(address)
    prepare(url)  # a token that lies about is used, by Ray's own rules; before anything imports ray
    answer = _get(url, "/api/version", {}).json()
    return JobServer(url, str(answer["ray_version"]))


def _get(url: str, path: str, query: Mapping[str, str], *, is_stream: bool = False) -> requests.Response:
    try:
        answer = requests.get(
            url + path,
            params=dict(query),
            headers=auth_headers(),
            timeout=(PATIENCE_S, TRANSFER_S if is_stream else PATIENCE_S),
            stream=is_stream,
        )
    except requests.RequestException as error:
        raise RunError(f"--address: no dashboard answers at {url!r} ({_reason(error)}); {UNREACHED}") from error
    if answer.status_code in (401, 403):
        what = "asks for a token" if answer.status_code == 401 else "does not take this token"
        raise UserError(
            f"--address: the cluster at {url!r} {what}; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it, "
            "to the token that its nodes were started with"
        )
    if not answer.ok or (not is_stream and "json" not in answer.headers.get("content-type", "")):
        raise RunError(
            f"--address: what answers at {url!r} is no dashboard of Ray with parts for jobs: {path} gave "
            f"{answer.status_code} {answer.text[:200]!r}; check the port, which is 8265 unless it was set"
        )
    return answer


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return f"no answer within {PATIENCE_S:g} s"
    text = str(error)
    for known in ("Connection refused", "Name or service not known", "Temporary failure in name resolution"):
        if known in text:
            return known.lower()
    return type(error).__name__


@contextmanager
def _env(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
