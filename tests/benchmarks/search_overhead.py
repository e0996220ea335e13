"""Seconds that search, results and front take a trial, over a thousand simulated trials that train nothing.

What a sweep does between trials (rltune.orchestration.sweep), in a folder of its own: ask, write trial.json, tell,
append to results.jsonl, find and write the front, mirror the study. Means over the first and last trials.

    python tests/benchmarks/search_overhead.py
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from search_simulated import BASE, DEVIATION, MIX, measured

from rltune.config.load import load_experiment
from rltune.config.rules import Known
from rltune.runs.fronts import front_as_csv, front_as_dict
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.metrics import violations
from rltune.runs.objectives import Objectives, find_front
from rltune.runs.results import TrialResult, append_result
from rltune.runs.store import write_atomically
from rltune.search.searcher import SAMPLERS, Search
from rltune.search.stopping import Rules
from rltune.search.study import StudyFile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", choices=[name for name in SAMPLERS if name != "grid"], default="surrogate")
    parser.add_argument("--trials", type=int, default=1000)
    options = parser.parse_args()
    overrides = [f"search={{sampler: {options.sampler}, prune: true, trials: {options.trials}}}"]
    experiment = load_experiment(MIX, overrides, Known())
    objectives = Objectives(experiment.shared.objective_names)
    base = {f"eval/{name}": value for name, value in BASE.items()}
    base |= {f"gain/{name}": 0.0 for name in BASE} | {f"{k}/{name}_se": 0.0 for k in ("eval", "gain") for name in BASE}
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
        study = StudyFile(folder.study_file, folder.name, experiment)
        for _ in range(options.trials):
            with timed("ask"):
                spec = search.ask()
            with timed("write trial.json"):
                folder.write_trial(spec)
            metrics = {f"eval/{name}": float(value) for name, value in measured(spec.values, 1.0).items()}
            metrics |= {f"eval/{name}": metrics[f"eval/{name}"] + 0.01 * rng.standard_normal() for name in DEVIATION}
            metrics |= {f"gain/{name}": metrics[f"eval/{name}"] - BASE[name] for name in BASE}
            metrics |= {f"{kind}/{name}_se": 0.01 for kind in ("eval", "gain") for name in BASE}
            metrics |= {"step": float(experiment.shared.optim.steps)}
            with timed("rules"):
                rules.on_report(spec.id, metrics)
            with timed("read its trial.json"):
                folder.read_trial(spec.id)
            broken = violations(experiment.shared, metrics, base)
            results.append(TrialResult(spec.id, "ok", spec.values, spec.params, metrics=metrics, constraints=broken))
            with timed("append to results.jsonl"):
                append_result(folder.results_file, results[-1])
            with timed("tell"):
                search.tell(results[-1])
            with timed("find the front"):
                front = find_front(results, objectives, DEVIATION)
            assert front is not None
            with timed("write the front"):
                write_atomically(folder.path / "front.json", json.dumps(front_as_dict(front), indent=2))
                write_atomically(folder.path / "front.csv", front_as_csv(front))
            with timed("update study.db"):
                study.update(results)
    num = min(100, options.trials)
    print(f"| part | first {num} trials, s each | last {num} trials, s each |\n|---|---|---|")
    total = np.array([list(times) for times in seconds.values()]).sum(axis=0)
    for part, times in [*seconds.items(), ("all", total)]:
        print(f"| {part} | {np.mean(times[:num]):.4f} | {np.mean(times[-num:]):.4f} |")


if __name__ == "__main__":
    main()
