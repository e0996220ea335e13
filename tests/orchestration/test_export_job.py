"""Exports as tasks of a cluster, with Ray's part played in this process."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rltune.errors import RunError
from rltune.export.write import Exported
from rltune.orchestration import export_job
from rltune.orchestration.job_spec import JobSpec
from rltune.orchestration.nodes import WorkerNeed
from rltune.runs.layout import RunFolder
from tests.run_folders import SEARCHED, experiment, result


class Tasks:
    """Ray's tasks: what goes in and comes out is pickled, and done where it is waited for."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.names: list[str] = []
        self.lost: set[str] = set()

    def remote(self, **options: Any) -> Callable[..., Any]:
        self.options = options
        tasks = self

        class Task:
            def __init__(self, run: Any, name: str = "") -> None:
                self.run, self.name = run, name

            def options(self, name: str) -> "Task":
                return Task(self.run, name)

            def remote(self, *given: Any) -> tuple[str, Any, bytes]:
                tasks.names.append(self.name)
                return self.name, self.run, pickle.dumps(given)

        return Task

    def get(self, task: tuple[str, Any, bytes]) -> Any:
        name, run, given = task
        if name in self.lost:
            raise OSError("Traceback\n  ...\nNodeDiedError: the node was lost")
        return pickle.loads(pickle.dumps(run(*pickle.loads(given))))


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tasks:
    tasks = Tasks()
    monkeypatch.setattr(export_job, "ray", tasks)
    monkeypatch.chdir("/")

    def export(picks: Any, folder: RunFolder, asked: Any, *, on_export: Callable[[Exported], None]) -> None:
        (pick,) = picks
        assert (folder.path, asked, os.getcwd()) == (tmp_path / "mix", experiment(SEARCHED), str(tmp_path))
        if pick.trial == "002":
            raise RunError("trial 002: its checkpoint is gone")
        on_export(Exported(pick.trial, folder.exports_dir / pick.trial, 0.0, 0.1, {}, "diffusers", "load()"))

    monkeypatch.setattr(export_job, "export_trials", export)
    return tasks


def run(tmp_path: Path, *trials: str) -> list[str]:
    exported: list[str] = []
    picks = [result(trial, 0.5, 0.1) for trial in trials]
    need, folder = WorkerNeed(2, 1.0, "H100"), RunFolder(tmp_path / "mix")
    spec = JobSpec("000", str(folder.path), {}, 1.0, str(tmp_path), is_loopback=False)
    try:
        export_job.export_on_workers(
            picks, folder, experiment(SEARCHED), spec, need, on_export=lambda one: exported.append(one.trial)
        )
    except RunError as error:
        exported.append(str(error))
    return exported


def test_each_pick_is_a_task_with_the_resources_of_a_worker(tasks: Tasks, tmp_path: Path) -> None:
    assert run(tmp_path, "003", "001") == ["003", "001"]
    assert tasks.options == {"num_cpus": 2, "num_gpus": 1.0, "accelerator_type": "H100", "max_retries": 2}
    assert tasks.names == ["export-003", "export-001"]


def test_one_that_fails_does_not_keep_the_others_from_being_written(tasks: Tasks, tmp_path: Path) -> None:
    tasks.lost.add("export-004")
    assert run(tmp_path, "001", "002", "004", "003") == [
        "001",
        "003",
        "2 of 4 exports failed\n  trial 002: its checkpoint is gone\n  trial 004: NodeDiedError: the node was lost",
    ]
    assert run(tmp_path, "002") == ["trial 002: its checkpoint is gone"]
