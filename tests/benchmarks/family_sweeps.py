"""A sweep of every experiment in ``experiments/models`` through Ray, on the tiny pipeline of its model's class.

    python tests/benchmarks/family_sweeps.py [FILE ...] [--set model.quantise=nf4 ...]

Each is two trials of two rounds at 32 px: its base model measured, its front confirmed, its best LoRAs exported and
loaded again. Says for each how long it took and what it exported; exits with 1 where one failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.model_experiments import FOLDER, MODELS, quick  # noqa: E402
from tests.tiny_families import made  # noqa: E402


def sweep(name: str, folder: Path, overrides: Sequence[str] = ()) -> tuple[int, str]:
    """Run a file's sweep in ``folder``, with settings of one's own -> exit code and all that was printed."""
    made(MODELS[name]).save_pretrained(folder / "model")
    settings = [
        part for text in (f"model.base={folder / 'model'}", *quick(name), *overrides) for part in ("--set", text)
    ]
    command = [sys.executable, "-m", "rltune", "sweep", str(FOLDER / f"{name}.yaml"), "--storage", str(folder / "runs")]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, *settings], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    given = parser.parse_args()
    failed = []
    for name in given.names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            code, output = sweep(name, Path(folder), given.set)
            seconds = time.perf_counter() - start
            run = Path(folder) / "runs" / name
            results = (run / "results.jsonl").read_text() if (run / "results.jsonl").is_file() else ""
            exports = sorted(path.name for path in (run / "exports").glob("*"))
        states = " ".join(trial["state"] for trial in map(json.loads, results.splitlines()))
        print(f"{name:18s} exit {code}, {seconds:4.0f} s, trials {states}, exported {' '.join(exports)}", flush=True)
        if code or not exports:
            failed.append(name)
            print(output[-3000:], flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
