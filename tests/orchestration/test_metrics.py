"""The figures of a run for Prometheus: which there are, and that Grafana's file asks for none other."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rltune.orchestration import metrics
from rltune.orchestration.metrics import GAUGES, exported, samples
from rltune.runs.layout import TrialSpec
from rltune.runs.status import read_status
from tests.docs.pages import ROOT
from tests.run_folders import experiment, result, write_rows, write_run

GRAFANA = json.loads((ROOT / "cluster" / "grafana" / "rltune.json").read_text(encoding="utf-8"))


def of(found: list[Any], name: str) -> dict[tuple[str, ...], float]:
    return {tuple(tags.values()): value for key, tags, value in found if key == name}


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    asked = experiment()
    folder = write_run(tmp_path / "mix", asked, [result("000"), result("001", 1.0), result("002", reason="no")])
    write_rows(folder, "001", [{"step": 1.0}, {"step": 2.0, "step_s": 1.5}])
    status = read_status(folder, asked)
    found = list(samples(status, asked))
    trials = of(found, "rltune_trials")
    assert sum(trials.values()) == 3
    assert (trials["done",], trials["failed",], trials["running",]) == (2, 1, 0)
    assert of(found, "rltune_trials_planned") == {(): status.num_trials}
    assert of(found, "rltune_step_seconds") == {(): pytest.approx(1.0)}
    assert status.front is not None
    assert of(found, "rltune_hypervolume") == {(): status.front.hypervolume}
    assert of(found, "rltune_front_size") == {(): 1}
    objective = asked.shared.objective_names[0]
    evaluated = {trial.trial: trial.metrics[f"eval/{objective}"] for trial in status.trials if trial.metrics}
    values = of(found, "rltune_objective")
    assert {trial: value for (trial, name), value in values.items() if name == objective} == evaluated
    assert set(of(found, "rltune_step")) == {("001",), ("002",)}
    for name, tags, _ in found:
        assert {"run", *tags} == set(GAUGES[name][1])


def test_a_run_is_handed_on_with_its_name_and_once_more_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gauge:
        def __init__(self, name: str) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            said.append((self.name, tags, value))

    said: list[tuple[str, dict[str, str], float]] = []
    monkeypatch.setattr(metrics, "_gauge", Gauge)
    asked = experiment()
    folder = write_run(tmp_path / "mix", asked, [result("000")])
    with exported(folder, asked), folder.results_file.open("a") as file:
        file.write(json.dumps(asdict(result("001"))) + "\n")
        folder.write_trial(TrialSpec("001", result("001").values, {}))
    assert {tags["run"] for _, tags, _ in said} == {folder.name}
    assert ("rltune_trials", {"run": folder.name, "state": "done"}, 2.0) in said


def test_what_cannot_be_handed_on_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("no agent")

    monkeypatch.setattr(metrics, "_gauge", broken)
    with exported(write_run(tmp_path / "mix", experiment(), [result("000")]), experiment()):
        pass


def test_grafana_asks_for_what_is_there_and_shows_all_of_it() -> None:
    expressions = [target["expr"] for panel in GRAFANA["panels"] for target in panel["targets"]]
    queries = [found["query"]["query"] for found in GRAFANA["templating"]["list"] if found["type"] == "query"]
    asked = set(re.findall(r"ray_(rltune_\w+)", " ".join(expressions + queries)))
    assert asked == set(GAUGES)
    for expression in expressions:
        (name,) = re.findall(r"ray_(rltune_\w+)", expression)
        tags = set(re.findall(r"(\w+)=~?\"", expression)) | set(re.findall(r"by \((\w+)\)", expression))
        assert tags <= set(GAUGES[name][1]), expression
    assert len({panel["id"] for panel in GRAFANA["panels"]}) == len(GRAFANA["panels"])
