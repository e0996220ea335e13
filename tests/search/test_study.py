import json
import logging
import sqlite3
import warnings
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.trial import FrozenTrial, TrialState

from rltune.runs.layout import BASE_TRIAL
from rltune.runs.results import TrialResult
from rltune.search import study
from rltune.search.study import StudyFile
from tests.run_folders import experiment, result

PARAMS = {"model.lora.rank": 4, "optim.lr": 1e-3, "simplex[0]": 0.25}
BASE = result(BASE_TRIAL, 0.5, 0.0)
STOPPED = result("002", 0.25, 0.125, reason="rank 7 of 9", stopped_at=5, params=PARAMS)
RESULTS = [
    BASE,
    result(
        "003",
        0.7,
        0.2,
        params=PARAMS,
        constraints={"diversity.min": 0.25, "drift.max": -1.0},
        checkpoint="trials/003/c",
        duration_s=90.0,
        ended_at="2026-01-02T03:04:05+00:00",
    ),
    STOPPED,
    result("001", reason="step 3: nan", params=PARAMS),
]


def study_file(folder: Path) -> StudyFile:
    return StudyFile(folder / "study.db", "mix", experiment())


def trials_in(folder: Path) -> list[FrozenTrial]:
    """What another program finds."""
    return optuna.load_study(study_name="mix", storage=f"sqlite:///{folder / 'study.db'}").trials


@pytest.mark.slow
def test_a_trial_has_its_last_image_grid_as_an_artifact(tmp_path: Path) -> None:
    def draw(trial: str, step: int, content: bytes) -> None:
        file = tmp_path / "trials" / trial / "samples" / f"step-{step:06}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    draw("003", 5, b"early")
    draw("003", 10, b"last")
    draw("002", 5, b"stopped")
    file = study_file(tmp_path)
    for results in (RESULTS[:2], RESULTS):  # one with the study, the others added to it
        file.update(results)
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    store = FileSystemArtifactStore(tmp_path / "study_artifacts")
    pictures = []
    for trial in trials_in(tmp_path):
        for meta in get_all_artifact_meta(trial, storage=storage):
            assert (meta.filename, meta.mimetype) == (f"trial-{meta.artifact_id}.png", "image/png")
            with store.open_reader(meta.artifact_id) as picture:
                pictures.append((trial.user_attrs["trial"], picture.read()))
    assert pictures == [("003", b"last"), ("002", b"stopped")]  # 001 failed before its first evaluation
    (tmp_path / "study.db").unlink()
    study_file(tmp_path).update(RESULTS)  # made anew, with its pictures and no others
    assert len(list((tmp_path / "study_artifacts").iterdir())) == 2
    storage.engine.dispose()


def ids(folder: Path) -> list[str]:
    return [trial.user_attrs["trial"] for trial in trials_in(folder)]


@pytest.mark.slow
def test_every_trial_is_in_the_study_as_it_ended(tmp_path: Path) -> None:
    study_file(tmp_path).update(RESULTS)
    found = optuna.load_study(study_name="mix", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert found.metric_names == ["brightness", "drift"]
    assert [direction.name for direction in found.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert found.user_attrs["base model"] == {"brightness": 0.5, "drift": 0.0}
    done, stopped, failed = found.trials
    assert [trial.state for trial in found.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    assert done.values == [0.7, 0.2]
    assert done.params == PARAMS
    assert done.distributions["optim.lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    # by name, and by number as older programs have them
    assert done.constraints == {"diversity.min": 0.25, "drift.max": -1.0, "0": 0.25, "1": -1.0}
    assert done.user_attrs == {"trial": "003", "state": "ok", "reason": "", "checkpoint": "trials/003/c", "step": 10}
    assert done.duration is not None
    assert done.duration.total_seconds() == 90
    assert (stopped.user_attrs["state"], stopped.user_attrs["step"]) == ("stopped", 5)
    assert failed.values is None
    assert failed.user_attrs["reason"] == "step 3: nan"
    assert [trial.user_attrs["trial"] for trial in found.best_trials] == ["002"]  # 003 breaks a constraint


@pytest.mark.slow
def test_what_is_new_is_appended(tmp_path: Path) -> None:
    mirror = study_file(tmp_path)
    for count in range(len(RESULTS) + 1):
        mirror.update(RESULTS[:count])
        assert len(ids(tmp_path)) == max(count - 1, 0)
    before = (tmp_path / "study.db").stat().st_ino
    study_file(tmp_path).update(RESULTS)  # a resume finds it as it is
    study_file(tmp_path).update([*RESULTS, result("004", 0.1, params=PARAMS)])
    assert ids(tmp_path) == ["003", "002", "001", "004"]
    assert (tmp_path / "study.db").stat().st_ino == before


@pytest.mark.long
def test_the_dashboard_shows_ids_metrics_and_constraints(tmp_path: Path) -> None:
    optuna_dashboard = pytest.importorskip("optuna_dashboard")
    study_file(tmp_path).update(RESULTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries beneath it
        app = optuna_dashboard.wsgi(f"sqlite:///{tmp_path / 'study.db'}")
        answers: list[str] = []
        environ: dict[str, Any] = {"PATH_INFO": "/api/studies/1", "QUERY_STRING": "after=0"}
        setup_testing_defaults(environ)
        body = b"".join(app(environ, lambda status, headers, *rest: answers.append(status)))
    assert answers == ["200 OK"]
    shown = json.loads(body)
    assert (shown["name"], shown["objective_names"]) == ("mix", ["brightness", "drift"])
    trials = [{attribute["key"]: attribute["value"] for attribute in trial["user_attrs"]} for trial in shown["trials"]]
    assert [trial["trial"] for trial in trials] == ["003", "002", "001"]
    assert [trial["constraints"] for trial in shown["trials"]] == [[0.25, -1.0], [], []]
    assert [trial["state"] for trial in shown["trials"]] == ["Complete", "Complete", "Fail"]


def _change_a_value(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE trial_values SET value = 9.0")
    connection.close()


SPOILT: dict[str, Any] = {
    "gone": Path.unlink,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "empty": lambda path: path.write_bytes(b""),
    "no data base": lambda path: path.write_text("hello" * 2000),
    "other values": _change_a_value,
    "more trials": lambda path: StudyFile(path, "mix", experiment()).update(
        [*RESULTS, result("009", 0.1, params=PARAMS)]
    ),
    "another run": lambda path: (path.unlink(), StudyFile(path, "other", experiment()).update(RESULTS)),
}


@pytest.mark.long
@pytest.mark.parametrize("how", SPOILT)
def test_a_study_that_disagrees_is_written_anew(tmp_path: Path, how: str) -> None:
    study_file(tmp_path).update(RESULTS)
    SPOILT[how](tmp_path / "study.db")
    study_file(tmp_path).update(RESULTS)
    assert ids(tmp_path) == ["003", "002", "001"]
    assert trials_in(tmp_path)[0].values == [0.7, 0.2]
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


@pytest.mark.long
def test_a_lock_is_waited_for_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(study, "LOCK_S", 0.01)
    mirror = study_file(tmp_path)
    mirror.update(RESULTS[:2])
    other = sqlite3.connect(tmp_path / "study.db")
    other.execute("BEGIN EXCLUSIVE")
    with caplog.at_level(logging.WARNING):
        mirror.update(RESULTS)
        mirror.update(RESULTS)
    (record,) = [record for record in caplog.records if record.name == study.__name__]
    assert "study.db: not written (" in record.getMessage()
    assert "database is locked" in record.getMessage()
    other.rollback()
    other.close()
    mirror.update(RESULTS)  # too early to try again
    assert ids(tmp_path) == ["003"]
    monkeypatch.setattr(mirror, "_retry_at", 0.0)
    mirror.update(RESULTS)
    assert ids(tmp_path) == ["003", "002", "001"]


def test_a_place_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirror = StudyFile(tmp_path / "no" / "folder" / "study.db", "mix", experiment())
    mirror.update(RESULTS)
    assert "the sweep goes on without it" in caplog.text


def test_a_trial_that_optuna_refuses_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong: list[TrialResult] = [*RESULTS, result("004", 0.1, params={**PARAMS, "optim.lr": 5.0})]
    study_file(tmp_path).update(wrong)
    assert "not written" in caplog.text
