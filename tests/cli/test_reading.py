"""Commands that only read a run folder load neither ray nor torch, and so answer at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rltune.runs.copies import Copy
from rltune.runs.objects import open_store
from tests.cli.conftest import Call
from tests.run_folders import experiment, result, write_run
from tests.storage import BUCKET

ODD = "a <b>\"c' [red] & $HOME %s \N{FIRE}"
"""A name that a page, a shell, a format or rich's markup would take for something else."""
CODE = """
import sys
from rltune.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"ray", "torch", "optuna", "diffusers", "transformers", "peft", "accelerate", "matplotlib"}
print("loaded:", sorted(heavy & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "command", [("front",), ("status",), ("status", "--usage"), ("compare", "other"), ("report",)], ids=" ".join
)
def test_neither_ray_nor_torch_is_loaded(tmp_path: Path, command: tuple[str, ...]) -> None:
    rows = [result("000", 0.5, 0.0), result("001", 0.8, 0.1)]
    folder = write_run(tmp_path / ODD, experiment(), results=rows)
    folder.events_file.write_text(
        '{"time": 0, "event": "driver_started", "trials_at_once": 1, "workers": 1}\n'
        '{"time": 9, "event": "driver_ended"}\n'
    )
    if "other" in command:
        write_run(tmp_path / "other", experiment(seed=1), results=rows)
    name, *flags = command
    call = [sys.executable, "-c", CODE, name, str(folder.path), *flags]
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=wide)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded: []\n")
    assert len(done.stdout.splitlines()) > 1
    if name in ("compare", "report"):
        assert ODD in done.stdout


@pytest.mark.slow
def test_a_run_in_a_bucket_reads_as_one_in_a_folder(
    call: Call, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "mix", experiment(), results=[result("000", 0.5, 0.0), result("001", 0.8, 0.1)])
    folder.events_file.write_text('{"time": 0, "event": "driver_started", "trials_at_once": 1, "workers": 1}\n')
    uri = f"s3://{BUCKET}/reading/mix"
    Copy(open_store(uri), folder.path).publish("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for words in (("status",), ("status", "--usage"), ("front",), ("front", "--json"), ("front", "--csv")):
        name, *flags = words
        assert call(name, uri, *flags) == call(name, folder.path, *flags), words
    code, out, err = call("report", uri)
    assert (code, err) == (0, "")
    page = Path(out.replace("\n", ""))
    assert page.is_relative_to(tmp_path / "cache")
    assert page.is_file()
    for command in ("status", "front", "report"):
        code, out, err = call(command, f"{uri}-gone")
        assert (code, out) == (2, "")
        assert f"{uri}-gone: not a run folder, it has no experiment.yaml" in err
