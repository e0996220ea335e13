"""Workers talk over the interface of their node's address: nothing here starts Ray."""

import os
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.train.torch.config import _TorchBackend

from rltune.orchestration.interfaces import VARIABLE, NodeTorchConfig, choose_interface


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that Ray knows by the address of its second card."""
    addresses = {"lo": ["127.0.0.1", "::1"], "eno1": ["192.168.0.7"], "ib0": ["fe80::1%ib0", "10.0.0.7"]}
    found = {name: [SimpleNamespace(address=one) for one in some] for name, some in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(VARIABLE)


def test_the_interface_with_the_node_s_address_is_taken() -> None:
    choose_interface()
    assert os.environ[VARIABLE] == "ib0"


def test_what_the_user_has_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "eno1")
    choose_interface()
    assert os.environ[VARIABLE] == "eno1"


def test_an_address_that_no_interface_has_leaves_it_to_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.9")  # of a machine behind another
    choose_interface()
    assert VARIABLE not in os.environ


def test_workers_of_ray_train_choose_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(_TorchBackend, "on_start", lambda self, group, config: done.append("met"))
    config = NodeTorchConfig(backend="gloo")
    config.backend_cls().on_start(SimpleNamespace(execute=done.append), config)
    assert done == [choose_interface, "met"]
