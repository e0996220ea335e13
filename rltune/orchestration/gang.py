"""The ``warm`` executor: workers that keep base model and rewards loaded and take trial after trial.

A ``WarmTrial`` is one slot of the sweep: a Ray Tune trainable with a gang of data-parallel workers beside it. Tune
hands it one trial after another (``reuse_actors``). Each worker runs ``training``'s loop in a thread; a report stops
all of them until Tune has decided whether the trial goes on, so that a stopped trial does no step too many.
"""

import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import PlacementGroupFactory
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rltune.orchestration.interfaces import choose_interface
from rltune.orchestration.job import backend_of, publish_report, run_trial, worker_resources
from rltune.orchestration.job_spec import STORAGE_ERROR, JobSpec
from rltune.orchestration.loopback import meeting_file
from rltune.orchestration.nodes import ACCELERATOR_PREFIX, WorkerNeed
from rltune.orchestration.ray_private import join_process_group
from rltune.orchestration.tuning import SPEC
from rltune.orchestration.workload import Workload

GROUP_TIMEOUT_S = 1800


class Abandoned(BaseException):
    """Thrown into a trial's loop where it reports, once nobody wants its end; not an error, so nothing catches it."""


class _Gate:
    """Where a worker's loop and the trainable meet: a report goes out, and the loop waits to be let go on."""

    def __init__(self) -> None:
        self._reports: queue.Queue[Mapping[str, Any] | BaseException | None] = queue.Queue()
        self._answers: queue.Queue[bool] = queue.Queue()
        self._is_waiting = False

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Called by the loop: hand over a report and wait."""
        self._reports.put(dict(metrics))
        if not self._answers.get():
            raise Abandoned

    def end(self, error: BaseException | None) -> None:
        """Called by the loop's thread when it is over."""
        self._reports.put(error)

    def next(self) -> Mapping[str, Any] | None:
        """Let the loop go on, and return its next report; None when it is over. Raises what ended it."""
        if self._is_waiting:
            self._answers.put(True)
        found = self._reports.get()
        self._is_waiting = isinstance(found, dict)
        if isinstance(found, BaseException):
            raise found
        return found

    def abandon(self) -> None:
        """Have the loop end where it waits."""
        if self._is_waiting:
            self._answers.put(False)
            self._is_waiting = False


class _WarmReporter:
    """A loop's reporter: checkpoints go into the trial's folder, under names as Ray Train gives them."""

    def __init__(self, spec: JobSpec, gate: _Gate, *, is_main: bool) -> None:
        self._spec, self._gate, self._is_main = spec, gate, is_main
        self._stop_file = spec.folder.stop_file

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Keep the checkpoint, then wait for what Tune says to the metrics."""
        if self._is_main:
            publish_report(self._spec, checkpoint)
        self._gate.report(metrics)

    def is_stopping(self) -> bool:
        """Return whether the sweep is being stopped."""
        return self._stop_file.exists()

    def storage_error(self, text: str) -> None:
        """Hand over why nothing can go on."""
        self._gate.report({STORAGE_ERROR: text})


class WarmWorker:
    """One data-parallel worker; lives as long as its gang.

    Args:
        run: Name of the run.
        rank: Which of the gang's workers it is.
        size: How many the gang has.
    """

    def __init__(self, run: str, rank: int, size: int) -> None:
        from rltune.training.model_cache import ModelCache

        self._name, self._rank, self._size = f"{run}-worker-{rank}", rank, size
        self._cache = ModelCache()
        self._gate = _Gate()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        """Return what Ray's dashboard and logs call it."""
        return self._name

    def meet(self, backend: str, init_method: str) -> None:
        """Join the process group; alone, there is none to join."""
        if self._size == 1:
            return
        num_devices = len(ray.get_gpu_ids())
        # accelerate reads these; every worker sees its own devices only, so that its first one is number 0
        os.environ |= {
            "RANK": str(self._rank),
            "WORLD_SIZE": str(self._size),
            "LOCAL_RANK": "0" if num_devices else str(self._rank),
            "LOCAL_WORLD_SIZE": "1" if num_devices else str(self._size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
        choose_interface()
        join_process_group(
            backend=backend,
            world_rank=self._rank,
            world_size=self._size,
            init_method=init_method,
            timeout_s=GROUP_TIMEOUT_S,
        )

    def address(self) -> str:
        """Return where the gang can meet on this worker's node."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, spec: JobSpec) -> None:
        """Begin a trial; one that still waits is abandoned."""
        self.stop()
        self._gate = _Gate()
        self._thread = threading.Thread(target=self._run, args=(spec, self._gate), daemon=True)
        self._thread.start()

    def next(self) -> Mapping[str, Any] | None:
        """Return the next report, or None when the trial is over; raises what ended it."""
        return self._gate.next()

    def stop(self) -> None:
        """Abandon what still runs."""
        if self._thread is not None:
            self._gate.abandon()
            self._thread.join()
            self._thread = None

    def _run(self, spec: JobSpec, gate: _Gate) -> None:
        try:
            spec = spec.of_worker(self._rank)
            reporter = _WarmReporter(spec, gate, is_main=self._rank == 0)
            run_trial(spec, reporter, rank=self._rank, count=self._size, cache=self._cache)
        except Abandoned:
            gate.end(None)
        except BaseException as error:  # noqa: BLE001  # it is raised again where the trainable asks
            gate.end(error)
        else:
            gate.end(None)


class WarmTrial(tune.Trainable):  # type: ignore[misc]  # ray has no types
    """A slot of a sweep: the gang, and the trial that it runs now."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the gang.

        Its first trial begins with the first step: Tune may give that trial to a gang that has become free meanwhile,
        and throw this one away.
        """
        self._spec: JobSpec = config[SPEC]
        self._workers = _gang(self._spec)
        self._is_begun = False

    def __repr__(self) -> str:
        """Return what Ray's dashboard and logs call it: it goes on from trial to trial, so no trial's name."""
        return f"{self._spec.config['name']}-gang"

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Give the gang its next trial."""
        self._spec = new_config[SPEC]
        self._is_begun = False
        return True

    def step(self) -> dict[str, Any]:
        """Train up to the next report, which is the main worker's."""
        if not self._is_begun:
            ray.get([worker.start.remote(self._spec) for worker in self._workers])
            self._is_begun = True
        report = ray.get([worker.next.remote() for worker in self._workers])[0]
        if report is None:  # it ended without a report: failure.txt says why
            return {"done": True}
        is_over = any(report.get(key) for key in ("is_final", "is_preempted", STORAGE_ERROR))
        return {**report, "done": is_over}

    def cleanup(self) -> None:
        """End the gang."""
        for worker in self._workers:
            ray.kill(worker)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: the trial's own checkpoints are what it goes on from."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing."""


def warm_trainable(workload: Workload) -> Any:
    """Return what Tune runs for the ``warm`` executor: next to nothing for a slot itself, and a bundle a worker."""
    bundles = [{"CPU": 0, "memory": 2**20}] + [_bundle(workload.worker)] * workload.num_workers
    return tune.with_resources(WarmTrial, PlacementGroupFactory(bundles))


def _bundle(need: WorkerNeed) -> dict[str, float]:
    kind = {f"{ACCELERATOR_PREFIX}{need.accelerator}": 0.001} if need.accelerator else {}
    return worker_resources(need.num_gpus, num_cpus=need.num_cpus) | kind


def _gang(spec: JobSpec) -> list[Any]:
    group = ray.util.get_current_placement_group()
    resources = spec.run_config.resources
    workers = [
        ray.remote(WarmWorker)
        .options(
            num_cpus=resources.cpus_per_worker,
            num_gpus=spec.num_gpus_per_worker,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank + 1),
        )
        .remote(spec.config["name"], rank, resources.workers)
        for rank in range(resources.workers)
    ]
    if spec.is_loopback:
        meeting = f"file://{meeting_file()}"
    else:
        meeting = ray.get(workers[0].address.remote())
    ray.get([worker.meet.remote(backend_of(spec.num_gpus_per_worker), meeting) for worker in workers])
    return workers
