"""Runs on object storage without a cluster: driver and workers in this process, each with its copy, the machines lost
between any two writes.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rltune.config.load import load_experiment
from rltune.errors import StorageError, UserError
from rltune.orchestration import campaign
from rltune.orchestration.export_job import _export
from rltune.orchestration.job import publish_report, run_trial
from rltune.orchestration.job_spec import JobSpec
from rltune.orchestration.trials import Abort, Trials
from rltune.runs import objects
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.lease import CLAIMS, Owner
from rltune.runs.objects import ObjectStore, open_store
from rltune.runs.record import read_record, read_run
from rltune.runs.remote import reader_folder, run_folder, worker_folder
from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from rltune.runs.status import read_status
from rltune.training.model_cache import ModelCache
from tests.orchestration.processes import MAIN, environment
from tests.orchestration.test_trials import trials_in
from tests.storage import BUCKET

CACHE = ModelCache()
SECTIONS: Mapping[str, Any] = {"optim": {"lr": 0.005, "steps": 2, "batch": 2}, "evaluate": {"every": 1, "prompts": 2}}


class Killed(SystemExit):
    """What a process is told that is killed: nothing it could act on, and its threads end without a word."""


class Worker:
    """A trial's only worker, in this process."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.reports: list[dict[str, Any]] = [{}]

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        publish_report(self.spec, checkpoint)
        self.reports.append(dict(metrics))

    def is_stopping(self) -> bool:
        return self.spec.folder.stop_file.exists()

    def storage_error(self, text: str) -> None:
        raise StorageError(text)


def train(trials: Trials, job: JobSpec) -> None:
    worker = Worker(job.of_worker(0))
    run_trial(worker.spec, worker, rank=0, count=1, cache=CACHE)
    trials.on_end(job, worker.reports[-1], "", 1.0)


def drive(path: Path, storage: str | Path) -> None:
    """Do what a sweep does, one trial after another."""
    experiment = load_experiment(path)
    with run_folder(storage, "tiny") as folder:
        trials = trials_in(folder, experiment)
        folder.publish()
        if trials.base_result is None:
            train(trials, trials.job(TrialSpec(BASE_TRIAL, {}, {})))
        while (job := trials.suggest()) is not None:
            train(trials, job)
        trials.write_front()


def found(folder: RunFolder) -> list[dict[str, Any]]:
    """The results, but for the times."""
    rows = [dataclasses.asdict(result) for result in read_results(folder.results_file)]
    whens = ("duration_s", "ended_at", "checkpoint")
    return [{name: value for name, value in row.items() if name not in whens} for row in rows]


@pytest.fixture(scope="module")
def in_a_folder(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The experiment, and what it comes to in a folder."""
    from tests.orchestration.processes import write_experiment

    root = tmp_path_factory.mktemp("storage")
    path = write_experiment(root, tiny_pipeline, **SECTIONS)
    drive(path, root / "runs")
    return path, found(RunFolder(root / "runs" / "tiny"))


@pytest.fixture
def machine(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go to another machine: one with other copies, that nobody on the first one can be seen from."""

    def go(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        worker_folder.cache_clear()

    go("first")
    return go


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.mark.long
def test_a_run_on_object_storage_has_the_numbers_of_one_in_a_folder(
    in_a_folder: tuple[Path, list[dict[str, Any]]], machine: Callable[[str], None], storage: str
) -> None:
    path, expected = in_a_folder
    drive(path, storage)
    machine("a reader's")
    folder, experiment = read_run(f"{storage}/tiny")
    assert found(folder) == expected
    assert [row["step"] for row in read_metrics(folder.trial_dir("001") / "metrics.jsonl")] == [1, 2]
    assert json.loads((folder.path / "front.json").read_text())["members"]
    status = read_status(folder, experiment)
    assert [trial.state for trial in status.trials] == ["done", "done"]
    assert not status.is_active
    store = open_store(f"{storage}/tiny")
    assert store.list(CLAIMS) == {}
    assert not any("trainer.pt" in str(file) or ".npy" in str(file) for file in folder.path.rglob("*"))
    drive(path, storage)  # again: there is nothing left to do
    assert found(reader_folder(f"{storage}/tiny")) == expected


@pytest.mark.long
def test_a_worker_exports_from_the_bucket_alone(
    in_a_folder: tuple[Path, list[dict[str, Any]]], machine: Callable[[str], None], storage: str
) -> None:
    """It has never seen the run, and the card that it writes tells what the trial measured."""
    path, _ = in_a_folder
    drive(path, storage)
    folder, experiment = read_run(f"{storage}/tiny")
    pick, record = read_results(folder.results_file)[-1], read_record(folder)
    assert record is not None
    machine("a worker's")
    about = {"uri": f"{storage}/tiny", "begun": record.started}
    spec = JobSpec("000", "/nowhere", {}, 0.0, str(path.parent), is_loopback=False, **about)
    exported, fault = _export(pick, spec, experiment)
    assert not fault
    assert [one.trial for one in exported] == ["001"]
    store = open_store(f"{storage}/tiny")
    written = {"exports/001/rltune.json", "exports/001/pytorch_lora_weights.safetensors"}
    assert written <= store.list("exports/001/").keys()
    for key in written:
        store.delete(key)
    machine("a user's")
    for words in (("export", f"{storage}/tiny", "--pick", "001"), ("evaluate", f"{storage}/tiny", "--pick", "001")):
        done = subprocess.run([sys.executable, "-c", MAIN, *words], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "001" in done.stdout
    assert written <= store.list("exports/001/").keys()


def kill_after(monkeypatch: pytest.MonkeyPatch, num_calls: int) -> list[str]:
    """Let so many writes and deletions through, and none after them -> those that were made, as they come."""
    calls: list[str] = []
    for name in ("write", "delete"):
        real = getattr(ObjectStore, name)

        def call(self: ObjectStore, key: str, *content: bytes, real: Any = real) -> None:
            if len(calls) >= num_calls:
                raise Killed
            calls.append(key)
            real(self, key, *content)

        monkeypatch.setattr(ObjectStore, name, call)
    return calls


@pytest.mark.long
@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 0.9])
def test_a_kill_between_any_two_writes_loses_no_finished_trial(
    in_a_folder: tuple[Path, list[dict[str, Any]]],
    machine: Callable[[str], None],
    storage: str,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    """The machine is gone with all that it had; another one goes on from the bucket alone."""
    path, expected = in_a_folder
    num_calls = round(share * NUM_WRITES)
    with monkeypatch.context() as patch:
        calls = kill_after(patch, num_calls)
        with suppress(Killed):
            drive(path, storage)
    assert len(calls) >= num_calls  # a thread may come in between
    had_ended = [row["trial"] for row in found(reader_folder(f"{storage}/tiny"))] if has_begun(storage) else []
    monkeypatch.setattr(Owner, "is_dead", True)  # the claim of a process that was on the first machine
    machine("second")
    drive(path, storage)
    again = found(reader_folder(f"{storage}/tiny"))
    assert again == expected
    assert [row["trial"] for row in again][: len(had_ended)] == had_ended


NUM_WRITES = 40
"""Of a run that nobody interrupts, about."""


def has_begun(storage: str) -> bool:
    return bool(open_store(f"{storage}/tiny").list("experiment.yaml"))


@pytest.mark.long
def test_a_bucket_that_shuts_ends_the_run_with_one_message_and_no_failed_trial(
    in_a_folder: tuple[Path, list[dict[str, Any]]],
    machine: Callable[[str], None],
    storage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, expected = in_a_folder
    write, num = ObjectStore.write, [0]

    def shut(self: ObjectStore, key: str, content: bytes) -> None:
        if key.startswith("trials/001/samples"):
            num[0] += 1
            self._try(key, denied)
        write(self, key, content)

    def denied() -> None:
        raise OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "write", shut)
        with pytest.raises((StorageError, Abort), match=r"trials/001/samples/.*: access is denied; give this machine"):
            drive(path, storage)
    assert num[0] >= 1
    assert [row["trial"] for row in found(reader_folder(f"{storage}/tiny"))] == ["000"]
    drive(path, storage)
    assert found(reader_folder(f"{storage}/tiny")) == expected


def test_a_data_base_cannot_lie_on_object_storage(
    machine: Callable[[str], None], storage: str, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.orchestration.processes import write_experiment

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(campaign, "find_address", lambda address: None)
    experiment = load_experiment(write_experiment(tmp_path, tiny_pipeline, track=["mlflow"]))
    with pytest.raises(UserError, match=rf"^track: mlflow keeps a data base .* {storage}/tiny cannot hold; set MLFLOW"):
        campaign.run_campaign(experiment, storage=storage, address=None)


def test_waits_between_tries_add_up_to_less_than_a_claim_lasts() -> None:
    assert sum(objects.WAITS_S) + objects.TIMEOUT_S < 60
