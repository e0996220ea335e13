"""Sweeps over 64 and 1,000 GPUs by discrete events: how busy slots and driver are, and what reaches storage.

The driver is the real one: ``Trials`` suggests, judges reports, records ends, and writes the run folder, as it does
between Ray's callbacks. Each call takes, on the simulated clock, the CPU seconds that it took here; calls wait for one
another, for the driver is one process. Workers are simulated: a trial starts, measures itself ``--evaluations`` times
at equal distances, and lasts a log-normal time. Ray's own messages are not counted.

    python tests/benchmarks/large_sweeps.py --slots 64 1000 --like runs/mix

``--like`` names a finished run: what its trials have written is counted, a file or an appended row a request.
"""

import argparse
import heapq
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from search_simulated import BASE, DEVIATION, MIX, measured

from rltune.config.load import load_experiment
from rltune.config.rules import Known
from rltune.orchestration.claiming import claim_run
from rltune.orchestration.job_spec import JobSpec
from rltune.orchestration.nodes import Node
from rltune.orchestration.trials import Trials
from rltune.orchestration.workload import work_out
from rltune.runs.layout import BASE_TRIAL
from rltune.search.searcher import SAMPLERS
from rltune.training.checkpoint import Evaluated, Progress, save_checkpoint
from tests.run_folders import OWN, write_run

MEDIAN_S, SIGMA = 1800.0, 0.5
"""Of a trial: half an hour, and in nine of ten cases 13 to 69 minutes."""
SHORT = 32
"""Steps of a trial, fewer than an experiment's: they are not taken."""


COLUMNS = (
    "GPUs", "trials", "search", "hours", "slots busy", "driver busy", "CPU s of the last: suggest, report, end",
    "longest wait, s", "driver's requests a trial", "all requests a second",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A trial's evaluation that is due."""

    job: JobSpec
    share: float
    """Of its steps."""
    lasts_s: float
    """The whole trial."""


class Requests:
    """Counts what the driver opens for writing, renames and reads below a folder."""

    def __init__(self, folder: Path) -> None:
        self._prefix = f"{folder}{os.sep}"
        self._is_on = False
        self.counts: dict[str, int] = defaultdict(int)
        sys.addaudithook(self._note)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is opened within."""
        self._is_on = True
        yield
        self._is_on = False

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_on and event == "open" and str(arguments[0]).startswith(self._prefix):
            is_read = isinstance(arguments[1], str) and not set(arguments[1]) & set("wax+")
            self.counts["read" if is_read else "written"] += 1


class Driver:
    """The driver on the simulated clock: calls come one after the other, each as long as it took here."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.spent_s: dict[str, list[float]] = defaultdict(list)
        self.longest_wait_s = 0.0

    def call(self, at_s: float, name: str, work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
        """Return when a call that comes at ``at_s`` is done, and what it gave."""
        start = time.process_time()
        found = work(*given)
        took_s = time.process_time() - start
        self.longest_wait_s = max(self.longest_wait_s, self.now_s - at_s)
        self.now_s = max(self.now_s, at_s) + took_s
        self.spent_s[name].append(took_s)
        return self.now_s, found


@dataclass
class Outcome:
    """What became of a sweep, in simulated seconds."""

    makespan_s: float
    busy_s: float
    """Of all slots, in trials."""
    driver: Driver
    requests: dict[str, int]
    num_ended: int


def simulate(slots: int, num_trials: int, sampler: str, evaluations: int, start_s: float, path: Path) -> Outcome:
    """Run one sweep.

    Args:
        slots: GPUs, each of which takes one trial at a time.
        num_trials: Trials in all.
        sampler: Of the search.
        evaluations: Of a trial.
        start_s: From a trial's suggestion to its first step.
        path: Where the run folder goes.
    """
    rng, every = np.random.default_rng(0), SHORT // evaluations
    search = f"search={{sampler: {sampler}, trials: {num_trials}, prune: true, grace: {every}}}"
    sections = [search, f"optim.steps={SHORT}", f"evaluate.every={every}", "resources.precision=fp32"]
    experiment = load_experiment(MIX, sections, Known()).settled(OWN)
    folder = write_run(path / "mix", experiment, spread=DEVIATION)
    work = work_out(experiment, (Node(float(slots), float(slots)),))
    trials = Trials(claim_run(folder, experiment, precision=work.precision), work, is_loopback=False)
    config = experiment.shared.model_dump(mode="json")
    base = JobSpec(BASE_TRIAL, str(folder.path), config, num_gpus_per_worker=1, work_dir="/", is_loopback=False)
    gains = {f"gain/{name}": 0.0 for name in BASE}
    trials.on_end(base, {f"eval/{name}": value for name, value in BASE.items()} | gains | {"step": 0.0}, "", 1.0)

    driver, requests, gone = Driver(), Requests(folder.path), set[str]()
    queue: list[tuple[float, int, Report | None]] = [(0.0, slot, None) for slot in range(slots)]
    order, busy_s = itertools.count(slots), 0.0
    while queue:
        at_s, _, report = heapq.heappop(queue)
        if report is None:  # a slot is free
            with requests.counted():
                done_s, job = driver.call(at_s, "suggest", trials.suggest)
            if job is not None:
                lasts_s = float(rng.lognormal(np.log(MEDIAN_S), SIGMA))
                for i in range(1, evaluations + 1):
                    due_s = done_s + start_s + lasts_s * i / evaluations
                    heapq.heappush(queue, (due_s, next(order), Report(job, i / evaluations, lasts_s)))
            continue
        if report.job.trial in gone:
            continue
        metrics = metrics_of(report, rng)
        leave_checkpoint(report.job, metrics)
        with requests.counted():
            done_s, is_stopped = driver.call(at_s, "report", trials.on_report, report.job, metrics)
        if is_stopped or report.share == 1:
            gone.add(report.job.trial)
            busy_s += report.lasts_s * report.share
            with requests.counted():
                done_s, _ = driver.call(done_s, "end", trials.on_end, report.job, metrics, "", report.lasts_s)
            heapq.heappush(queue, (done_s, next(order), None))
    return Outcome(driver.now_s, busy_s, driver, dict(requests.counts), len(gone))


def metrics_of(report: Report, rng: np.random.Generator) -> dict[str, float]:
    """Return what a trial measures after a share of its steps."""
    spec = report.job.folder.read_trial(report.job.trial)
    assert spec is not None
    found = {name: value + 0.01 * rng.standard_normal() for name, value in measured(spec.values, report.share).items()}
    metrics = {f"eval/{name}": float(value) for name, value in found.items()}
    metrics |= {f"gain/{name}": float(value) - BASE[name] for name, value in found.items()}
    metrics |= {f"{kind}/{name}_se": 0.01 for kind in ("eval", "gain") for name in BASE}
    return {**metrics, "step": SHORT * report.share, "is_final": float(report.share == 1), "is_preempted": 0.0}


def leave_checkpoint(job: JobSpec, metrics: dict[str, float]) -> None:
    """Leave what a worker does: a checkpoint that says of itself what it measured, and the row of that step."""
    step = int(metrics["step"])
    folder = job.folder.checkpoints_dir(job.trial) / job.train_name / f"checkpoint_{step:06d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.iterdir():  # a sweep keeps one
        shutil.rmtree(old)
    last = Evaluated(step, {name: value for name, value in metrics.items() if "/" in name})
    save_checkpoint(folder, {"a": torch.zeros(2)}, {}, Progress(step, step), last=last)
    with (job.folder.trial_dir(job.trial) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def written_by_workers(run: Path) -> float:
    """Return how many requests the workers of a finished run made a trial: a file each, and a row that was added."""
    trials = [folder for folder in (run / "trials").iterdir() if folder.name != BASE_TRIAL and folder.is_dir()]
    files = sum(path.is_file() for folder in trials for path in folder.rglob("*") if path.suffix != ".jsonl")
    rows = sum(len(path.read_text().splitlines()) for folder in trials for path in folder.rglob("*.jsonl"))
    return (files + rows) / len(trials)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 1000])
    parser.add_argument("--trials-per-slot", type=int, default=4)
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=["surrogate", "random"])
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--start-s", type=float, default=60.0)
    parser.add_argument("--like", type=Path)
    asked = parser.parse_args()
    each = written_by_workers(asked.like) if asked.like else None
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for slots, sampler in itertools.product(asked.slots, asked.samplers):
        num = slots * asked.trials_per_slot
        with tempfile.TemporaryDirectory() as path:
            found = simulate(slots, num, sampler, asked.evaluations, asked.start_s, Path(path))
        spent = found.driver.spent_s
        last = ", ".join(f"{np.mean(spent[name][-100:]):.3f}" for name in ("suggest", "report", "end"))
        own = sum(found.requests.values()) / found.num_ended
        rate = "" if each is None else f"{(own + each) * found.num_ended / found.makespan_s:.1f}"
        busy = sum(map(sum, spent.values())) / found.makespan_s
        cells = [str(slots), str(num), sampler, f"{found.makespan_s / 3600:.2f}"]
        cells += [f"{found.busy_s / found.makespan_s / slots:.1%}", f"{busy:.1%}", last]
        cells += [f"{found.driver.longest_wait_s:.1f}", f"{own:.0f}", rate]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
