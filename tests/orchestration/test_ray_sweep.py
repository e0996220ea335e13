"""A whole sweep on a Ray cluster of this machine, through the command line."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest

from rltune.config.load import load_experiment
from rltune.runs.events import read_events
from rltune.runs.record import read_run
from rltune.runs.results import TrialResult, read_results
from rltune.runs.status import read_status
from tests.orchestration.processes import (
    LOOPBACK_HEX,
    PATIENCE_S,
    descendants,
    listening_addresses,
    rltune,
    wait_for,
    write_experiment,
)

pytestmark = [pytest.mark.ray, pytest.mark.long]


@dataclass(frozen=True)
class Swept:
    """A search of three trials, the first of which fails."""

    path: Path
    """Of the experiment."""
    storage: Path
    listening: frozenset[str]
    """Local addresses at which any of its processes listened while it ran."""
    output: str

    @property
    def run(self) -> Path:
        return self.storage / "tiny"

    @property
    def results(self) -> dict[str, TrialResult]:
        return {result.trial: result for result in read_results(self.run / "results.jsonl")}


@pytest.fixture(scope="module")
def swept(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("swept")
    mine = {"reward": "tests.orchestration.own_rewards:picky", "options": {"fails": {"choice": [False, True]}}}
    path = write_experiment(
        folder,
        tiny_pipeline,
        rewards={
            name: {"weight": {"simplex": True}, **rest}
            for name, rest in (("brightness", {}), ("smoothness", {}), ("mine", mine))
        },
        # by this seed the first trial fails, and the other two do not
        search={"trials": 3, "sampler": "random", "seed": 8},
    )
    storage = folder / "runs"
    with rltune("sweep", str(path), storage=storage) as process:
        wait_for(lambda: list(storage.glob("tiny/trials/*/metrics.jsonl")), process, "the first step of a trial")
        listening = listening_addresses(descendants(process.pid) | {process.pid})
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return Swept(path, storage, frozenset(listening), output)


def test_a_sweep_listens_on_loopback_alone(swept: Swept) -> None:
    assert swept.listening
    assert swept.listening <= LOOPBACK_HEX


def test_a_sweep_gives_front_and_exports(swept: Swept) -> None:
    assert sorted(swept.results) == ["000", "001", "002", "003"]
    base = swept.results["000"]
    for trial in ("002", "003"):
        result = swept.results[trial]
        weights = [result.values[f"rewards.{name}.weight"] for name in ("brightness", "smoothness", "mine")]
        assert sum(weights) == pytest.approx(1)
        assert result.metrics["eval/brightness"] > base.metrics["eval/brightness"]
    front = json.loads((swept.run / "front.json").read_text())
    assert front["knee"] in {member["trial"] for member in front["members"]}
    exported = sorted(path.parent.name for path in swept.run.glob("exports/*/pytorch_lora_weights.safetensors"))
    assert front["knee"] in exported
    assert "Pareto front" in swept.output
    # lines are printed at intervals, in which six small steps may all pass
    assert re.search(r"trial 002 step [36]/6", swept.output)
    assert "Traceback" not in swept.output


def test_a_sweep_notes_what_it_did(swept: Swept) -> None:
    noted = [event.event for event in read_events(swept.run / "trials" / "002" / "events.jsonl")]
    assert [name for name in noted if name != "reported"] == [
        "suggested",
        "worker_started",
        "loaded",
        "first_step",
        "trained",
        "ended",
    ]
    usage = read_status(*read_run(swept.run)).usage
    assert usage is not None
    assert all(usage.seconds[kind] > 0 for kind in ("training", "evaluation", "starting", "loading", "base"))
    assert sum(usage.seconds.values()) == pytest.approx(usage.total_s)
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{swept.run / 'study.db'}")
    assert sorted(trial.user_attrs["trial"] for trial in study.trials) == ["001", "002", "003"]


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(swept: Swept) -> None:
    fails = {trial: result.values.get("rewards.mine.options.fails") for trial, result in swept.results.items()}
    assert fails == {"000": None, "001": True, "002": False, "003": False}
    assert [trial for trial, result in swept.results.items() if not result.is_ok] == ["001"]
    reason = swept.results["001"].reason
    assert "no score today" in reason
    assert f"trial 001 failed: {reason}" in swept.output
    assert "Last result" not in swept.output  # Tune's own line


def test_the_same_command_finds_nothing_left_to_do(swept: Swept) -> None:
    """The folder says again what was run."""
    assert load_experiment(swept.run / "experiment.yaml").space == load_experiment(swept.path).space
    before = swept.results
    with rltune("sweep", str(swept.path), storage=swept.storage) as process:
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert swept.results == before
