"""A few-step model's experiment swept through Ray, to exported LoRAs; family_sweeps.py of the benchmarks runs all."""

from pathlib import Path

import pytest

from rltune.runs.results import read_results
from tests.benchmarks.family_sweeps import sweep

pytestmark = [pytest.mark.ray, pytest.mark.long]


def test_an_experiment_of_another_family_is_swept_and_exported(tmp_path: Path) -> None:
    code, output = sweep("sana_sprint", tmp_path)
    assert code == 0, output
    run = tmp_path / "runs" / "sana_sprint"
    assert [result.state for result in read_results(run / "results.jsonl")] == ["ok"] * 3
    assert list((run / "exports").glob("*/*.safetensors"))
