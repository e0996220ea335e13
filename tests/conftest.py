"""How tests are shared out among processes, and the small pipeline that many of them use.

Imports nothing heavy: the process that shares the tests out reads this file too.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it: tests run side by side, a core each
# or Ray's workers would give way to all other processes, such as the tests that run beside theirs
os.environ.setdefault("RAY_worker_niceness", "0")

import hypothesis
import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

    from rltune.config.experiment import RunConfig

# what the wall clock says of a test that runs beside others is no fault of it
hypothesis.settings.register_profile("rltune", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("rltune")

MAX_WORKERS = 4
"""Of pytest: each loads torch and Ray anew, some ten seconds of CPU, and grows to 2 GB."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the suite or a folder on every core, and what is named by its file in this process."""
    names_files = all(".py" in str(argument) for argument in config.args)
    return 0 if names_files else min(MAX_WORKERS, len(os.sched_getaffinity(0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadFileScheduling":
    """A file stays in one process, so that what its fixtures load is loaded once; two clusters never run at once."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "ray" if "/test_ray_" in file else file

    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is not asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is long is slow; where tests run side by side, start with the files that take longest."""
    ranks: dict[Path, int] = {}
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")
        rank = 0 if item.get_closest_marker("ray") else 1 if item.get_closest_marker("slow") else 2
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
        if rank == 0 and not item.path.name.startswith("test_ray_"):
            raise pytest.UsageError(f"{item.nodeid}: starts a Ray cluster; its file must be named test_ray_*.py")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: ranks[item.path])


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder as SD 1.5's: PNDM scheduler, epsilon prediction."""
    from diffusers import PNDMScheduler

    from tests.tiny import SD15_SCHEDULE, make_pipeline

    return make_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline", PNDMScheduler(**SD15_SCHEDULE))


@pytest.fixture(scope="session")
def deep_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_pipeline``, with blocks of every kind: half as quick."""
    from diffusers import PNDMScheduler

    from tests.tiny import SD15_SCHEDULE, make_pipeline

    folder = tmp_path_factory.mktemp("deep") / "pipeline"
    return make_pipeline(folder, PNDMScheduler(**SD15_SCHEDULE), is_deep=True)


@pytest.fixture(scope="session")
def tiny_v_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder as the built-in model's: DDIM, v-prediction."""
    from diffusers import DDIMScheduler

    from tests.tiny import SD15_SCHEDULE, make_pipeline

    scheduler = DDIMScheduler(**{**SD15_SCHEDULE, "clip_sample": False, "prediction_type": "v_prediction"})
    return make_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline", scheduler)


@pytest.fixture(scope="session")
def make_config(tiny_pipeline: Path) -> "Callable[..., RunConfig]":
    """Build a run on the tiny pipeline with weight-free rewards; keyword sections are merged over it."""
    from rltune.config.experiment import RunConfig
    from tests.tiny import EVAL_PROMPTS, TRAIN_PROMPTS

    def build(**sections: Any) -> RunConfig:
        raw: dict[str, Any] = {
            "name": "tiny",
            "model": {"base": str(tiny_pipeline), "lora": {"rank": 2}},
            "prompts": {"train": TRAIN_PROMPTS, "eval": EVAL_PROMPTS},
            "sampler": {"steps": 4, "guidance": 2.0, "eta": 0.0},
            "estimator": {"name": "alignprop", "k": 2, "draw": "uniform"},
            "rewards": {"brightness": {"weight": 0.75}, "smoothness": {"weight": 0.25}},
            "optim": {"lr": 1e-2, "steps": 4, "batch": 4},
            "evaluate": {"every": 2, "prompts": 3, "images_per_prompt": 2},
        }
        for name, section in sections.items():
            raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) and name != "rewards" else section
        return RunConfig.model_validate(raw)

    return build


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """Address of an S3 server on loopback."""
    from tests.storage import s3_server

    with s3_server() as address:
        yield address


@pytest.fixture
def s3(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, and this process and its children find it."""
    from tests.storage import environment

    for name, value in environment(s3_address).items():
        monkeypatch.setenv(name, value)
    return s3_address
