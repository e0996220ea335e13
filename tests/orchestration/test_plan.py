"""The one door before a run: what can be known is known there, all of it at once, and nothing is written."""

from pathlib import Path
from typing import Any

import pytest

from rltune.config.load import load_experiment
from rltune.errors import ExperimentError
from rltune.orchestration.claiming import claim_run
from rltune.orchestration.known import known_names
from rltune.orchestration.nodes import Node
from rltune.orchestration.plan import Plan, plan, this_machine
from rltune.runs.layout import RunFolder

GOOD = """
prompts: {train: [a, b], eval: [c, d]}
evaluate: {prompts: 2, images_per_prompt: 1}
rewards: {brightness: {}}
optim: {lr: 1.0e-3}
"""


def plan_of(tmp_path: Path, text: str, nodes: list[Node], **options: Any) -> Plan:
    (tmp_path / "x.yaml").write_text(text)
    experiment = load_experiment(tmp_path / "x.yaml", [], known_names(), must_find_files=False)
    return plan(experiment, nodes, RunFolder(tmp_path / "run"), **options)


def faults_of(tmp_path: Path, text: str, nodes: list[Node]) -> list[str]:
    with pytest.raises(ExperimentError) as raised:
        plan_of(tmp_path, text, nodes)
    return [str(fault) for fault in raised.value.faults]


@pytest.mark.slow
def test_a_sound_experiment_is_planned_and_nothing_is_written(tmp_path: Path) -> None:
    found = plan_of(tmp_path, GOOD, [Node(4)])
    assert (found.workload.num_trials, found.workload.num_concurrent) == (1, 2)
    assert found.inputs.prompts["prompts.eval"].prompts == ("c", "d")
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_faults_of_options_prompts_and_nodes_come_together(tmp_path: Path) -> None:
    options = "{reward: compressibility, options: {signal: distance, chroma: '4:4:4'}}"
    text = GOOD.replace("[a, b]", "nowhere.txt").replace("{}", options) + "resources: {workers: 8}\n"
    faults = faults_of(tmp_path, text, [Node(4)])
    assert len(faults) == 3
    assert "chroma must be '4:2:0' with signal 'distance'" in faults[0]
    assert faults[1].startswith("prompts.train: prompts cannot be read (No such file or directory), got 'nowhere.txt'")
    assert "resources: a trial needs 8 workers with 1 CPU each, and the cluster has room for 4" in faults[2]


@pytest.mark.slow
def test_nodes_come_only_to_a_cluster_that_is_attached_to(tmp_path: Path) -> None:
    text = GOOD + "resources: {nodes: autoscale, concurrent: 3, gpus_per_worker: 0, workers: 2}\n"
    (fault,) = faults_of(tmp_path, text, [Node(1)])
    assert fault.startswith(
        "resources.nodes: to a cluster of this machine alone no nodes come, got 'autoscale'; attach"
    )
    assert plan_of(tmp_path, text, [Node(1)], is_attached=True).workload.num_slots == 6


@pytest.mark.long
def test_a_run_that_cannot_go_on_is_refused_before_anything_starts(tmp_path: Path) -> None:
    first = plan_of(tmp_path, GOOD, [Node(4)])
    claim_run(first.folder, first.experiment, precision=first.workload.precision)
    before = {path: path.read_bytes() for path in first.folder.path.rglob("*") if path.is_file()}
    (fault,) = faults_of(tmp_path, GOOD.replace("1.0e-3", "2.0e-3"), [Node(4)])
    assert "optim.lr was 0.001 and is 0.002 now" in fault
    (fault,) = faults_of(tmp_path, GOOD, [Node(4, 1)])  # auto precision would be another on a GPU
    assert "resources.precision was 'fp32' and is 'bf16' now" in fault
    assert plan_of(tmp_path, GOOD, [Node(8)]).workload.num_slots == 8
    assert {path: path.read_bytes() for path in first.folder.path.rglob("*") if path.is_file()} == before


@pytest.mark.long
def test_the_memory_of_a_worker_is_foreseen_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    found = plan_of(tmp_path, GOOD, [Node(4, 1, None, 24.0)])
    assert found.memory is not None
    assert 1.5 < found.memory.peak_gib < 3
    with pytest.raises(ExperimentError) as raised:
        plan_of(tmp_path, GOOD, [Node(4, 1, None, 1.0)])
    (fault,) = raised.value.faults
    assert str(fault).startswith("memory: a worker needs ")
    assert "the smallest GPU has 1.0; " in str(fault)


@pytest.mark.slow
def test_memory_is_that_of_the_largest_settings_that_are_searched(tmp_path: Path) -> None:
    searched = GOOD + "model: {lora: {rank: {choice: [2, 256, 4]}}}\n"
    found = [
        plan_of(tmp_path, text, [Node(4)]).memory
        for text in (searched, searched.replace("{choice: [2, 256, 4]}", "256"))
    ]
    assert found[0] == found[1]


def test_this_machine_has_its_cores() -> None:
    assert this_machine().num_cpus >= 1
    assert this_machine().accelerators is None  # of a type that nobody knows before Ray has looked


@pytest.mark.slow
def test_memory_is_of_the_kind_that_takes_most_whichever_comes_first(tmp_path: Path) -> None:
    rank = "rank: {choice: [1024, 4], when: {model.adapter.kind: lora}}"
    peaks = []
    for kinds in ("[lora, prompt]", "[prompt, lora]", "[prompt]"):
        lora = f", lora: {{{rank}}}" if "lora" in kinds else ""
        found = plan_of(tmp_path, f"{GOOD}model: {{adapter: {{kind: {{choice: {kinds}}}}}{lora}}}\n", [Node(4)])
        assert found.memory is not None
        peaks.append(found.memory.peak_gib)
    assert peaks[0] == peaks[1] > peaks[2]
