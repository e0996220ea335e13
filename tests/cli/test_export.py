"""``rltune export`` as a user meets it; that what it writes is right is the export room's to show."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rltune.export import trials
from rltune.export.write import Exported
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.results import TrialResult
from tests.cli.conftest import Call
from tests.run_folders import experiment, result, write_run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path / "mix", experiment(), [result(BASE_TRIAL, 0.5), result("001", 0.9, 0.1)])


def test_every_format_that_is_named_is_written_and_told_of(
    call: Call, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(picks: Sequence[TrialResult], folder: RunFolder, *_: Any, on_export: Any, formats: Any) -> None:
        for pick in picks:
            for name in formats or ("diffusers",):
                how = {"diffusers": "pipeline.load('x')", "peft": "import peft\npeft.load('x')"}[name]
                on_export(Exported(pick.trial, folder.exports_dir, 1e-6, 0.2, {"bfloat16": 0.03}, name, how))

    monkeypatch.setattr(trials, "export_trials", export)
    code, out, err = call("export", folder.path)
    assert (code, err) == (0, "")
    proof = "reloaded and compared in float32: images agree to 1e-06; bfloat16 changes them by 0.03"
    diffusers = f"{proof}\n\n  pipeline.load('x')   # at weight 1.0\n"
    peft = f"{proof}\n\n  import peft\n  peft.load('x')   # at weight 1.0\n"
    assert out == f"trial 001, diffusers -> {folder.exports_dir}\n{diffusers}"
    code, out, err = call("export", folder.path, "--format", "peft", "--format", "diffusers", "--pick", "001")
    assert (code, err) == (0, "")
    where = f"-> {folder.exports_dir}"
    assert out == f"trial 001, peft {where}\n{peft}trial 001, diffusers {where}\n{diffusers}"


WRONG_PICK = """
import sys
from rltune.cli.main import main
sys.argv = ["rltune", "export", sys.argv[1], "--pick", "007"]
try:
    main()
except SystemExit as end:
    print("exit", end.code, sorted({"torch", "ray", "diffusers", "peft", "optuna"} & set(sys.modules)))
"""


@pytest.mark.long
def test_a_pick_that_is_not_there_is_said_at_once(folder: RunFolder) -> None:
    command = [sys.executable, "-c", WRONG_PICK, str(folder.path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.stderr.startswith("error --pick: '007' is not a choice")
    assert finished.stdout == "exit 2 []\n"


def test_an_unknown_format_is_one_message_that_lists_the_known_ones(call: Call, folder: RunFolder) -> None:
    code, out, err = call("export", folder.path, "--format", "diffuser")
    assert (code, out) == (2, "")
    known = "did you mean 'diffusers'? known: comfyui, diffusers, fused, peft"
    assert err == f"error export format 'diffuser' is unknown; {known}\n"
    assert not folder.exports_dir.exists()


def test_only_what_is_a_lora_is_pushed_from_a_run_of_several_kinds(call: Call, tmp_path: Path) -> None:
    asked = experiment(model={"lora": {}, "adapter": {"kind": {"choice": ["lora", "prompt"]}}}, optim={"lr": 1e-3})
    row = result("002", 0.9, 0.1)
    values = {name: value for name, value in row.values.items() if name in asked.space}
    words = replace(row, values=values | {"model.adapter.kind": "prompt"})
    folder = write_run(tmp_path / "mix", asked, [result(BASE_TRIAL, 0.5), words])
    code, _, err = call("export", folder.path, "--push", "me/mine")
    assert code == 2
    assert "--push: the hub's pages are for LoRAs, which prompt is not, got 'me/mine'" in " ".join(err.split())
