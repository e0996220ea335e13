"""A test for each of Ray's private names that rltune uses: where one is gone, a sentence says what it is for."""

import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rltune.orchestration import ray_private
from rltune.orchestration.ray_private import BEHAVIOUR, GCS_PATIENCE, LOCAL, NEEDED, QUIET

ADVICE = "find what has taken its place, and change rltune/orchestration/ray_private.py"


def private(module: str, name: str, purpose: str) -> Any:
    """The thing itself; a test that has none fails with a sentence."""
    found: Any = None
    try:
        found = importlib.import_module(f"ray.{module}")
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        pytest.fail(f"Ray {ray.__version__} has no ray.{module}.{name}, {purpose}; {ADVICE}")
    return found


def takes(function: Any, names: Sequence[str], purpose: str) -> None:
    missing = set(names) - set(inspect.signature(function).parameters)
    if missing:
        where = f"{function.__module__}.{function.__qualname__}"
        pytest.fail(f"Ray {ray.__version__}: {where} has no {', '.join(sorted(missing))}, {purpose}; {ADVICE}")


def test_the_greeting_of_a_cluster() -> None:
    """What is asked and answered is played in ``test_handshake.py``."""
    purpose = "by which a cluster is asked for its versions and nodes before one is connected to it"
    takes(private("_private.grpc_utils", "init_grpc_channel", purpose), ["address", "options"], purpose)
    for name in ("InternalKVGcsServiceStub", "NodeInfoGcsServiceStub"):
        private("core.generated.gcs_service_pb2_grpc", name, purpose)
    fields = private("core.generated.gcs_pb2", "GcsNodeInfo", purpose).DESCRIPTOR.fields_by_name
    assert {"raylet_socket_name", "state"} <= set(fields), ADVICE
    key = private("_common.usage.usage_constants", "CLUSTER_METADATA_KEY", purpose)
    space = private("_private.ray_constants", "KV_NAMESPACE_CLUSTER", purpose)
    assert (key, space) == (b"CLUSTER_METADATA", b"cluster"), ADVICE
    source = inspect.getsource(private("_common.usage.usage_lib", "_generate_cluster_metadata", purpose))
    assert all(f'"{name}"' in source for name in ("ray_version", "python_version", "ray_init_cluster")), ADVICE


def test_the_token_in_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    purpose = "by which nodes and log files are asked for at a dashboard that wants a token"
    name = "get_auth_headers_if_auth_enabled"
    private("_private.authentication.http_token_authentication", name, purpose)
    monkeypatch.setattr(f"ray._private.authentication.http_token_authentication.{name}", lambda given: {"a": "b"})
    assert ray_private.auth_headers() == {"a": "b"}


def test_the_backend_of_a_process_group() -> None:
    purpose = "whose subclass meets over a file, so that no port is open"
    backend = private("train.torch.config", "_TorchBackend", purpose)
    takes(backend.on_start, ["worker_group", "backend_config"], purpose)
    assert ray_private.torch_backend() is backend


def test_the_environment_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    purpose = "which tells torch and accelerate a worker's rank"
    private("train.torch.config", "_set_torch_distributed_env_vars", purpose)
    calls: list[str] = []
    monkeypatch.setattr("ray.train.torch.config._set_torch_distributed_env_vars", lambda: calls.append("set"))
    ray_private.set_torch_environment()
    assert calls == ["set"]


def test_the_joining_of_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    purpose = "by which workers join their process group"
    join = private("train.torch.config", "_setup_torch_process_group", purpose)
    options = {"backend": "gloo", "world_rank": 1, "world_size": 2, "init_method": "file:///a", "timeout_s": 3}
    takes(join, list(options), purpose)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.train.torch.config._setup_torch_process_group", lambda **given: seen.append(given))
    ray_private.join_process_group(**options)  # type: ignore[arg-type]
    assert seen == [options]


def test_the_news_that_a_node_is_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    place, purpose = "train.v2._internal.execution", "by which a trial writes a checkpoint before its node goes"
    private(f"{place}.context", "get_train_context", purpose)
    if "preemption_context" not in private(f"{place}.context", "TrainContext", purpose).__dataclass_fields__:
        pytest.fail(f"Ray {ray.__version__}: a TrainContext has no preemption_context, {purpose}; {ADVICE}")
    news = private(f"{place}.preemption", "PreemptionContext", purpose)()
    assert news.preemption_info is None
    context = SimpleNamespace(preemption_context=news)
    monkeypatch.setattr(f"ray.{place}.context.get_train_context", lambda: context)
    assert not ray_private.is_node_going()
    news.preemption_info = object()
    assert ray_private.is_node_going()


def test_what_a_worker_died_of() -> None:
    purpose = "which says what a worker died of, so that one whose node has gone is started more often"
    failed = private("train.v2._internal.exceptions", "WorkerHealthCheckFailedError", purpose)
    cause = RuntimeError("gone")
    if ray_private.cause_of(failed("no answer", cause)) is not cause:
        pytest.fail(f"Ray {ray.__version__}: its error has no health_check_failure, {purpose}; {ADVICE}")
    assert ray_private.cause_of(cause) is cause


def test_the_snapshot_of_checkpoints(tmp_path: Path) -> None:
    purpose = "on which Ray refuses to start where it names a checkpoint that is gone"
    assert private("train.v2._internal.constants", "CHECKPOINT_MANAGER_SNAPSHOT_FILENAME", purpose) == (
        ray_private.SNAPSHOT_FILE
    )
    place = "train.v2._internal.execution.checkpoint.checkpoint_manager"
    state = private(place, "_CheckpointManagerState", purpose)
    row = private(place, "_TrainingResultState", purpose)
    fields = {"ray_version", "checkpoint_results"} - set(state.model_fields)
    fields |= {"checkpoint_dir_name"} - set(row.model_fields)
    if fields:
        pytest.fail(f"Ray {ray.__version__}: a snapshot has no {', '.join(sorted(fields))}, {purpose}; {ADVICE}")
    file = tmp_path / ray_private.SNAPSHOT_FILE
    assert ray_private.named_in_snapshot(file) == set()
    rows = '[{"checkpoint_dir_name": "a"}, {"checkpoint_dir_name": "b"}]'
    file.write_text(f'{{"ray_version": "{ray.__version__}", "checkpoint_results": {rows}}}')
    assert ray_private.named_in_snapshot(file) == {"a", "b"}
    file.write_text(f'{{"ray_version": "2.0", "checkpoint_results": {rows}}}')
    assert ray_private.named_in_snapshot(file) is None


def test_the_folder_of_a_cluster() -> None:
    (option,) = ray_private.init_options("/tmp/somewhere")
    if f'"{option}"' not in inspect.getsource(ray.init):
        pytest.fail(
            f"Ray {ray.__version__}: ray.init takes no {option}, which keeps a cluster's sockets under a short path; "
            f"{ADVICE}"
        )
    assert ray_private.init_options("/tmp/somewhere") == {"_temp_dir": "/tmp/somewhere"}


def test_the_address_of_a_cluster_on_this_machine(tmp_path: Path) -> None:
    address_file = private(
        "_common.utils", "get_ray_address_file", "where a cluster on this machine leaves its address"
    )
    assert str(ray_private.address_file(tmp_path)) == address_file(str(tmp_path / "ray"))


def test_the_resource_of_the_head() -> None:
    purpose = "which keeps the drivers of trials on the head"
    assert private("_common.constants", "HEAD_NODE_RESOURCE_NAME", purpose) == ray_private.HEAD_NODE


@pytest.fixture(scope="module")
def read_variables() -> set[str]:
    """What looks like an environment variable in Ray's sources and in its compiled part."""
    package = Path(ray.__file__).parent
    folders = ("_private", "_common", "train", "tune")
    text = " ".join(path.read_text(errors="replace") for name in folders for path in (package / name).rglob("*.py"))
    found = set(re.findall(r"\b(?:RAY|TUNE)_[A-Z0-9_]+\b", text))
    compiled = (package / "_raylet.so").read_bytes()
    names = re.findall(rb"\b(?:worker_[a-z_]+_concurrency|gcs_rpc_server_[a-z_]+_s)\b", compiled)
    return found | {f"RAY_{name.decode()}" for name in names}


@pytest.mark.parametrize("variable", [*NEEDED, *QUIET, *BEHAVIOUR, *LOCAL, GCS_PATIENCE[0]])
def test_an_environment_variable(variable: str, read_variables: set[str]) -> None:
    if variable not in read_variables:
        pytest.fail(f"Ray {ray.__version__} does not read {variable}, which rltune sets or reads itself; {ADVICE}")
