"""What rltune uses of Ray that Ray keeps private, undocumented or free to change, and why there is no public way.

Ray is pinned to the minor version that has all of it. ``tests/orchestration/test_ray_private.py`` has a test for each
name, which says what to do where one is gone. Nothing here imports ray before it is called: what ray reads from the
environment when it is imported must be set before.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

NEEDED = {
    # with its newer output Tune leaves out the callback that tells us how a trial ended
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Set over what the user has set."""
QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "8",
}
"""rltune draws its own table and writes its own files."""
BEHAVIOUR = {
    # a report waits for the controller's next poll: 0.2 s instead of 2 s
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # a trial that reports an objective late must not abort the sweep
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Tune would first wait for its trials, ten seconds and more, while they train on
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Tune's own snapshots are not read back: the run folder is the state
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
}
LOCAL = {
    # binds every process of a cluster on one machine to 127.0.0.1; without it Ray 2.60 listens on all interfaces
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # a trial is some eight processes, most of them idle: on few cores Ray would start them in turn, and warn
    "RAY_worker_maximum_startup_concurrency": str(max(16, os.cpu_count() or 1)),
    # it is taken away as a whole or not at all: a process less for every trial, of a few seconds of CPU to start
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # a busy machine needs more than Ray's minute, after which the cluster does not start
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
}
"""Of a cluster on one machine. Some of these variables are documented; a name that Ray does not read is no error, so
that all of them are tested."""
GCS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
"""Variable and default: how long a process of Ray looks for a head that has gone before it ends itself, from C++."""
HEAD_NODE = "node:__internal_head__"
"""The resource that a cluster's head alone has: a way to keep a trial's driver off nodes that may go."""
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of the checkpoints it looks after, in the folder of its run."""


def init_options(temporary_folder: str | None) -> dict[str, Any]:
    """Return what makes ``ray.init`` keep its files in a folder; its public options do not name one."""
    return {"_temp_dir": temporary_folder}


def address_file(temporary_folder: Path) -> Path:
    """Return where ``ray start --head`` leaves its address; publicly, one can only connect to what it names."""
    return temporary_folder / "ray" / "ray_current_cluster"


@dataclass(frozen=True)
class Greeting:
    """What a cluster says of itself before one is connected to it."""

    ray_version: str
    """Empty where it does not say."""
    python_version: str
    """Of its head, with the patch; empty where it does not say."""
    is_private: bool
    """Whether a program started it for itself, with ``ray.init``."""
    sockets: Sequence[Path]
    """Of its nodes that are alive, each on its own machine."""


class NoGreeting(Exception):  # noqa: N818 - not a fault by itself
    """A cluster does not say who it is: ``UNAUTHENTICATED``, ``DEADLINE_EXCEEDED``, or another of gRPC's codes."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code


def greet(address: str, *, timeout_s: float) -> Greeting:
    """Ask a cluster who it is, with Ray's own token and TLS settings.

    Publicly one can only connect, which tries for 20 s to a minute, says nothing of a token that is refused, and on a
    machine without a node of the cluster ends the process.

    Raises:
        NoGreeting: It refuses, or nothing that speaks Ray's protocol answers.
    """
    from ray._private.grpc_utils import grpc, init_grpc_channel  # grpc comes with ray[default]
    from ray.core.generated import gcs_pb2, gcs_service_pb2
    from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub, NodeInfoGcsServiceStub
    from ray.exceptions import AuthenticationError

    try:
        with init_grpc_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
            asked = gcs_service_pb2.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")
            answer = InternalKVGcsServiceStub(channel).InternalKVGet(asked, timeout=timeout_s)
            all_nodes = gcs_service_pb2.GetAllNodeInfoRequest()
            rows = NodeInfoGcsServiceStub(channel).GetAllNodeInfo(all_nodes, timeout=timeout_s).node_info_list
    except grpc.RpcError as error:
        raise NoGreeting(error.code().name, str(error.details())) from None
    except AuthenticationError as error:  # a token is wanted by RAY_AUTH_MODE, and there is none
        raise NoGreeting("UNAUTHENTICATED", str(error)) from None
    about = json.loads(answer.value) if answer.value else {}
    return Greeting(
        ray_version=str(about.get("ray_version", "")),
        python_version=str(about.get("python_version", "")),
        is_private=bool(about.get("ray_init_cluster")),
        sockets=tuple(Path(row.raylet_socket_name) for row in rows if row.state == gcs_pb2.GcsNodeInfo.ALIVE),
    )


def auth_headers() -> dict[str, str]:
    """Return what lets a request in at a cluster's dashboard, empty without a token; only Ray's clients do so publicly.

    They have no call for nodes or log files by HTTP that a machine without a way to the GCS can use.
    """
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    return dict(get_auth_headers_if_auth_enabled({}))


def torch_backend() -> Any:
    """Return the class that starts torch's process group for Ray Train.

    ``TorchConfig`` is public, and chooses between two meeting places only; a third is a subclass of this one.
    """
    from ray.train.torch.config import _TorchBackend

    return _TorchBackend


def set_torch_environment() -> None:
    """Set what torch and accelerate read of a worker's rank, in a Ray Train worker: step one of ``torch_backend``."""
    from ray.train.torch.config import _set_torch_distributed_env_vars

    _set_torch_distributed_env_vars()


def join_process_group(*, backend: str, world_rank: int, world_size: int, init_method: str, timeout_s: int) -> None:
    """Join a process group at ``init_method``, in a worker: step two of ``torch_backend``.

    It is ``torch.distributed.init_process_group``, and what lets NCCL fail where it would hang.
    """
    from ray.train.torch.config import _setup_torch_process_group

    _setup_torch_process_group(
        backend=backend, world_rank=world_rank, world_size=world_size, init_method=init_method, timeout_s=timeout_s
    )


def is_node_going() -> bool:
    """Return whether Ray has told this Ray Train worker that a node of its job is to be taken away.

    ``ray.train.get_preemption_info`` says the same, and waits for all workers each time: every step would cost a round
    trip. The loop makes all agree anyway. False outside a Ray Train worker.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    except (ImportError, AttributeError, RuntimeError):
        return False


def cause_of(error: BaseException) -> BaseException:
    """Return what a worker died of where Ray Train, in an internal error, says that its health check failed."""
    cause: BaseException = getattr(error, "health_check_failure", error)
    return cause


def named_in_snapshot(snapshot: Path) -> set[str] | None:
    """Return the checkpoint folders that Ray Train's snapshot names, none without one, or None if it cannot be read.

    Ray refuses to start on a snapshot that names what is gone, and has no public way to ask.
    """
    if not snapshot.exists():
        return set()
    try:
        content = json.loads(snapshot.read_text())
        if content["ray_version"] != version("ray"):  # its fields may be others
            return None
        return {str(row["checkpoint_dir_name"]) for row in content["checkpoint_results"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None
