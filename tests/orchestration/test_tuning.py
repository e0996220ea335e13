from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rltune.orchestration.job_spec import JobSpec
from rltune.orchestration.tuning import Recorder


@dataclass
class TuneTrial:
    """What ``Recorder`` reads of Ray Tune's trial."""

    config: dict[str, JobSpec]
    error_file: str | None
    copied: str | None = None
    trial_id: str = "a"
    last_result: None = None

    def get_error(self) -> str | None:
        return self.copied


def spec_of(run: Path) -> JobSpec:
    return JobSpec("001", str(run), {}, num_gpus_per_worker=0, work_dir=".", is_loopback=True)


@pytest.mark.parametrize(
    ("written", "copied", "error"),
    [
        ("Failure # 1\nTraceback ..\nValueError: no such name: été\n\n", None, "ValueError: no such name: été"),
        (None, "Failure # 1\nOSError: gone", "OSError: gone"),
        (None, None, "the trial died without a word; see /tmp/x/logs"),
    ],
)
def test_a_trial_that_died_is_told_of_by_the_last_error_there_is(
    tmp_path: Path, written: str | None, copied: str | None, error: str
) -> None:
    if written is not None:
        (tmp_path / "error.txt").write_text(written)
    ends: list[str] = []
    trial = TuneTrial({"spec": spec_of(tmp_path)}, str(tmp_path / "error.txt"), copied)
    Recorder(lambda spec, last, error, duration_s: ends.append(error), logs="/tmp/x/logs").on_trial_error(
        1, [trial], trial
    )
    assert ends == [error]


def test_ray_calls_a_trial_by_its_run_and_in_letters_that_it_takes(tmp_path: Path) -> None:
    names = [spec_of(tmp_path / name).train_name for name in ("mix", "été", "é", "a b", "v1.2_x-3")]
    assert names == ["mix-001", "t-001", "run-001", "a-b-001", "v1.2_x-3-001"]


def test_on_object_storage_the_name_hangs_on_no_copy(tmp_path: Path) -> None:
    assert replace(spec_of(tmp_path / "mix"), uri="s3://bucket/mix", begun="now").train_name == "trial-001"


@pytest.mark.parametrize("name", ["trial-001", "mix-001"])
def test_a_trial_keeps_what_its_checkpoints_are_called_by_where_its_run_is_renamed(tmp_path: Path, name: str) -> None:
    """Runs of before are called by the first."""
    spec = spec_of(tmp_path / "other")
    (spec.folder.checkpoints_dir("001") / name).mkdir(parents=True)
    assert spec.train_name == name
