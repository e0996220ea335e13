"""What a second worker brings, and how long it takes from the command to the first step.

One trial of the built-in model with one worker and with two (the same batch, shared out), a sweep of trials of one
worker with one and with two at a time, and the seconds until a run's first step: on a Ray of its own and on one that
runs, each twice. Needs as many free cores as workers, and nothing else that runs; times are of the wall clock.

    python tests/benchmarks/scaling.py --work FOLDER
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rltune.runs.events import read_events
from rltune.runs.rows import read_metrics

WARM_UP = 4
"""First steps that do not count."""
STEPS = 24
EXPERIMENT: dict[str, Any] = {
    "model": {"base": "builtin", "lora": {"rank": 4}},
    "prompts": {"train": "builtin", "eval": "builtin-heldout"},
    "sampler": {"steps": 12, "guidance": 3.0},
    "estimator": {"k": 6, "draw": "fixed", "checkpoint": "never"},
    "rewards": {"aesthetic": {"weight": 1.0}},
    "optim": {"lr": 0.001, "steps": STEPS, "batch": 8},
    "evaluate": {"every": STEPS, "prompts": 8, "images_per_prompt": 1, "confirm": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs; those of before are taken away")
    parser.add_argument("--trials", type=int, default=6, help="of the sweep")
    parser.add_argument("--repeats", type=int, default=2, help="runs of the single trial with each number of workers")
    parser.add_argument("--only", choices=["trial", "sweep", "start"], nargs="*", default=["trial", "sweep", "start"])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if "start" in options.only:
        print_starts(options.work)
    if "trial" in options.only:
        print_trial(options.work, options.repeats)
    if "sweep" in options.only:
        print_sweep(options.work, options.trials)


def print_trial(work: Path, repeats: int) -> None:
    """Print the median seconds of a step by workers; the least of the repeats."""
    seconds = {}
    for workers in (1, 2):
        medians = []
        for repeat in range(repeats):
            run, _ = trained(work, f"trial-{workers}-{repeat}", {"resources": {"workers": workers}})
            rows = read_metrics(run / "trials" / "001" / "metrics.jsonl")
            medians.append(statistics.median(row["step_s"] for row in rows[WARM_UP:]))
        seconds[workers] = min(medians)
    print(f"one trial, batch 8: {seconds[1]:.2f} s a step with one worker, {seconds[2]:.2f} s with two: ", end="")
    print(f"{seconds[1] / seconds[2]:.2f} times as fast", flush=True)


def print_sweep(work: Path, num_trials: int) -> None:
    """Print trials an hour by trials at a time, from the first trial's first step to the last one's end."""
    rates = {}
    for concurrent in (1, 2):
        choices = [round(1e-4 * (i + 1), 4) for i in range(num_trials)]
        sections = {
            "optim": {**EXPERIMENT["optim"], "lr": {"choice": choices}},
            "search": {"sampler": "grid", "trials": num_trials},
            "resources": {"concurrent": concurrent, "executor": "warm"},
        }
        run, _ = trained(work, f"sweep-{concurrent}", sections, command="sweep")
        events = [read_events(run / "trials" / f"{i + 1:03}" / "events.jsonl") for i in range(num_trials)]
        start = min(event.time for trial in events for event in trial if event.event == "first_step")
        end = max(event.time for trial in events for event in trial if event.event == "ended")
        rates[concurrent] = 3600 * num_trials / (end - start)
    print(
        f"a sweep of {num_trials}: {rates[1]:.0f} trials an hour one at a time, {rates[2]:.0f} two at a time: ", end=""
    )
    print(f"{rates[2] / rates[1]:.2f} times as many", flush=True)


def print_starts(work: Path) -> None:
    """Print the seconds from the command to the first step of a trial; the base model is measured before it."""
    for name in ("a Ray of its own", "the same again"):
        print(f"{name}: {started(work, 'local'):.1f} s to the first step", flush=True)
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    subprocess.run([*ray, "start", "--head", "--num-cpus=2"], check=True, stdout=subprocess.DEVNULL)
    try:
        for name in ("attached", "the same again"):
            print(f"{name}: {started(work, 'auto'):.1f} s to the first step", flush=True)
    finally:
        subprocess.run([*ray, "stop", "--force"], check=True, stdout=subprocess.DEVNULL)


def started(work: Path, address: str) -> float:
    run, start = trained(work, f"start-{address}", {"optim": {**EXPERIMENT["optim"], "steps": 2}}, "--address", address)
    trial = read_events(run / "trials" / "001" / "events.jsonl")
    return next(event.time for event in trial if event.event == "first_step") - start


def trained(
    work: Path, name: str, sections: dict[str, Any], *arguments: str, command: str = "train"
) -> tuple[Path, float]:
    """Run an experiment anew in processes of its own, and return its folder and when the command was given."""
    path, run = work / f"{name}.yaml", work / "runs" / name
    path.write_text(json.dumps({"name": name, **EXPERIMENT, **sections}))  # JSON is YAML
    shutil.rmtree(run, ignore_errors=True)
    start = time.time()
    with (work / f"{name}.log").open("w") as log:
        words = [sys.executable, "-m", "rltune", command, str(path), "--storage", str(work / "runs"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(words, check=True, stdout=log, stderr=log, env=environment)
    return run, start


if __name__ == "__main__":
    main()
