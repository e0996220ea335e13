"""Where a dashboard is and what it shows, whichever address of the cluster was given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rltune.errors import RunError, UserError
from rltune.orchestration import dashboard
from rltune.orchestration.dashboard import find_dashboard, look, tunnel
from rltune.orchestration.job_server import JobServer
from tests.orchestration.fake_jobs import FakeServer

RUNS = {
    "train_runs": [
        {"name": "mix-001", "start_time_ns": 1, "end_time_ns": 2},
        {"name": "mix-002", "start_time_ns": 2, "end_time_ns": None},
        {"name": "mix-003", "start_time_ns": 3, "end_time_ns": None},
    ]
}


@dataclass(frozen=True)
class Dashboard(FakeServer):
    answer: Any = None

    def get(self, path: str, **query: str) -> Any:
        assert path == "/api/train/v2/runs/v1"
        if self.answer is None:
            raise RunError("500 Train state data is not available")
        return self.answer


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dashboard, "connect_to_jobs", lambda address: JobServer(address or "here", "2.60.0"))
    monkeypatch.setattr(dashboard, "find_address", lambda address: address)
    monkeypatch.setattr(dashboard, "check_cluster", lambda address: None)
    monkeypatch.setattr(dashboard, "prepare", lambda address: address)


def submitted(server: FakeServer, folder: Path) -> None:
    about = {"rltune": "0.1.0", "name": "mix", "experiment": "mix.yaml", "run": "/shared/mix"}
    server.submit_job(
        entrypoint="", submission_id="rltune-mix", runtime_env={"working_dir": str(folder)}, metadata=about
    )


@pytest.mark.parametrize(
    ("address", "variables", "url"),
    [
        ("http://head:8265", {}, "http://head:8265"),
        (None, {"RAY_API_SERVER_ADDRESS": "http://jobs:1", "RAY_ADDRESS": "http://other:1"}, "http://jobs:1"),
        (None, {"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
        (None, {}, "here"),
        ("head:6379", {}, "http://of head:6379"),
    ],
)
def test_every_address_of_a_cluster_leads_to_its_dashboard(
    monkeypatch: pytest.MonkeyPatch, address: str | None, variables: dict[str, str], url: str
) -> None:
    class Client:
        def __init__(self, address: str) -> None:
            self.address = address

        def get_address(self) -> str:
            return f"http://of {self.address}"

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_dashboard(address).url == url


def test_an_address_of_ray_client_is_told_what_would_be_right() -> None:
    with pytest.raises(UserError, match="is for Ray Client"):
        find_dashboard("ray://head:10001")


def test_what_goes_on_is_shown_by_name(tmp_path: Path) -> None:
    server = Dashboard(folder=tmp_path, answer=RUNS)
    submitted(server, tmp_path)
    shown = look(server)
    assert (shown.num_nodes, [job.id for job in shown.jobs]) == (1, ["rltune-mix"])
    assert shown.train_runs == ["mix-003", "mix-002"]
    assert look(Dashboard(folder=tmp_path)).train_runs is None


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("http://127.0.0.1:8265", ""),
        ("http://localhost:8265", ""),
        ("http://head:8265", "ssh -N -L 8265:127.0.0.1:8265 head"),
        ("https://head", "ssh -N -L 443:127.0.0.1:443 head"),
    ],
)
def test_the_way_to_a_dashboard_elsewhere(url: str, command: str) -> None:
    assert tunnel(url) == command
