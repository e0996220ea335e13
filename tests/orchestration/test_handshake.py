"""Clusters that cannot be attached to, each with a head that is played by hand: no Ray is started."""

import json
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest

from rltune.errors import RltuneError, RunError, UserError
from rltune.orchestration import handshake
from rltune.orchestration.handshake import check_cluster, check_kind

TOKEN = "5ec7e7" * 6
HERE = {"ray_version": "2.60.0", "python_version": platform.python_version(), "ray_init_cluster": False}


@pytest.fixture(autouse=True)
def no_token_of_mine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[Path]:
    """The socket of a node that runs here."""
    path = tmp_path / "r"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        yield path


@pytest.fixture
def head(raylet: Path) -> Iterator[Callable[..., str]]:
    """Start a head that says of itself what it is told to, and return its address."""
    import grpc
    from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

    servers = []

    def start(about: dict[str, Any], *, node: str | None = str(raylet), code: Any = None, pause_s: float = 0) -> str:
        class KeyValues(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):  # type: ignore[misc]
            def InternalKVGet(self, request: Any, context: Any) -> Any:
                time.sleep(pause_s)
                if code is not None:
                    context.abort(getattr(grpc.StatusCode, code), "InvalidAuthToken")
                assert (request.namespace, request.key) == (b"cluster", b"CLUSTER_METADATA")
                return gcs_service_pb2.InternalKVGetReply(value=json.dumps(about).encode())

        class Nodes(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):  # type: ignore[misc]
            def GetAllNodeInfo(self, request: Any, context: Any) -> Any:
                kinds = gcs_pb2.GcsNodeInfo
                rows = [kinds(raylet_socket_name=str(raylet), state=kinds.DEAD)]
                rows += [] if node is None else [kinds(raylet_socket_name=node, state=kinds.ALIVE)]
                return gcs_service_pb2.GetAllNodeInfoReply(node_info_list=rows)

        server = grpc.server(futures.ThreadPoolExecutor(1))
        gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(KeyValues(), server)
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Nodes(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


def fault(address: str, kind: type[RltuneError], **options: bool) -> str:
    with pytest.raises(kind) as raised:
        check_cluster(address, **options)
    return str(raised.value)


def test_a_cluster_as_it_should_be_is_taken(head: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_cluster(head(HERE))
    check_cluster(head({}))  # it says nothing of its versions
    check_cluster(head(HERE | {"ray_init_cluster": True}))  # named, it is what is meant
    major, minor, patch = platform.python_version().split(".")
    other = HERE | {"python_version": f"{major}.{minor}.{patch}1"}
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    check_cluster(head(other))
    monkeypatch.delenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL")
    fault(head(other), UserError)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("none", "asks for a token, and there is none here; set RAY_AUTH_TOKEN to what 'ray get-auth-token' prints"),
        ("variable", "refuses the token of RAY_AUTH_TOKEN; set"),
        ("file", "refuses the token of {home}/.ray/auth_token; set"),
        ("named", "refuses the token of RAY_AUTH_TOKEN_PATH; set"),
        ("mode", "cannot be asked: RAY_AUTH_MODE=token wants a token, and there is none here; set"),
        ("off", "asks for a token, and RAY_AUTH_MODE=disabled keeps it from being sent; unset that"),
    ],
)
def test_a_token_that_is_missing_or_wrong(
    head: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, says: str
) -> None:
    if source in ("variable", "off"):
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    if source == "mode":
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
    if source == "off":
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    if source in ("file", "named"):
        path = tmp_path / (".ray/auth_token" if source == "file" else "mine")
        path.parent.mkdir(exist_ok=True)
        path.write_text(TOKEN)
    if source == "named":
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    address = head(HERE, code="UNAUTHENTICATED")
    told = fault(address, UserError)
    assert told.startswith(f"--address: the cluster at {address!r} {says.format(home=tmp_path)}")
    assert TOKEN not in told


@pytest.mark.parametrize("other", [{"ray_version": "2.59.1"}, {"python_version": "3.9.1"}])
def test_other_versions(head: Callable[..., str], other: dict[str, str]) -> None:
    about = HERE | other
    told = fault(head(about), UserError)
    assert f"runs Ray {about['ray_version']} on Python {about['python_version']}, here are Ray 2.60.0 and" in told


def test_a_head_that_hangs_is_not_waited_for(head: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "TIMEOUT_S", 0.2)
    assert "accepts connections and does not answer within 0 s" in fault(head(HERE, pause_s=0.4), RunError)


def test_a_head_without_nodes(head: Callable[..., str]) -> None:
    assert "answers, but none of its nodes is alive" in fault(head(HERE, node=None), RunError)


def test_a_machine_that_is_no_node(head: Callable[..., str]) -> None:
    address = head(HERE, node="/elsewhere/sockets/raylet")
    told = fault(address, UserError)
    assert "'rltune submit EXPERIMENT --address http://127.0.0.1:8265'" in told
    assert f"ray start --address={address} --num-cpus=0" in told


def test_a_cluster_that_another_run_started_for_itself_is_not_taken(head: Callable[..., str]) -> None:
    told = fault(head(HERE | {"ray_init_cluster": True}), UserError, is_named=False)
    assert "write --address local" in told


@pytest.mark.parametrize(("port", "says"), [(8265, " (the dashboard's port) does not"), (1, " does not answer")])
def test_a_listener_that_is_no_head(monkeypatch: pytest.MonkeyPatch, port: int, says: str) -> None:
    def greet(address: str, *, timeout_s: float) -> Any:
        raise handshake.NoGreeting("UNAVAILABLE", "failed to connect")

    monkeypatch.setattr(handshake, "greet", greet)
    monkeypatch.setattr(handshake, "answers", lambda address: True)
    told = fault(f"head:{port}", RunError)
    assert f"what listens at 'head:{port}'{says}" in told
    assert "name its port, usually 6379 (UNAVAILABLE: failed to connect)" in told


def test_a_real_listener_that_is_no_head_is_told_of_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"

        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert "does not answer as the GCS of a Ray cluster" in fault(address, RunError)
        listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
        thread.join()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ray://head:10001", "is for Ray Client, whose runs end with the connection"),
        ("http://head:8265", "takes submitted runs: rltune submit EXPERIMENT --address http://head:8265;"),
        ("https://head", "takes submitted runs: rltune submit EXPERIMENT --address https://head;"),
        ("head", "must be HOST:PORT (the port is usually 6379), auto or local, got 'head'"),
        ("head:gcs", "must be HOST:PORT"),
        ("/tmp/head:1", "must be HOST:PORT"),
    ],
)
def test_other_kinds_of_address_are_told_apart(address: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        check_kind(address)
    assert says in str(raised.value)


def test_kinds_that_can_be_attached_to() -> None:
    for address in ("head:6379", "10.0.0.1:6379", "[fd00::1]:6379"):
        check_kind(address)


def test_the_source_of_a_token_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert handshake.token_source() is None
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    assert handshake.token_source() is None
    assert "RAY_AUTH_TOKEN" not in os.environ
