"""A sweep: deal trials to Ray Tune, record how each ends, keep front and study up to date. The same call resumes."""

import csv
import io
import json
import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray import tune

from rltune.config.load import Experiment, load_experiment
from rltune.errors import RunError, UserError
from rltune.orchestration.cluster import Cluster
from rltune.orchestration.job import JobSpec
from rltune.orchestration.objectives import Front, Objectives, find_front
from rltune.orchestration.plan import Plan, make_plan
from rltune.orchestration.results import TrialResult, append_result, read_results
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder, TrialSpec, write_atomically
from rltune.orchestration.search import Search, is_finite
from rltune.orchestration.tuning import Dealer, Recorder, drive
from rltune.training.base import load_base
from rltune.training.selection import violations
from rltune.training.setup import base_key

logger = logging.getLogger(__name__)


class Sweep:
    """One run of an experiment on a connected cluster, started or resumed.

    Args:
        experiment: What to do. Without distributions it is a single training run: the base model and one trial.
        folder: The run folder, locked by the caller.
        cluster: Where to run.

    Raises:
        UserError: The cluster cannot hold a trial, or the folder is another experiment's.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, cluster: Cluster) -> None:
        self._experiment = experiment
        self._folder = folder
        self._cluster = cluster
        self._shared = experiment.shared
        self.plan: Plan = make_plan(experiment, cluster.resources)
        if cluster.num_nodes > 1:
            logger.warning("the cluster has %d nodes: %s must be shared by all", cluster.num_nodes, folder.path)
        folder.claim(experiment)
        self._objectives = Objectives(self._shared.objective_names)
        self._lock = threading.Lock()
        self._results = read_results(folder.results_file)
        ended = {result.trial for result in self._results}
        unfinished = [spec for spec in folder.read_trials() if spec.id not in ended and spec.id != BASE_TRIAL]
        trained = [result for result in self._results if result.trial != BASE_TRIAL]
        self._search = Search(experiment, self._objectives, results=trained, unfinished=unfinished)
        self._num_left = max(self.plan.num_trials - len(trained), 0)

    @property
    def num_left(self) -> int:
        """Trials still to be trained."""
        return self._num_left

    @property
    def results(self) -> list[TrialResult]:
        """Trials that ended, in the order in which they did."""
        return list(self._results)

    def run(self) -> None:
        """Run what is left and return when it has ended or was interrupted; results are in the run folder.

        Raises:
            RunError: The base model could not be measured.
        """
        base = self._base_result()
        if base is not None and not base.is_ok:  # what stopped it may have been put right since
            self._folder.failure_file(BASE_TRIAL).unlink(missing_ok=True)
            self._results.remove(base)
            base = None
        if self._num_left or base is None:
            with suppress(KeyboardInterrupt):  # trials end with the connection, and go on from their checkpoints
                self._run_tune(needs_base=base is None)
        base = self._base_result()
        if base is not None and not base.is_ok:
            raise RunError(f"the base model could not be measured: {base.reason}")
        self._write_front()

    def front(self) -> Front | None:
        """Return the front as it stands."""
        reference = load_base(self._folder.base_dir / base_key(self._shared))
        return find_front(self._results, self._objectives, reference.spread) if reference else None

    def _run_tune(self, *, needs_base: bool) -> None:
        dealer = Dealer(
            self._deal,
            first=self._job(TrialSpec(BASE_TRIAL, {}, {})) if needs_base else None,
            is_first_done=lambda: self._base_result() is not None,
            num_trials=self._num_left,
        )
        tune.Tuner(
            # no CPU of its own, or drivers would take those their workers wait for; the head outlives spot nodes
            tune.with_resources(drive, {"CPU": 0, "node:__internal_head__": 0.001}),
            tune_config=tune.TuneConfig(
                search_alg=dealer,
                num_samples=self._num_left + int(needs_base),
                max_concurrent_trials=self.plan.num_concurrent,
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name=self._folder.name,
                storage_path=str(self._folder.scratch_dir),
                failure_config=tune.FailureConfig(max_failures=2),
                callbacks=[Recorder(self._on_end)],
                verbose=0,
            ),
        ).fit()

    def _deal(self) -> JobSpec:
        with self._lock:
            spec = self._search.ask()
        self._folder.write_trial(spec)
        return self._job(spec)

    def _job(self, spec: TrialSpec) -> JobSpec:
        config = self._shared if spec.id == BASE_TRIAL else self._experiment.concrete(spec.values)
        return JobSpec(
            trial=spec.id,
            run_dir=str(self._folder.path),
            config=config.model_dump(mode="json"),
            num_gpus_per_worker=self.plan.num_gpus_per_worker,
            work_dir=str(Path.cwd()),
            is_loopback=self._cluster.is_own,
        )

    def _on_end(self, job: JobSpec, last: Mapping[str, Any], error: str, duration_s: float) -> None:
        result = self._judge(job, last, error, duration_s)
        if result is None:  # interrupted: the same command takes it up again
            return
        with self._lock:
            append_result(self._folder.results_file, result)
            self._results.append(result)
            if result.trial != BASE_TRIAL:
                self._search.tell(result)
                self._num_left -= 1
        self._write_front()

    def _judge(self, job: JobSpec, last: Mapping[str, Any], error: str, duration_s: float) -> TrialResult | None:
        failure = self._folder.failure_file(job.trial)
        reason = failure.read_text().strip() if failure.exists() else error
        metrics = {name: float(value) for name, value in last.items() if _is_ours(name)}
        is_final = last.get("is_final") == 1.0
        if not reason and not is_final:
            return None
        if not reason and not is_finite(metrics, self._objectives):
            reason = f"an objective is missing or a metric is not finite: {metrics}"
        base = self._base_result()
        reference = metrics if job.trial == BASE_TRIAL or base is None else base.metrics
        spec = next((spec for spec in self._folder.read_trials() if spec.id == job.trial), None)
        return TrialResult(
            trial=job.trial,
            state="failed" if reason else "ok",
            values=spec.values if spec else {},
            params=spec.params if spec else {},
            metrics={} if reason else metrics,
            constraints={} if reason else violations(self._shared, metrics, reference),
            reason=reason,
            checkpoint="" if reason or job.trial == BASE_TRIAL else self._checkpoint(job),
            duration_s=round(duration_s, 3),
            ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _checkpoint(self, job: JobSpec) -> str:
        found = latest_checkpoint(self._folder.checkpoints_dir(job.trial) / job.train_name)
        if found is None:
            raise RunError(f"trial {job.trial}: no checkpoint is left in {self._folder.checkpoints_dir(job.trial)}")
        return str(found.relative_to(self._folder.path))

    def _base_result(self) -> TrialResult | None:
        return next((result for result in reversed(self._results) if result.trial == BASE_TRIAL), None)

    def _write_front(self) -> None:
        front = self.front()
        if front is not None:
            write_atomically(self._folder.path / "front.json", json.dumps(front_as_dict(front), indent=2))
            write_atomically(self._folder.path / "front.csv", front_as_csv(front))


def latest_checkpoint(train_dir: Path) -> Path | None:
    """Return the newest checkpoint that Ray Train left in a job's folder; names sort by time."""
    found = sorted(path for path in train_dir.glob("checkpoint_*") if path.is_dir())
    return found[-1] if found else None


def open_run(path: Path) -> tuple[RunFolder, Experiment]:
    """Return a run folder and its experiment.

    Raises:
        UserError: There is no run at ``path``.
    """
    folder = RunFolder(path)
    if not folder.experiment_file.is_file():
        raise UserError(f"{path}: not a run folder, it has no experiment.yaml; name one such as runs/mix")
    return folder, load_experiment(folder.experiment_file, must_find_files=False)


def read_front(folder: RunFolder, experiment: Experiment) -> Front | None:
    """Return a run's front from its folder alone, or None while the base model has no result."""
    shared = experiment.shared
    reference = load_base(folder.base_dir / base_key(shared))
    if reference is None:
        return None
    return find_front(read_results(folder.results_file), Objectives(shared.objective_names), reference.spread)


def front_as_dict(front: Front) -> dict[str, Any]:
    """Return the front in JSON's types."""
    return {
        "objectives": {
            name: "maximize" if sign > 0 else "minimize"
            for name, sign in zip(front.objectives.names, front.objectives.signs_D, strict=True)
        },
        "reference_point": dict(zip(front.objectives.names, front.reference_D.tolist(), strict=True)),
        "hypervolume": front.hypervolume,
        "knee": front.knee.trial if front.knee else None,
        "members": [
            {"trial": member.trial, "values": dict(member.values), "metrics": dict(member.metrics)}
            for member in front.members
        ],
    }


def front_as_csv(front: Front) -> str:
    """Return the front as a table: trial, objectives and gains over the base with standard errors, knobs."""
    paths = sorted({path for member in front.members for path in member.values})
    kinds = ("eval/{}", "eval/{}_se", "gain/{}", "gain/{}_se")
    columns = [kind.format(name) for name in front.objectives.names for kind in kinds]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", *columns, *paths])
    for member in front.members:
        metrics = [member.metrics[column] for column in columns]
        writer.writerow([member.trial, *metrics, *(member.values.get(path, "") for path in paths)])
    return text.getvalue()


def _is_ours(name: str) -> bool:
    return name.startswith(("eval/", "gain/")) or name in ("step", "selected_step", "images_seen")
