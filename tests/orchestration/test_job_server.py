"""Where jobs are handed in: addresses of every kind, and what may answer there."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from rltune.errors import RunError, UserError
from rltune.orchestration import job_server
from rltune.orchestration.job_server import ON_THIS_MACHINE, JobServer, connect_to_jobs, find_url

TOKEN = "0123456789abcdef0123456789abcdef"
Serve = Callable[..., str]


@pytest.fixture(autouse=True)
def no_ray_of_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "prepare", lambda address: address)  # it would set variables for good
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Answer each path with a status and a body, JSON unless it is text; note who asks, where that is wanted."""
    servers: list[HTTPServer] = []

    def start(answers: dict[str, tuple[int, Any]], who: list[str | None] | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if who is not None:
                    who.append(self.headers.get("Authorization"))
                found = answers.get(self.path) or answers.get(self.path.partition("?")[0])
                status, body = found or (404, "no such page")
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("address", "environment", "found"),
    [
        ("http://head:8265/", {"RAY_API_SERVER_ADDRESS": "http://other:1"}, "http://head:8265"),
        (None, {"RAY_API_SERVER_ADDRESS": "https://jobs", "RAY_ADDRESS": "http://other:1"}, "https://jobs"),
        (None, {"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
        (None, {"RAY_ADDRESS": "head:6379"}, ON_THIS_MACHINE),
        (None, {}, ON_THIS_MACHINE),
    ],
)
def test_the_option_goes_before_ray_s_variables(
    monkeypatch: pytest.MonkeyPatch, address: str | None, environment: dict[str, str], found: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_url(address) == found


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("head:6379", "give http://head:8265,"),
        ("ray://head:10001", "give http://head:8265,"),
        ("auto", f"give {ON_THIS_MACHINE},"),
        ("http://", "give http"),
    ],
)
def test_an_address_of_another_kind_is_told_what_would_be_right(address: str, advice: str) -> None:
    with pytest.raises(UserError, match=re.escape(advice)) as caught:
        find_url(address)
    assert repr(address.rstrip("/")) in str(caught.value)


@pytest.mark.long
def test_a_token_that_lies_about_is_sent(serve: Serve, tmp_path: Path) -> None:
    """Ray reads what decides it once, when it is imported: it must be set before, in a process of its own."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    who: list[str | None] = []
    url = serve({"/api/version": (200, {"ray_version": "2.60.0"})}, who)
    code = "import sys; from rltune.orchestration.job_server import connect_to_jobs; connect_to_jobs(sys.argv[1])"
    for home, sent in ((tmp_path, f"Bearer {TOKEN}"), (tmp_path / "other", None)):
        environment = dict(os.environ) | {"HOME": str(home)}
        subprocess.run([sys.executable, "-c", code, url], env=environment, check=True)
        assert who.pop() == sent


def test_a_dashboard_is_asked_for_its_version_and_nodes(serve: Serve) -> None:
    rows = [
        {"node_id": "a", "is_head_node": True, "state": "ALIVE", "resources_total": {"CPU": 2.0}},
        {"node_id": "b", "is_head_node": False, "state": "DEAD", "resources_total": {"CPU": 4.0}},
        {"node_id": "c", "is_head_node": False, "state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": 2.0}},
    ]
    nodes = {"result": True, "data": {"result": {"result": rows}}}
    url = serve({"/api/version": (200, {"ray_version": "2.60.0"}), "/api/v0/nodes": (200, nodes)})
    server = connect_to_jobs(url)
    assert server == JobServer(url, "2.60.0")
    assert [(node.num_cpus, node.num_gpus) for node in server.nodes()] == [(2.0, 0.0), (8.0, 2.0)]


def test_a_file_of_the_head_s_log_folder_comes_as_it_is_and_whole(serve: Serve) -> None:
    """Ray gives the last 1000 lines unless it is asked for all."""
    rows = [{"node_id": name, "is_head_node": name == "b", "state": "ALIVE"} for name in ("a", "b", "c")]
    asked = "/api/v0/logs/file?node_id=b&filename=x.tar&lines=-1"
    url = serve({"/api/v0/nodes": (200, {"data": {"result": {"result": rows}}}), asked: (200, "\x1b[31m bytes")})
    assert b"".join(JobServer(url, "").read_log("x.tar")) == b"\x1b[31m bytes"


@pytest.mark.parametrize(("status", "words"), [(401, "asks for a token"), (403, "does not take this token")])
def test_a_token_that_is_missing_or_wrong_is_said_and_not_shown(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, status: int, words: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    url = serve({"/api/version": (status, "Unauthorized")})
    with pytest.raises(UserError, match=words) as caught:
        connect_to_jobs(url)
    assert TOKEN not in str(caught.value)
    assert "RAY_AUTH_TOKEN" in str(caught.value)


@pytest.mark.parametrize("answers", [{}, {"/api/version": (200, "<html>")}])
def test_another_program_at_the_address_is_told_apart(serve: Serve, answers: dict[str, tuple[int, Any]]) -> None:
    with pytest.raises(RunError, match="is no dashboard of Ray"):
        connect_to_jobs(serve(answers))


def test_nothing_at_the_address_is_one_message_with_the_way_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RunError, match=r"no dashboard answers at .* \(connection refused\); .*ssh -N -L 8265"):
        connect_to_jobs(f"http://127.0.0.1:{port}")


def test_who_takes_a_connection_and_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "PATIENCE_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(RunError, match=r"no answer within 0\.2 s"):
            connect_to_jobs(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_ray_s_client_goes_to_this_server_whatever_its_variables_say(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    url = serve({"/api/version": (200, {"ray_version": "2.60.0"})})
    assert JobServer(url, "2.60.0").client().get_address() == url
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
