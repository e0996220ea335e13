"""What a trial asks Ray Train for."""

from pathlib import Path
from typing import Any

import pytest

from rltune.orchestration.job import make_trainer
from rltune.orchestration.job_spec import JobSpec
from tests.run_folders import experiment


def spec(folder: Path, num_gpus: float, **resources: Any) -> JobSpec:
    config = experiment({"rewards": {"brightness": {}}}, resources=resources).shared
    return JobSpec(
        trial="001",
        run_dir=str(folder),
        config=config.model_dump(mode="json"),
        num_gpus_per_worker=num_gpus,
        work_dir=str(folder),
        is_loopback=False,
    )


@pytest.mark.parametrize(
    ("num_gpus", "resources", "num_workers", "per_worker"),
    [
        (0, {}, 1, {"CPU": 1}),
        (1, {"workers": 4}, 4, {"CPU": 1, "GPU": 1}),
        (0.5, {"cpus_per_worker": 3}, 1, {"CPU": 3, "GPU": 0.5}),
        (0, {"workers": 4, "min_workers": 2}, (2, 4), {"CPU": 1}),
        (
            1,
            {"accelerator": "H100", "cpus_per_worker": 2},
            1,
            {"CPU": 2, "GPU": 1, "accelerator_type:H100": 0.001},
        ),
    ],
)
def test_workers_and_what_each_takes_reach_ray(
    tmp_path: Path,
    num_gpus: float,
    resources: dict[str, Any],
    num_workers: int | tuple[int, int],
    per_worker: dict[str, float],
) -> None:
    trainer = make_trainer(spec(tmp_path, num_gpus, **resources))
    scaling = trainer.scaling_config
    assert scaling.num_workers == num_workers
    assert scaling.use_gpu == (num_gpus > 0)
    assert scaling._resources_per_worker_not_none == per_worker
