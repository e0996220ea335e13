"""A warm worker without Ray: trial after trial in one process, stopped between reports, and what goes wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rltune.config.experiment import RunConfig
from rltune.orchestration.gang import WarmTrial, WarmWorker
from rltune.orchestration.job import CHECKPOINTS_KEPT
from rltune.orchestration.job_spec import JobSpec
from rltune.orchestration.tuning import SPEC
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.rows import read_metrics
from rltune.training.checkpoint import load_adapter, read_checkpoint_meta
from tests.training.runs import train


@pytest.fixture
def spec_of(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., JobSpec]:
    def build(trial: str, **sections: Any) -> JobSpec:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "experiment.yaml").touch()
        return JobSpec(
            trial=trial,
            run_dir=str(tmp_path / "run"),
            config=make_config(**sections).model_dump(mode="json"),
            num_gpus_per_worker=0,
            work_dir=str(tmp_path),
            is_loopback=True,
        )

    return build


@pytest.fixture
def worker() -> WarmWorker:
    return WarmWorker("mix", rank=0, size=1)


def test_the_dashboard_calls_a_gang_and_its_workers_by_the_run_s_name(
    worker: WarmWorker, spec_of: Callable[..., JobSpec]
) -> None:
    """Ray shows what ``repr`` returns once an actor has been made."""
    assert repr(worker) == "mix-worker-0"
    gang = WarmTrial.__new__(WarmTrial)
    gang.reset_config({SPEC: spec_of("001", name="mix")})
    assert repr(gang) == "mix-gang"


def reports_of(worker: WarmWorker) -> list[dict[str, float]]:
    reports = []
    while (report := worker.next()) is not None:
        reports.append(report)
    return reports


def checkpoints(spec: JobSpec) -> list[Path]:
    return sorted((spec.folder.checkpoints_dir(spec.trial) / spec.train_name).iterdir())


def timeless(report: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in report.items() if name != "eval_s"}


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_trial_after_trial_is_what_each_is_alone(
    worker: WarmWorker,
    spec_of: Callable[..., JobSpec],
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    precision: str,
) -> None:
    every: dict[str, Any] = {"resources": {"precision": precision}, "evaluate": {"every": 1, "prompts": 1}}
    worker.start(spec_of(BASE_TRIAL, **every))
    assert [report["is_final"] for report in reports_of(worker)] == [1.0]
    worker.start(spec_of("001", optim={"lr": 5e-2, "steps": 1}, model={"lora": {"rank": 4}}, **every))
    reports_of(worker)
    spec = spec_of("002", **every)
    worker.start(spec)
    found = reports_of(worker)
    alone = train(make_config(**every), tmp_path / "alone")
    assert [timeless(report) for report in found] == [timeless(report) for report in alone.reports]
    kept = checkpoints(spec)
    assert len(kept) == CHECKPOINTS_KEPT
    steps = [read_checkpoint_meta(path).progress.step for path in kept]
    assert steps == [1, 2, 3, 4][-CHECKPOINTS_KEPT:]
    expected = load_adapter(tmp_path / "alone" / "checkpoints" / "step-000004")
    assert all(torch.equal(value, expected[name]) for name, value in load_adapter(kept[-1]).items())


@pytest.mark.long
def test_a_trial_waits_at_its_report_and_is_taken_up_where_it_was_left(
    worker: WarmWorker, spec_of: Callable[..., JobSpec]
) -> None:
    spec = spec_of("001", optim={"steps": 6})
    worker.start(spec)
    reports = [worker.next(), worker.next()]
    assert [report["step"] for report in reports if report] == [0, 2]
    worker.start(spec_of("002", optim={"steps": 2}))  # the first is abandoned: it must not have gone on
    assert [row["step"] for row in read_metrics(spec.folder.trial_dir("001") / "metrics.jsonl")] == [1, 2]
    assert [report["step"] for report in reports_of(worker)] == [0, 2]
    worker.start(spec)
    assert [report["step"] for report in reports_of(worker)] == [4, 6]
    assert [row["step"] for row in read_metrics(spec.folder.trial_dir("001") / "metrics.jsonl")] == list(range(1, 7))


@pytest.mark.long
def test_a_faulty_trial_says_why_and_the_next_one_runs(
    worker: WarmWorker, spec_of: Callable[..., JobSpec], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    faulty = spec_of("001", prompts={"train": str(empty)})
    worker.start(faulty)
    assert reports_of(worker) == []
    assert "holds no prompt" in faulty.folder.failure_file("001").read_text()
    worker.start(spec_of("002"))
    assert reports_of(worker)[-1]["is_final"] == 1.0


@pytest.mark.slow
def test_what_is_nobodys_fault_is_raised_where_tune_asks(
    worker: WarmWorker, spec_of: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a device went away")

    monkeypatch.setattr("rltune.training.loop.train_run", broken)
    worker.start(spec_of("001"))
    with pytest.raises(RuntimeError, match="a device went away"):
        worker.next()
    monkeypatch.undo()
    worker.start(spec_of("002"))
    assert reports_of(worker)[-1]["is_final"] == 1.0
