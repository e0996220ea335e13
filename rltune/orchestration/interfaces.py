"""Over which of a node's network interfaces the workers of a trial talk to each other."""

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch.config import TorchConfig

from rltune.orchestration.ray_private import torch_backend

VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface() -> None:
    """Have Gloo talk over the interface that has this node's address, unless the user has named one; call it before.

    By itself Gloo takes the address that the machine's own name resolves to. On many machines that is one of loopback,
    as Debian's installer writes it to /etc/hosts, and workers on two nodes then look for each other on their own.
    NCCL leaves loopback out by itself.
    """
    address = ray.util.get_node_ip_address()
    names = [name for name, found in psutil.net_if_addrs().items() if address in {one.address for one in found}]
    if names:
        os.environ.setdefault(VARIABLE, names[0])


@dataclass
class NodeTorchConfig(TorchConfig):  # type: ignore[misc]  # ray has no types
    """``TorchConfig`` whose workers reach each other at the addresses by which Ray knows their nodes."""

    @property
    def backend_cls(self) -> type:
        """The backend that starts the group."""
        return _NodeTorchBackend


class _NodeTorchBackend(torch_backend()):  # type: ignore[misc]  # ray has no types
    """Ray's own, one step later."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)
