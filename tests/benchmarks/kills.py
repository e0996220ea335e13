"""Kill a sweep at random moments, again and again, and compare what it ends with to trials that ran without a break.

Victims are the driver (SIGKILL, SIGTERM, SIGINT), workers, and the processes that Tune and Train run a trial with. The
same command is started again after every death of the driver. At the end: no finished trial lost or doubled, no more
than one checkpoint interval of a trial trained twice, metrics.jsonl whole, every trial's metrics equal, to the last
bit, to those of the same knobs and seed trained in one process.

    python tests/benchmarks/kills.py --work FOLDER --kills 20
    python tests/benchmarks/kills.py --work FOLDER --kills 20 --steps 2000 --executor warm
"""

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from diffusers import PNDMScheduler

from rltune.config.load import load_experiment
from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from rltune.training.loop import train_run
from rltune.training.quiet import quiet_libraries
from rltune.training.reporter import FolderReporter
from tests.orchestration.processes import MAIN, descendants
from tests.tiny import SD15_SCHEDULE, make_pipeline

EVERY = 10
"""Steps between evaluations, and so between checkpoints."""
WORKERS = ("ray::RayTrainWorker", "ray::WarmWorker")
TRIAL_PROCESSES = ("ray::TrainController", "ray::ImplicitFunc", "ray::WarmTrial", "ray::drive")


def write_experiment(work: Path, executor: str, num_trials: int, num_steps: int) -> Path:
    pipeline = work / "pipeline"
    if not pipeline.is_dir():
        make_pipeline(pipeline, PNDMScheduler(**SD15_SCHEDULE))
    rates = [round(0.001 * (i + 1), 3) for i in range(num_trials)]
    raw: dict[str, Any] = {
        "name": f"kills-{executor}",
        "model": {"base": str(pipeline), "lora": {"rank": 2, "alpha": 4}},
        "prompts": {"train": ["a cat", "a dog", "two red birds"], "eval": ["a snail", "an octopus"]},
        "sampler": {"steps": 4, "guidance": 2.0},
        "estimator": {"k": 3, "draw": "uniform"},
        "rewards": {"brightness": {"weight": 0.5}, "smoothness": {"weight": 0.5}},
        "optim": {"lr": {"choice": rates}, "steps": num_steps, "batch": 4},
        "evaluate": {"every": EVERY, "prompts": 2, "images_per_prompt": 2, "confirm": 0},
        "search": {"sampler": "grid", "trials": num_trials},
        "resources": {"executor": executor},
    }
    path = work / f"kills-{executor}.yaml"
    path.write_text(json.dumps(raw))
    return path


class Steps(threading.Thread):
    """Watches how far every trial is, and notes each time that one goes back."""

    def __init__(self, run: Path) -> None:
        super().__init__(daemon=True)
        self._run = run
        self.reached: dict[str, int] = {}
        self.repeated: list[int] = []

    def run(self) -> None:
        while True:
            for file in self._run.glob("trials/*/metrics.jsonl"):
                rows = read_metrics(file)
                step = int(rows[-1]["step"]) if rows else 0
                before = self.reached.get(file.parent.name, 0)
                if step < before:
                    self.repeated.append(before - step)
                self.reached[file.parent.name] = step
            time.sleep(0.2)


def find(process: subprocess.Popen[str], names: tuple[str, ...]) -> list[int]:
    found = []
    for pid in descendants(process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith(names):
            found.append(pid)
    return found


def wait_for_orphans(pids: set[int]) -> None:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--steps", type=int, default=400, help="of a trial; enough for all kills to find one running")
    parser.add_argument("--executor", choices=("train", "warm"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wait", type=float, nargs=2, default=(5.0, 40.0), help="seconds between kills, from and to")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    path = write_experiment(options.work, options.executor, options.trials, options.steps)
    run = options.work / f"kills-{options.executor}"
    rng = random.Random(options.seed)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", MAIN, "sweep", str(path), "--storage", str(options.work)]
    log = (options.work / f"kills-{options.executor}.log").open("a")
    steps = Steps(run)
    steps.start()
    victims: Counter[str] = Counter()
    starts = 0
    while True:
        # a shell's background job ignores Ctrl-C, and so would everything that is started from one
        hears = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, text=True, preexec_fn=hears)
        starts += 1
        while process.poll() is None:
            if sum(victims.values()) >= options.kills:
                process.wait()
                break
            try:
                process.wait(rng.uniform(*options.wait))
                break
            except subprocess.TimeoutExpired:
                pass
            if not find(process, WORKERS):  # nobody trains yet: a kill now would prove little
                continue
            kind = rng.choice(["driver", "terminated", "interrupted", "worker", "worker", "trial process"])
            if kind in ("worker", "trial process"):
                pids = find(process, WORKERS if kind == "worker" else TRIAL_PROCESSES)
                if pids:
                    os.kill(rng.choice(pids), signal.SIGKILL)
                    victims[kind] += 1
                continue
            orphans = descendants(process.pid)
            process.send_signal({"driver": 9, "terminated": 15, "interrupted": 2}[kind])
            process.wait()
            victims[kind] += 1
            wait_for_orphans(orphans)
            break
        print(
            f"started {starts} times, {sum(victims.values())} kills {dict(victims)}, exit {process.returncode}",
            flush=True,
        )
        if process.returncode == 0:
            break
        # -15 and -6: SIGTERM before rltune, or while Ray, could take it; nothing has begun then
        if process.returncode not in (-9, -15, -6, 130):
            sys.exit(f"unexpected exit code {process.returncode}; see {log.name}")
    check(path, run, options.trials, options.steps, steps)


def check(path: Path, run: Path, num_trials: int, num_steps: int, steps: Steps) -> None:
    quiet_libraries()
    experiment = load_experiment(path)
    results = [result for result in read_results(run / "results.jsonl") if result.trial != "000"]
    assert sorted(result.trial for result in results) == [f"{i + 1:03d}" for i in range(num_trials)], results
    assert len({json.dumps(result.values, sort_keys=True) for result in results}) == num_trials
    for result in results:
        assert result.state == "ok", result
        rows = read_metrics(run / "trials" / result.trial / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, num_steps + 1)), result.trial
        root = path.parent / "whole" / f"{path.stem}-{result.trial}"
        reporter = FolderReporter(root / "checkpoints")
        config = experiment.concrete(result.values)
        train_run(config, trial_dir=root / "trial", base_dir=path.parent / "whole" / "base", reporter=reporter)
        last = reporter.reports[-1]
        assert dict(result.metrics) == {name: last[name] for name in result.metrics}, result.trial
    most = max(steps.repeated, default=0)
    print(
        f"{num_trials} trials, each once and equal to one never broken; steps trained twice: {sorted(steps.repeated)}"
    )
    assert most <= EVERY, f"{most} steps of a trial were trained twice, more than the {EVERY} between checkpoints"


if __name__ == "__main__":
    main()
