"""A torch process group for one machine that opens no port to the network.

Ray Train meets its workers over a TCP store, which torch binds to every interface, unauthenticated, even for a single
worker. On a cluster that rltune started itself all workers are on this machine, so they can meet over a file.
"""

import hashlib
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch.config import TorchConfig

from rltune.orchestration.ray_private import join_process_group, set_torch_environment, torch_backend


def meeting_file(run_dir: Path) -> Path:
    """Return where one group of a run's workers meets; not in the run folder, whose file system may lack locks."""
    return Path(tempfile.gettempdir()) / f"rltune-{_mark(run_dir)}-{uuid.uuid4().hex}.rendezvous"


def forget_meetings(run_dir: Path) -> None:
    """Delete what groups of a run have left, while none of them meets: a process that is killed deletes nothing."""
    for file in Path(tempfile.gettempdir()).glob(f"rltune-{_mark(run_dir)}-*.rendezvous"):
        with suppress(OSError):
            file.unlink()


def _mark(run_dir: Path) -> str:
    return hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]


@dataclass
class FileTorchConfig(TorchConfig):  # type: ignore[misc]  # ray has no types
    """``TorchConfig`` whose workers meet over a file in the machine's temporary folder."""

    run_dir: str = ""

    @property
    def backend_cls(self) -> type:
        """The backend that starts the group."""
        return _FileTorchBackend


class _FileTorchBackend(torch_backend()):  # type: ignore[misc]  # ray has no types
    """Ray's own steps, with a file in the place of the TCP store; a restarted group gets a new file."""

    def on_start(self, worker_group: Any, backend_config: FileTorchConfig) -> None:
        meeting = meeting_file(Path(backend_config.run_dir))
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
