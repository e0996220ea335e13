"""A sweep: suggest trials to Ray Tune, record how each ends, keep front and study up to date. The same call resumes."""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray import tune

from rltune.config.load import Experiment
from rltune.errors import ExperimentError, RunError, StorageError, writing
from rltune.orchestration.claiming import claim_run
from rltune.orchestration.cluster import Cluster
from rltune.orchestration.confirm_job import run_confirmation
from rltune.orchestration.job import STORAGE_ERROR, JobSpec
from rltune.orchestration.loopback import forget_meetings
from rltune.orchestration.plan import Plan, make_plan
from rltune.orchestration.tuning import Recorder, StoppingScheduler, Suggester, train_trainable
from rltune.orchestration.warm import warm_trainable
from rltune.records import to_record
from rltune.runs.confirmations import Measured, confirmed_front, measured, read_confirmations
from rltune.runs.events import append_event
from rltune.runs.fronts import front_as_csv, front_as_dict, search_front
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.metrics import violations
from rltune.runs.objectives import Front, Objectives, find_front, nearest
from rltune.runs.record import versions
from rltune.runs.reference import BaseScores, load_scores
from rltune.runs.results import TrialResult, append_result, read_results
from rltune.runs.rows import read_metrics
from rltune.runs.store import write_atomically
from rltune.runs.usage import last_sign
from rltune.search.budget import Spending
from rltune.search.searcher import Search, is_finite
from rltune.search.stopping import Rules
from rltune.search.study import StudyFile
from rltune.search.warm_start import keep_prior_results, read_prior_results
from rltune.training.checkpoint import list_checkpoints, own_metrics, read_checkpoint_meta, why_not_handed_on

logger = logging.getLogger(__name__)

GRACE_S = 25.0
"""From SIGTERM to the end; Kubernetes kills after 30 s, clouds take spot machines back after 30 to 120 s."""

TUNE_FAILURES = 2
"""Restarts of what Ray Train cannot start again: a trial's driver; of a gang, where the executor is ``warm``."""


class _Abort(BaseException):
    """Ends Tune's loop from one of its callbacks, which would take any Exception for a warning."""


class Sweep:
    """One run of an experiment on a connected cluster, started or resumed.

    Args:
        experiment: What to do. Without distributions it is a single training run: the base model and one trial.
        folder: The run folder, locked by the caller.
        cluster: Where to run.

    Raises:
        UserError: The cluster cannot hold a trial, the folder is another experiment's, or the run that the search
            is to start from cannot be used.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, cluster: Cluster) -> None:
        self._experiment = experiment
        self._folder = folder
        self._cluster = cluster
        self._shared = experiment.shared
        self.plan: Plan = make_plan(experiment, cluster.nodes)
        if cluster.num_nodes > 1:
            logger.warning("the cluster has %d nodes: %s must be shared by all", cluster.num_nodes, folder.path)
        prior_results = read_prior_results(experiment, folder)
        claim = claim_run(folder, experiment, precision="bf16" if self.plan.num_gpus_per_worker > 0 else "fp32")
        self._claim, self.experiment = claim, claim.experiment
        self._experiment = experiment = claim.experiment
        self._shared = claim.config_of(experiment.shared)
        keep_prior_results(experiment, folder, prior_results)
        self._objectives = Objectives(self._shared.objective_names)
        self._lock = threading.Lock()
        self._is_leaving = False
        self._storage_error: RunError | None = None
        self._stopped: dict[str, str] = {}
        self._rules: Rules | None = None
        self._volumes: list[float] = []
        self._base_reference: BaseScores | None = None
        self._is_out_of_budget = False
        self.over = ""
        """Why no further trial is started although some are left; empty while they are."""
        self._results = read_results(folder.results_file)
        ended = {result.trial for result in self._results}
        unfinished = [spec for spec in folder.read_trials() if spec.id not in ended and spec.id != BASE_TRIAL]
        trained = [result for result in self._results if result.trial != BASE_TRIAL]
        self._search = Search(
            experiment, self._objectives, results=trained, unfinished=unfinished, prior_results=prior_results
        )
        self._study_file = StudyFile(folder.study_file, folder.name, experiment) if experiment.is_searched else None
        self._num_left = max(self.plan.num_trials - len(trained), 0)
        self._spending = Spending(folder, gpus_per_trial=self.plan.num_workers * self.plan.num_gpus_per_worker)

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

        SIGTERM, which announces that the machine goes away, asks every trial to write a checkpoint and leave; a second
        one, or ``GRACE_S`` seconds, end the run as Ctrl-C does, at the last evaluation.

        Raises:
            RunError: The base model could not be measured, or the run folder can no longer be written.
        """
        append_event(
            self._folder.events_file,
            "driver_started",
            trials_at_once=self.plan.num_concurrent,
            workers=self.plan.num_workers,
            gpus_per_worker=self.plan.num_gpus_per_worker,
            last_sign=last_sign(self._folder),
            versions=versions(),
        )
        forget_meetings(self._folder.path)
        try:
            self._run()
        finally:
            append_event(self._folder.events_file, "driver_ended")
            forget_meetings(self._folder.path)

    def _run(self) -> None:
        base = self._base_result()
        if base is not None and not base.is_ok:  # what stopped it may have been put right since
            self._folder.failure_file(BASE_TRIAL).unlink(missing_ok=True)
            self._results.remove(base)
            base = None
        self._look_up(self._results)
        if (self._num_left and not self.over) or base is None:
            self._folder.stop_file.unlink(missing_ok=True)
            # trials end with the connection, and go on from their checkpoints
            with self._leaving_on_sigterm(), suppress(KeyboardInterrupt, _Abort):
                self._run_tune(needs_base=base is None)
        if self._storage_error is not None:
            raise self._storage_error
        base = self._base_result()
        if base is not None and not base.is_ok:
            raise RunError(f"the base model could not be measured: {base.reason}")
        self._write_front()

    @property
    def chosen(self) -> list[TrialResult]:
        """What was picked by its own measurements, which luck has raised: the front of a search, or a checkpoint."""
        if self._experiment.is_searched:
            front = self.search_front()
            return [member for member in front.members if member.trial != BASE_TRIAL] if front else []
        is_selected = self._shared.evaluate.select != "last"
        return [result for result in self._results if result.is_ok and result.trial != BASE_TRIAL and is_selected]

    def confirm(self) -> None:
        """Measure what was chosen on fresh prompts and noise.

        Raises:
            RunError: It could not be done; what the search measured stands.
        """
        spec = self._job(TrialSpec(BASE_TRIAL, {}, {}))
        workers = min(self.plan.num_workers * self.plan.num_concurrent, self.plan.num_slots)
        try:
            run_confirmation(self.chosen, self._folder, self._experiment, spec, num_workers=workers)
        finally:
            forget_meetings(self._folder.path)
        self._write_front()

    @property
    def nearest(self) -> TrialResult | None:
        """The trained trial that breaks its constraints least; None where none ended well."""
        reference = self._reference
        return nearest(self._results, reference.sizes) if reference else None

    def measured(self, result: TrialResult) -> Measured:
        """Return a trial as it is to be reported: by fresh measurements where there are any."""
        return measured(result, self._experiment, read_confirmations(self._folder))

    @contextmanager
    def _leaving_on_sigterm(self) -> Iterator[None]:
        timers: list[threading.Timer] = []

        def leave(number: int, frame: Any) -> None:
            if self._is_leaving:
                raise KeyboardInterrupt
            self._is_leaving = True
            self._folder.stop_file.touch()
            timers.append(threading.Timer(GRACE_S, os.kill, (os.getpid(), signal.SIGINT)))
            timers[-1].start()

        try:
            previous = signal.signal(signal.SIGTERM, leave)
        except ValueError:  # not in the main thread, where no signal can be heard
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
            for timer in timers:
                timer.cancel()
            if self._is_leaving:
                self._folder.stop_file.unlink(missing_ok=True)

    def front(self) -> Front | None:
        """Return the front as it stands, by fresh measurements where all members have one."""
        front = self.search_front()
        if front is None:
            return None
        return confirmed_front(front, self._experiment, read_confirmations(self._folder)) or front

    def search_front(self) -> Front | None:
        """Return the front by the evaluations that trials were chosen by."""
        return search_front(self._results, self._experiment, self._reference)

    @property
    def _reference(self) -> BaseScores | None:
        """The base model's measurements, read once they are there."""
        if self._base_reference is None:
            self._base_reference = load_scores(self._folder.base_dir / self._claim.record.base_key)
        return self._base_reference

    def _run_tune(self, *, needs_base: bool) -> None:
        if needs_base:
            append_event(self._folder.trial_events_file(BASE_TRIAL), "suggested")
        suggester = Suggester(
            self._suggest,
            first=self._job(TrialSpec(BASE_TRIAL, {}, {})) if needs_base else None,
            num_trials=self._num_left,
        )
        is_warm = self._shared.resources.executor == "warm"
        tune.Tuner(
            warm_trainable(self.plan) if is_warm else train_trainable(),
            tune_config=tune.TuneConfig(
                search_alg=suggester,
                scheduler=StoppingScheduler(self._on_report),
                num_samples=self._num_left + int(needs_base),
                max_concurrent_trials=self.plan.num_concurrent,
                reuse_actors=is_warm,  # a driver of Ray Train that was stopped cannot be used again
            ),
            run_config=tune.RunConfig(
                name="tune",  # not the run's: Ray takes fewer names than file systems do
                storage_path=str(self._folder.scratch_dir),
                failure_config=tune.FailureConfig(max_failures=TUNE_FAILURES),
                callbacks=[Recorder(self._on_end)],
                verbose=0,
            ),
        ).fit()

    def _suggest(self) -> JobSpec | None:
        self._check_budget()
        while not (self._is_leaving or self.over) and self._num_left > self._spending.num_running:
            with self._or_abort(), self._lock:
                spec = self._search.ask()
                try:
                    job = self._job(spec)
                except ExperimentError as error:
                    invalid = error
                else:
                    self._folder.write_trial(spec)
                    self._spending.begin(spec.id)
                    append_event(self._folder.trial_events_file(spec.id), "suggested")
                    return job
            self._record_invalid(spec, invalid)
        return None

    def _record_invalid(self, spec: TrialSpec, error: ExperimentError) -> None:
        """Record a suggestion that is no valid run as a trial that failed: the search may only not repeat it."""
        faults = "; ".join(str(fault) for fault in error.faults)
        with self._or_abort():
            self._folder.write_trial(spec)
            self._take(
                TrialResult(
                    trial=spec.id,
                    state="failed",
                    values=spec.values,
                    params=spec.params,
                    reason=f"never started, since its settings are no valid run: {faults}",
                    ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
                )
            )

    @contextmanager
    def _or_abort(self) -> Iterator[None]:
        """End the run where the folder cannot be written: it holds all that is known."""
        try:
            with writing(self._folder.path):
                yield
        except RunError as error:
            self._storage_error = error
            raise _Abort from error

    def _job(self, spec: TrialSpec) -> JobSpec:
        config = self._claim.config_of(
            self._shared if spec.id == BASE_TRIAL else self._experiment.concrete(spec.values)
        )
        key = self._claim.key_of(config)
        return JobSpec(
            trial=spec.id,
            run_dir=str(self._folder.path),
            config=config.model_dump(mode="json"),
            num_gpus_per_worker=self.plan.num_gpus_per_worker,
            work_dir=str(Path.cwd()),
            is_loopback=self._cluster.is_own,
            waits_for_base=self._base_result() is None and key == self._claim.record.base_key,
            base_key=key,
        )

    def _on_report(self, job: JobSpec, report: Mapping[str, Any]) -> bool:
        """Return whether a trial is to be stopped, and note why."""
        if STORAGE_ERROR in report:
            self._storage_error = StorageError(str(report[STORAGE_ERROR]))
            raise _Abort
        if job.trial == BASE_TRIAL or report.get("is_preempted"):
            return False
        self._check_budget()
        rules = self._rules_now()
        # not what evaluate.select chose: a rebuilt rule reads metrics.jsonl, which has each step's own
        reason = rules.on_report(job.trial, own_metrics(report)) if rules else None
        if report.get("is_final") == 1.0:
            return False
        if self.over and self._is_out_of_budget and report.get("step", 0) > 0:
            reason = self.over
        if reason:
            self._stopped[job.trial] = reason
        return bool(reason)

    def _on_end(self, job: JobSpec, last: Mapping[str, Any], error: str, duration_s: float) -> None:
        _, is_storage, what = error.partition("StorageError: ")
        with self._or_abort():
            if is_storage:
                raise StorageError(what)
            self._record(job, last, error, duration_s)

    def _record(self, job: JobSpec, last: Mapping[str, Any], error: str, duration_s: float) -> None:
        result = self._judge(job, last, error, duration_s)
        if result is None:  # interrupted: the same command takes it up again
            return
        append_event(self._folder.trial_events_file(job.trial), "ended")
        self._take(result)

    def _take(self, result: TrialResult) -> None:
        """Take in how a trial ended: on disk first, then for the search and the front."""
        with self._lock:
            append_result(self._folder.results_file, result)
            self._results.append(result)
            self._spending.end(result.trial, result.duration_s)
            if result.trial != BASE_TRIAL:
                self._search.tell(result)
                self._num_left -= 1
        if result.trial == BASE_TRIAL and not result.is_ok:
            raise _Abort  # nothing can be compared with it
        self._look_up([result])
        self._write_front()

    def _judge(self, job: JobSpec, last: Mapping[str, Any], error: str, duration_s: float) -> TrialResult | None:
        failure = self._folder.failure_file(job.trial)
        reason = failure.read_text().strip() if failure.exists() else error
        stopped = "" if reason else self._stopped.get(job.trial, "")
        if not reason and not stopped and last.get("is_final") != 1.0:
            return None
        checkpoint, metrics = "", _ours(last)
        if not reason and job.trial != BASE_TRIAL:
            found = self._checkpoint(job, metrics)
            if found is None:
                reason = f"no whole checkpoint of an evaluation is left in {self._folder.checkpoints_dir(job.trial)}"
            else:
                checkpoint, metrics = found
        if not reason and not is_finite(metrics, self._objectives):
            reason = f"an objective is missing or a metric is not finite: {metrics}"
        spec = self._folder.read_trial(job.trial)
        return TrialResult(
            trial=job.trial,
            state="failed" if reason else "stopped" if stopped else "ok",
            values=spec.values if spec else {},
            params=spec.params if spec else {},
            metrics={} if reason else metrics,
            constraints={} if reason else violations(self._shared, metrics, self._base_metrics() or metrics),
            reason=reason or stopped,
            checkpoint="" if reason else checkpoint,
            duration_s=round(duration_s, 3),
            ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _checkpoint(self, job: JobSpec, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]] | None:
        """Return a trial's checkpoint, relative to the run folder, and its metrics; None where none is whole.

        A trial that is stopped trains on for a moment, and a checkpoint may be broken: where that of the last report
        is not to be had, the trial is what its newest whole checkpoint says it is.
        """
        found = []
        for path in list_checkpoints(self._folder.checkpoints_dir(job.trial)):
            with suppress(RunError):
                meta = read_checkpoint_meta(path)
                # one that was written in haste, between evaluations, hands on adapters that nobody has measured
                if meta.selected or (meta.last and meta.last.step == meta.progress.step):
                    found.append((path, meta.metrics))
        found.sort(key=lambda row: row[1]["step"] != metrics.get("step"))  # stable: the others stay newest first
        for path, its_metrics in found:  # Tune waits meanwhile: what is hashed is the file that is handed on, of one
            if not why_not_handed_on(path):
                return str(path.relative_to(self._folder.path)), _ours(its_metrics)
        return None

    def _base_metrics(self) -> dict[str, float] | None:
        """Return what the base model measured: its file is there a moment before its result is recorded."""
        reference = self._reference
        return reference.summary if reference else None

    def _rules_now(self) -> Rules | None:
        """Return the stopping rules, rebuilt from what all trials have measured so far; None before the base model."""
        base, reference = self._base_metrics(), self._reference
        if self._rules is None and base is not None and reference is not None:
            self._rules = Rules(self._shared, self._objectives, base, reference.sizes)
            for spec in self._folder.read_trials():
                rows = read_metrics(self._folder.trial_dir(spec.id) / "metrics.jsonl")
                self._rules.replay(spec.id, rows)
        return self._rules

    def _look_up(self, ended: Sequence[TrialResult]) -> None:
        """Take in trials that ended, in turn: has the front stopped to grow?"""
        if self._shared.stop.stalled_trials is not None and self._reference is not None:
            before = len(self._results) - len(ended)
            for count in range(before + 1, len(self._results) + 1):
                front = find_front(self._results[:count], self._objectives, self._reference.sizes)
                self._volumes += [] if front is None else [front.hypervolume]
        self._check_budget()

    def _check_budget(self) -> None:
        """Note why no further trial should start, once there is a reason."""
        rules = self._rules_now()
        if rules is None or self.over:
            return
        spent = rules.out_of_budget(elapsed_s=self._spending.elapsed_s, gpu_s=self._spending.gpu_s)
        self._is_out_of_budget = bool(spent)
        self.over = spent or rules.stalled(self._volumes) or ""

    def _base_result(self) -> TrialResult | None:
        return next((result for result in reversed(self._results) if result.trial == BASE_TRIAL), None)

    def _write_front(self) -> None:
        if self._study_file is not None:
            self._study_file.update(self.results)
        front = self.front()
        if front is not None:
            write_atomically(self._folder.path / "front.json", json.dumps(to_record(front_as_dict(front)), indent=2))
            write_atomically(self._folder.path / "front.csv", front_as_csv(front))


def _ours(report: Mapping[str, Any]) -> dict[str, float]:
    """Return what a result keeps of a report, to which Tune adds its own."""
    kept = ("step", "selected_step", "images_seen")
    return {name: float(value) for name, value in report.items() if name.startswith(("eval/", "gain/")) or name in kept}
