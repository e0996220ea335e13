"""A whole run as its caller is told of it: the stages and their order, no cluster started."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rltune.config.load import Experiment
from rltune.errors import RunError, UserError
from rltune.export.write import Exported
from rltune.orchestration import campaign, trials
from rltune.orchestration.campaign import Confirming, Found, NotConfirmed, Planned, Reported, Trained, run_campaign
from rltune.orchestration.cluster import Cluster
from rltune.orchestration.nodes import Node
from rltune.orchestration.sweep import Sweep
from rltune.runs.base_scores import BaseScores
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.results import TrialResult
from tests.run_folders import SEARCHED, experiment, result

PROMPTS = {"train": ["a", "b"], "eval": ["c", "d"]}
ASKED = experiment(SEARCHED, prompts=PROMPTS, evaluate={"every": 5, "prompts": 2, "confirm": 2})


class Stage:
    """Where Ray would be: trials end as they are given, and what is told is kept."""

    def __init__(self, tmp_path: Path) -> None:
        self.storage = tmp_path / "runs"
        self.told: list[Any] = []
        self.shown: list[str] = []
        self.results: list[TrialResult] = [result(BASE_TRIAL, 0.5, 0.1)]
        self.confirm_error: RunError | None = None
        self.is_own = True

    def run(self, asked: Experiment = ASKED, **options: Any) -> Found:
        @contextmanager
        def display(folder: RunFolder, experiment: Experiment) -> Iterator[None]:
            self.shown.append("begins")
            yield
            self.shown.append("ends")

        return run_campaign(
            asked, storage=self.storage, address=None, notify=self.told.append, display=display, **options
        )

    @property
    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.told]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    found = Stage(tmp_path)

    @contextmanager
    def connect(address: str | None) -> Iterator[Cluster]:
        yield Cluster("127.0.0.1:1", is_own=found.is_own, dashboard_url="", nodes=(Node(2.0),))

    def run(sweep: Sweep) -> None:
        for row in found.results:
            if row.trial != BASE_TRIAL:
                job = sweep.trials.suggest()
                assert job is not None
                assert job.trial == row.trial
            sweep.trials.take(row)

    def confirm(sweep: Sweep) -> None:
        if found.confirm_error:
            raise found.confirm_error

    def export(
        picks: list[TrialResult], folder: RunFolder, asked: Any, *, on_export: Callable[[Exported], None]
    ) -> None:
        for pick in picks:
            on_export(Exported(pick.trial, folder.exports_dir / pick.trial, 0.0, 0.1, {}, "diffusers", "load()"))

    monkeypatch.setattr(campaign, "find_address", lambda address: None)
    monkeypatch.setattr(campaign, "connect", connect)
    monkeypatch.setattr(campaign, "export_trials", export)
    monkeypatch.setattr(Sweep, "run", run)
    monkeypatch.setattr(Sweep, "confirm", confirm)
    values = np.array([0.4, 0.6])
    monkeypatch.setattr(trials, "load_scores", lambda folder: BaseScores({"brightness": values, "drift": values}))
    return found


@pytest.mark.slow
def test_the_stages_of_a_sweep_in_their_order(stage: Stage) -> None:
    stage.results += [result(f"00{i}", 0.5 + i / 10, 0.1 * i) for i in range(1, 5)]
    found = stage.run()
    assert stage.kinds == ["Planned", "Trained", "Confirming", "Found", "Reported", *["Exported"] * len(found.picks)]
    planned, trained = stage.told[:2]
    assert (planned.num_left, planned.is_resumed, trained.num_left, trained.over) == (4, False, 0, "")
    assert stage.shown == ["begins", "ends"]
    assert stage.told[3] is found
    assert {pick.trial for pick in found.picks} == {event.trial for event in stage.told[5:]}


@pytest.mark.slow
def test_what_is_not_to_be_exported_is_not(stage: Stage) -> None:
    stage.results += [result(f"00{i}", 0.5 + i / 10, 0.1 * i) for i in range(1, 5)]
    stage.run(exports=False)
    assert stage.kinds == ["Planned", "Trained", "Confirming", "Found", "Reported"]


@pytest.mark.slow
def test_a_front_that_cannot_be_measured_again_stands(stage: Stage) -> None:
    stage.results += [result(f"00{i}", 0.5 + i / 10, 0.1 * i) for i in range(1, 5)]
    stage.confirm_error = RunError("the prompts are gone")
    stage.run(exports=False)
    assert stage.told[3] == NotConfirmed("the prompts are gone")
    assert isinstance(stage.told[4], Found)


@pytest.mark.long
def test_trials_that_are_left_are_an_interruption_and_are_gone_on_with(stage: Stage) -> None:
    stage.results += [result("001", 0.6, 0.1)]
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    assert stage.kinds == ["Planned", "Trained"]
    assert stage.told[1].num_left == 3
    stage.told.clear()
    stage.results = [result(f"00{i}", 0.5 + i / 10, 0.1 * i) for i in range(2, 5)]
    stage.run()
    assert (stage.told[0].num_ended, stage.told[0].num_left, stage.told[0].is_resumed) == (1, 3, True)


@pytest.mark.slow
def test_without_a_trial_that_ended_well_there_is_nothing_to_find(stage: Stage) -> None:
    stage.results += [result(f"00{i}", reason="nan") for i in range(1, 5)]
    with pytest.raises(RunError, match=r"no trial of .* ended well; the reasons are in "):
        stage.run()
    assert stage.kinds == ["Planned", "Trained"]


@pytest.mark.slow
def test_where_nothing_beats_the_base_model_nothing_is_picked(stage: Stage) -> None:
    stage.results += [result(f"00{i}", 0.4, 0.5) for i in range(1, 5)]
    found = stage.run()
    assert found.picks == ()
    assert found.nearest is not None
    assert stage.kinds[-2:] == ["Found", "Reported"]


@pytest.mark.slow
def test_a_run_ends_with_its_page_and_not_with_what_was_wrong_with_it(stage: Stage) -> None:
    """Here the base model's measurements are not on the disk: there is no page, and no error."""
    stage.results += [result(f"00{i}", 0.5 + i / 10, 0.1 * i) for i in range(1, 5)]
    found = stage.run(exports=False)
    told = stage.told[-1]
    assert isinstance(told, Reported)
    assert told.page == found.folder.path / "report.html"
    assert "the base model has no result yet" in told.why_not
    assert not told.page.exists()


@pytest.mark.long
def test_a_single_run_is_its_one_trial(stage: Stage) -> None:
    fixed = {
        **SEARCHED,
        "model": {"lora": {"rank": 4}},
        "rewards": {"brightness": {}},
        "optim": {"steps": 10, "batch": 4},
    }
    stage.results += [result("001", 0.9, 0.1, values={})]
    found = stage.run(experiment(fixed, prompts=PROMPTS, evaluate={"every": 5, "prompts": 2}))
    assert found.single is not None
    assert [pick.trial for pick in found.picks] == ["001"]
    assert not any(isinstance(event, Confirming) for event in stage.told)
    assert isinstance(stage.told[0], Planned)
    assert isinstance(stage.told[1], Trained)


@pytest.mark.slow
def test_nothing_is_started_on_nodes_that_cannot_run_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_nodes(nodes: Any, need: Any, folder: Path) -> None:
        assert (len(nodes), need.num_cpus, folder) == (1, 1, stage.storage / "mix")
        raise UserError("no rltune")

    monkeypatch.setattr(campaign, "check_nodes", check_nodes)
    stage.is_own = False
    with pytest.raises(UserError, match="no rltune"):
        stage.run()
    assert not stage.told


def test_a_run_does_not_go_where_a_submitted_job_is_unpacked(stage: Stage) -> None:
    stage.storage = stage.storage / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "runs"
    with pytest.raises(UserError, match="is in the folder that Ray unpacks a submitted job into and deletes with it"):
        stage.run()
    assert not stage.storage.exists()
