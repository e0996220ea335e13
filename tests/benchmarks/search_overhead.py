"""Seconds that search, results and front take a trial, over a thousand simulated trials that train nothing.

What a sweep does between trials (rltune.orchestration.sweep), in a folder of its own: ask, write trial.json, tell,
append to results.jsonl, read every trial.json again, find the front. Means over the first and last trials.

    python tests/benchmarks/search_overhead.py
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from search_simulated import BASE, DEVIATION, MIX, measured

from rltune.config.clashes import Known
from rltune.config.load import load_experiment
from rltune.orchestration.objectives import Objectives, find_front, violations
from rltune.orchestration.results import TrialResult, append_result
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder
from rltune.orchestration.search import SAMPLERS, Search
from rltune.orchestration.stopping import Rules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", choices=[name for name in SAMPLERS if name != "grid"], default="tpe")
    parser.add_argument("--trials", type=int, default=1000)
    options = parser.parse_args()
    overrides = [f"search={{sampler: {options.sampler}, prune: true, trials: {options.trials}}}"]
    experiment = load_experiment(MIX, overrides, Known())
    objectives = Objectives(experiment.shared.objective_names)
    base = {f"eval/{name}": value for name, value in BASE.items()}
    rules = Rules(experiment.shared, objectives, base, DEVIATION)
    search = Search(experiment, objectives)
    results = [TrialResult(BASE_TRIAL, "ok", {}, {}, metrics=base)]
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        start = time.process_time()  # of this process: a busy machine does not change it
        yield
        seconds[part].append(time.process_time() - start)

    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path) / "run")
        folder.path.mkdir()
        append_result(folder.results_file, results[0])
        for _ in range(options.trials):
            with timed("ask"):
                spec = search.ask()
            with timed("write trial.json"):
                folder.write_trial(spec)
            metrics = {f"eval/{name}": float(value) for name, value in measured(spec.values, 1.0).items()}
            metrics |= {f"eval/{name}": metrics[f"eval/{name}"] + 0.01 * rng.standard_normal() for name in DEVIATION}
            metrics |= {"step": float(experiment.shared.optim.steps)}
            with timed("rules"):
                rules.on_report(spec.id, metrics)
            with timed("read every trial.json"):
                folder.read_trials()
            broken = violations(experiment.shared, metrics, base)
            results.append(TrialResult(spec.id, "ok", spec.values, spec.params, metrics=metrics, constraints=broken))
            with timed("append to results.jsonl"):
                append_result(folder.results_file, results[-1])
            with timed("tell"):
                search.tell(results[-1])
            with timed("find the front"):
                find_front(results, objectives, DEVIATION)
    num = min(100, options.trials)
    print(f"| part | first {num} trials, s each | last {num} trials, s each |\n|---|---|---|")
    total = np.array([list(times) for times in seconds.values()]).sum(axis=0)
    for part, times in [*seconds.items(), ("all", total)]:
        print(f"| {part} | {np.mean(times[:num]):.4f} | {np.mean(times[-num:]):.4f} |")


if __name__ == "__main__":
    main()
