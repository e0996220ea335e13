"""A torch process group for one machine that opens no port to the network.

Ray Train meets its workers over a TCP store, which torch binds to every interface, unauthenticated, even for a single
worker. On a cluster that rltune started itself all workers are on this machine, so they can meet over a file.
"""

import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch.config import TorchConfig

from rltune.orchestration.ray_private import join_process_group, set_torch_environment, torch_backend


def meeting_file() -> Path:
    """Return where one group of a run's workers meets; not in the run folder, whose file system may lack locks.

    Call it in a process of the cluster: it then lies in the folder that goes with the cluster.
    """
    return Path(tempfile.gettempdir()) / f"{uuid.uuid4().hex}.rendezvous"


@dataclass
class FileTorchConfig(TorchConfig):  # type: ignore[misc]  # ray has no types
    """``TorchConfig`` whose workers meet over a file in the machine's temporary folder."""

    @property
    def backend_cls(self) -> type:
        """The backend that starts the group."""
        return _FileTorchBackend


class _FileTorchBackend(torch_backend()):  # type: ignore[misc]  # ray has no types
    """Ray's own steps, with a file in the place of the TCP store; a restarted group gets a new file."""

    def on_start(self, worker_group: Any, backend_config: FileTorchConfig) -> None:
        meeting = meeting_file()
        worker_group.execute(set_torch_environment)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    join_process_group,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=f"file://{meeting}",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )
