"""A run that is asked to stop leaves a checkpoint at its very step, from which it ends as if it never had."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rltune.runs.rows import read_metrics
from rltune.training.checkpoint import ADAPTER_FILE, SELECTED_FILE, TRAINER_FILE, own_metrics, read_checkpoint_meta
from rltune.training.loop import train_run
from rltune.training.reporter import FolderReporter
from tests.training.runs import Make, train, train_in_processes

POLICY: dict[str, Any] = {"sampler": {"eta": 1.0}, "prompts": {"images_per_prompt": 2}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {
        "resources": {"precision": "bf16"},
        "sampler": {"eta": 1.0},
        "optim": {"ema": 0.5},
        "evaluate": {"select": "smoothness"},
    },
    "queries": {"optim": {"steps": 9, "queries": 15}},
    "dora": {"model": {"lora": {"rank": 2, "rslora": True, "dora": True}}, "optim": {"ema": 0.5, "weight_decay": 0.1}},
    # rewards of a prompt's earlier turns count from the third round on
    "ddpo": POLICY | {"estimator": {"name": "ddpo", "k": None, "draw": None, "options": {"min_count": 2}}},
    "dag": POLICY | {"estimator": {"name": "dag", "k": None, "draw": None, "options": {"anneal": 4, "flow_lr": 1e-2}}},
    "dpok": POLICY
    | {
        "estimator": {
            "name": "dpok",
            "k": None,
            "draw": None,
            "options": {"epochs": 1, "value_lr": 1e-2, "value_batch": 8},
        }
    },
}


class Stopping(FolderReporter):
    """Asks a run to stop after so many steps."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(folder, num_to_keep=10)
        self.left = after

    def is_stopping(self) -> bool:
        self.left -= 1
        return self.left == 0


def trained_until(config: Any, root: Path, base_dir: Path, after: int, resume_from: Path | None) -> Stopping:
    reporter = Stopping(root / "checkpoints", after)
    is_trained = train_run(
        config, trial_dir=root / "trial", base_dir=base_dir, reporter=reporter, resume_from=resume_from
    )
    assert not is_trained
    return reporter


def state_of(checkpoint: Path) -> list[Any]:
    """Everything of a checkpoint that may be compared."""
    meta = read_checkpoint_meta(checkpoint)
    names = sorted(path.name for path in checkpoint.iterdir())
    adapters = [(checkpoint / name).read_bytes() for name in (ADAPTER_FILE, SELECTED_FILE) if name in names]
    # not the process's random state, which nothing here draws from
    parts = torch.load(checkpoint / TRAINER_FILE, weights_only=True)["parts"]
    return [meta.progress, meta.last, meta.selected, names, adapters, json.dumps(flat(parts))]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.endswith(("_s", "_gib"))} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sections"),
    [
        pytest.param(name, sections, id=name, marks=[] if name == "dpok" else pytest.mark.long)
        for name, sections in CASES.items()
    ],
)
def test_a_run_stopped_at_any_step_ends_bitwise_like_one_never_stopped(
    make_config: Make, tmp_path: Path, base_dir: Path, name: str, sections: dict[str, Any]
) -> None:
    config = make_config(**sections)  # evaluated at 2 and, the last, 4
    # after every step, the last one and those of an evaluation included, or after two of them
    stops = (1, 2, 3, 4) if name == "plain" else (2, 3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train(config, whole, base_dir=base_dir)
    resume_from, reports = None, []
    for before, step in zip((0, *stops), stops, strict=False):
        torch.manual_seed(step)  # every process has another past
        reporter = trained_until(config, broken, base_dir, step - before, resume_from)
        stop = reporter.reports[-1]
        assert (stop["step"], stop["is_final"], stop["is_preempted"]) == (step, 0, 1)
        evaluated = max((number for number in (2,) if number < step), default=None)
        if evaluated is None:
            assert "selected_step" not in stop
        else:
            assert stop["selected_step"] <= evaluated
        reports += reporter.reports[:-1]
        resume_from = broken / "checkpoints" / f"step-{step:06d}"
        assert read_checkpoint_meta(resume_from).progress.step == step
    last = train(config, broken, base_dir=base_dir, resume_from=resume_from)
    reports += last.reports
    assert reports == expected.reports
    assert [report["is_preempted"] for report in reports[1:]] == [0, 0]
    rows = [without_times(read_metrics(root / "trial" / "metrics.jsonl")) for root in (whole, broken)]
    assert rows[0] == rows[1]
    ends = [root / "checkpoints" / "step-000004" for root in (whole, broken)]
    assert state_of(ends[0]) == state_of(ends[1])


def flat(value: Any) -> Any:
    """JSON's types, numbers exact."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else value


def stopped_by_one(config: Any, root: Path, *, base_dir: Path, resume_from: Path | None) -> None:
    after = 1 if os.environ["RANK"] == "1" else 99
    trained_until(config, root, base_dir, after, resume_from)


@pytest.mark.slow
def test_one_worker_that_is_asked_to_stop_is_enough(make_config: Make, tmp_path: Path) -> None:
    config = make_config(resources={"workers": 2}, optim={"steps": 3})
    root = tmp_path / "two"
    train_in_processes({"run": config}, root, 2, trainer=stopped_by_one)  # both come back
    (checkpoint,) = (root / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "step-000001"
    assert [row["step"] for row in read_metrics(root / "run" / "trial" / "metrics.jsonl")] == [1]


@pytest.mark.slow
def test_a_reporter_that_raises_ends_the_run_and_leaves_nothing_open_or_behind(
    make_config: Make, tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Abandoned(Exception):  # noqa: N818
        pass

    class Abandoning(FolderReporter):
        def report(self, metrics: Any, checkpoint: Path | None) -> None:
            if checkpoint is not None:
                raise Abandoned

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.raises(Abandoned):
        train_run(
            make_config(),
            trial_dir=tmp_path / "trial",
            base_dir=base_dir,
            reporter=Abandoning(tmp_path / "checkpoints"),
        )
    assert list(temporary.iterdir()) == []
    open_files = {path.resolve() for path in Path("/proc/self/fd").iterdir() if path.exists()}
    assert tmp_path / "trial" / "metrics.jsonl" not in open_files
    assert [row["step"] for row in read_metrics(tmp_path / "trial" / "metrics.jsonl")] == [1, 2]


@pytest.mark.long
def test_the_selected_checkpoint_is_what_is_reported_and_handed_on(
    make_config: Make, tmp_path: Path, base_dir: Path
) -> None:
    sections: dict[str, Any] = {"rewards": {"brightness": {}}, "optim": {"steps": 4, "lr": 2e-2}}
    plain = train(make_config(**sections, evaluate={"every": 1}), tmp_path / "plain", base_dir=base_dir)
    drifts = [report["eval/drift"] for report in plain.reports[1:]]
    assert min(drifts) == drifts[0]  # so that the first is the one to be selected
    config = make_config(**sections, evaluate={"every": 1, "select": "drift"})
    reporter = train(config, tmp_path / "selected", base_dir=base_dir)
    for step, report in enumerate(reporter.reports[1:], start=1):
        assert (report["step"], report["selected_step"], report["eval/drift"]) == (step, 1, drifts[0])
    rows = [without_times(read_metrics(tmp_path / name / "trial" / "metrics.jsonl")) for name in ("plain", "selected")]
    assert rows[0] == rows[1]  # rows keep the present values, and training does not care
    for row, report in zip(rows[1], reporter.reports[1:], strict=True):  # and so does what the stopping rules look at
        evaluated = {name: value for name, value in row.items() if name.startswith(("eval/", "gain/"))}
        assert {name: own_metrics(report)[name] for name in evaluated} == evaluated
    ends = [tmp_path / name / "checkpoints" for name in ("plain", "selected")]
    selected = (ends[1] / "step-000004" / SELECTED_FILE).read_bytes()
    assert selected == (ends[0] / "step-000001" / ADAPTER_FILE).read_bytes()
    assert (ends[1] / "step-000004" / ADAPTER_FILE).read_bytes() == (
        ends[0] / "step-000004" / ADAPTER_FILE
    ).read_bytes()
    assert not (ends[1] / "step-000001" / SELECTED_FILE).exists()
