"""Seconds that one refresh of the live table takes on a run of many trials: the first reading, and one later.

    python tests/benchmarks/status_refresh.py --trials 1000 --steps 60

Run it from the repository's root. The run is made up: every trial but four has ended.
"""

import argparse
import io
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from rich.console import Console

from rltune.cli.live import LiveView
from rltune.runs.events import append_event
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.status import StatusReader, read_status
from tests.run_folders import SEARCHED, VALUES, experiment, result, write_rows, write_run

NUM_RUNNING = 4


def make_run(path: Path, num_trials: int, num_steps: int) -> RunFolder:
    draw = random.Random(0)
    ids = [f"{number:03d}" for number in range(1, num_trials + 1)]
    ended = [result(trial, draw.random(), draw.random(), duration_s=60.0) for trial in ids[:-NUM_RUNNING]]
    folder = write_run(path, experiment(), [result(BASE_TRIAL, 0.5), *ended], started=ids[-NUM_RUNNING:])
    extra = {f"train/figure_{number}": 0.123456789 for number in range(25)}
    for trial in ids:
        rows: list[dict[str, Any]] = [{"step": step, **extra} for step in range(1, num_steps + 1)]
        rows[-1] |= ended[0].metrics
        write_rows(folder, trial, rows)
        for event in ("suggested", "worker_started", "loaded", "first_step"):
            append_event(folder.trial_events_file(trial), event)
        if trial not in ids[-NUM_RUNNING:]:
            append_event(folder.trial_events_file(trial), "ended")
    append_event(folder.events_file, "driver_started", trials_at_once=NUM_RUNNING, workers=1, last_sign=0.0)
    return folder


def timed(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    asked = experiment({**SEARCHED, "search": {"trials": options.trials, "sampler": "random"}})
    with tempfile.TemporaryDirectory() as place:
        folder = make_run(Path(place) / "mix", options.trials, options.steps)
        with folder.lock():
            once = timed(lambda: read_status(folder, asked), 3)
            reader = StatusReader(folder, asked)
            reader.read()
            nothing_new = timed(reader.read, 10)
            console = Console(file=io.StringIO(), width=100, height=24, force_terminal=True)
            status = reader.read()
            drawing = timed(lambda: console.print(LiveView(status, asked.shared.objective_names)), 10)
            folder.write_trial(TrialSpec(f"{options.trials:03d}", VALUES, {}))
            running = f"{options.trials:03d}"

            def advance() -> None:
                append_event(folder.trial_events_file(running), "reported")
                reader.read()

            one_more = timed(advance, 10)
    print(f"{options.trials} trials of {options.steps} steps, seconds, median:")
    print(f"  a first reading, or `rltune status`   {once:.3f}")
    print(f"  again, one running trial has advanced {one_more:.3f}")
    print(f"  again, nothing has changed            {nothing_new:.3f}")
    print(f"  drawing 24 lines                      {drawing:.3f}")


if __name__ == "__main__":
    main()
