import os
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rltune.errors import RunError, UserError
from rltune.orchestration import cluster
from rltune.orchestration.nodes import Node


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``prepare`` sets must not outlive the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("RAY_ADDRESS", None)
    monkeypatch.setattr(cluster, "_running_here", lambda: None)


def test_the_option_comes_before_the_variable_before_a_running_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.find_address(None) is None
    monkeypatch.setattr(cluster, "_running_here", lambda: "10.0.0.3:1")
    assert cluster.find_address(None) == "10.0.0.3:1"
    os.environ["RAY_ADDRESS"] = "10.0.0.2:1"
    assert cluster.find_address(None) == "10.0.0.2:1"
    assert cluster.find_address("10.0.0.1:1") == "10.0.0.1:1"
    assert cluster.find_address("auto") == "10.0.0.2:1"
    assert cluster.find_address("local") is None
    os.environ["RAY_ADDRESS"] = "auto"
    assert cluster.find_address(None) == "10.0.0.3:1"
    os.environ["RAY_ADDRESS"] = "local"
    assert cluster.find_address(None) is None


@pytest.mark.parametrize("way", ["option", "variable"])
def test_auto_never_takes_what_ray_would_find_among_all_processes(way: str) -> None:
    """Its own ``auto`` takes any cluster that runs here, that of another run too."""
    os.environ |= {"RAY_ADDRESS": "auto"} if way == "variable" else {}
    with pytest.raises(UserError, match="--address: auto finds no cluster on this machine; start one with"):
        cluster.find_address("auto" if way == "option" else None)


@pytest.mark.parametrize(("address", "is_loopback"), [(None, True), ("127.0.0.1:6379", True), ("10.0.0.1:6379", False)])
def test_loopback_is_asked_for_on_this_machine_alone(address: str | None, is_loopback: bool) -> None:
    os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
    cluster.prepare(address)
    assert (os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0") == is_loopback


def test_what_the_user_has_set_stays_but_where_results_would_be_lost() -> None:
    os.environ |= {"RAY_DEDUP_LOGS": "0", "RAY_AIR_NEW_OUTPUT": "1"}
    cluster.prepare(None)
    assert os.environ["RAY_DEDUP_LOGS"] == "0"
    assert os.environ["RAY_AIR_NEW_OUTPUT"] == "0"


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "head"])
def test_an_address_of_another_kind_is_not_tried(address: str) -> None:
    with pytest.raises(UserError, match=f"^--address: .*{address}"), cluster.connect(address):
        pass


def test_an_address_where_nothing_listens_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RunError, match=r"nothing answers at '127\.0\.0\.1:"), cluster.connect(address):
        pass


# ---- a connection that the caller has made


class Connected:
    """Stands in for ray where the caller has called ``ray.init`` already."""

    shut_down = False

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def get_runtime_context() -> SimpleNamespace:
        return SimpleNamespace(gcs_address="10.0.0.7:6379")

    @staticmethod
    def nodes() -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}]

    @classmethod
    def shutdown(cls) -> None:
        cls.shut_down = True


def test_a_connection_that_is_there_is_used_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", Connected)
    os.environ["RAY_ADDRESS"] = "10.0.0.2:1"
    assert cluster.find_address(None) == "10.0.0.7:6379"
    for address in (None, "auto", "10.0.0.7:6379"):
        with cluster.connect(address) as found:
            assert os.environ["RAY_AIR_NEW_OUTPUT"] == "0"
            assert (found.address, found.is_own, found.nodes) == ("10.0.0.7:6379", False, (Node(8.0, 2.0),))
    assert not Connected.shut_down
    with (
        pytest.raises(UserError, match=r"connected to the Ray cluster at 10\.0\.0\.7:6379, got '10\.0\.0\.1:1'; call"),
        cluster.connect("10.0.0.1:1"),
    ):
        pass
