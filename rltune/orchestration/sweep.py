"""A sweep on a connected cluster: hand trials to Ray Tune, listen for signals, measure again what was chosen."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import tune

from rltune.errors import RunError
from rltune.export.write import Exported
from rltune.orchestration.claiming import claim_run
from rltune.orchestration.cluster import Cluster
from rltune.orchestration.confirm_job import measure, mixed, unconfirmed
from rltune.orchestration.executors.base import EXECUTORS
from rltune.orchestration.export_job import export_on_workers
from rltune.orchestration.faults import memory_kills_told
from rltune.orchestration.job_spec import JobSpec
from rltune.orchestration.mixing import mixable, wanted_mixtures, wanted_points
from rltune.orchestration.nodes import count_slots, read_nodes
from rltune.orchestration.plan import Plan
from rltune.orchestration.trials import Abort, Trials
from rltune.orchestration.tuning import Recorder, StoppingScheduler, Suggester
from rltune.orchestration.waiting import start_watch
from rltune.runs.events import append_event
from rltune.runs.layout import BASE_TRIAL, TrialSpec
from rltune.runs.mixtures import Mixture
from rltune.runs.record import versions
from rltune.runs.results import TrialResult
from rltune.runs.usage import last_sign
from rltune.search.warm_start import keep_prior_results, read_prior_results

GRACE_S = 25.0
"""From SIGTERM to the end; Kubernetes kills after 30 s, clouds take spot machines back after 30 to 120 s."""

TUNE_FAILURES = 2
"""Restarts of what Ray Train cannot start again: a trial's driver; of a gang, where the executor is ``warm``."""


class Sweep:
    """One run of an experiment on a connected cluster, started or resumed.

    Args:
        plan: What to do. Without distributions it is a single training run: the base model and one trial. The run
            folder is locked by the caller.
        cluster: Where to run, the one that it was planned for.

    Raises:
        UserError: The folder is another experiment's, or the run that the search is to start from cannot be used.
    """

    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        self.workload, self._folder, self._cluster = plan.workload, plan.folder, cluster
        prior_results = read_prior_results(plan.experiment, plan.folder)
        claim = claim_run(plan.folder, plan.experiment, precision=plan.workload.precision)
        keep_prior_results(claim.experiment, plan.folder, prior_results)
        plan.folder.publish()
        self.experiment = claim.experiment
        """With the defaults that held when the run was started."""
        self.trials = Trials(claim, plan.workload, prior_results=prior_results, is_loopback=cluster.is_own)

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
            trials_at_once=self.workload.num_concurrent,
            workers=self.workload.num_workers,
            gpus_per_worker=self.workload.num_gpus_per_worker,
            last_sign=last_sign(self._folder),
            versions=versions(),
        )
        before = list(self.trials.results)
        try:
            self._run()
        finally:
            append_event(self._folder.events_file, "driver_ended")
            if not all(result.is_ok for result in self.trials.results if result not in before):
                self._cluster.keep_logs()

    def _run(self) -> None:
        trials = self.trials
        trials.forget_failed_base()
        trials.take_stock(trials.results)
        needs_base = trials.base_result is None
        if (trials.num_left and not trials.over) or needs_base:
            self._folder.remove(self._folder.stop_file)
            # trials end with the connection, and go on from their checkpoints
            with self._leaving_on_sigterm(), suppress(KeyboardInterrupt, Abort):
                self._run_tune(needs_base=needs_base)
        if trials.storage_error is not None:
            raise trials.storage_error
        base = trials.base_result
        if base is not None and not base.is_ok:
            raise RunError(f"the base model could not be measured: {base.reason}")
        trials.write_front()

    def confirm(self) -> None:
        """Measure what was chosen on fresh prompts and noise.

        Raises:
            RunError: It could not be done; what the search measured stands.
        """
        with self._measuring() as (spec, workers):
            candidates = unconfirmed(self.trials.chosen, self._folder, self.experiment)
            measure(candidates, self._folder, spec, num_workers=workers)

    @property
    def mixtures(self) -> list[Mixture]:
        """What is to be mixed from the front and was not measured yet: what ``sweep`` asks for, and points of bases."""
        front = self.trials.front()
        if front is None:
            return []
        points = wanted_points(front, self.experiment, self._folder, self.trials.shares_base)
        if not self.experiment.is_searched:
            return points
        return points + wanted_mixtures(*mixable(front, self.experiment, self.trials.shares_base), self._folder)

    def mix(self, wanted: Sequence[Mixture]) -> None:
        """Measure mixtures as ``confirm`` measures what was chosen, and add soups to the front.

        Raises:
            RunError: It could not be done; those that were measured stand.
        """
        trials = {result.trial: result for result in self.trials.results}
        with self._measuring() as (spec, workers):
            candidates = mixed(wanted, trials, self._folder, self.experiment)
            measure(candidates, self._folder, spec, num_workers=workers)

    @contextmanager
    def _measuring(self) -> Iterator[tuple[JobSpec, int | tuple[int, int]]]:
        """Hand out what a job over the whole cluster needs, and bring the front up to date when it has ended well."""
        spec = self.trials.job(TrialSpec(BASE_TRIAL, {}, {}))
        try:
            yield spec, self._confirming_workers()
        finally:
            self._folder.bring(self._folder.confirmed_file, self._folder.mixtures_file)
            self.trials.write_front()

    def export(self, picks: Sequence[TrialResult], *, on_export: Callable[[Exported], None]) -> None:
        """Export LoRAs on workers of the cluster.

        Raises:
            RunError: Some could not be exported; the message names each with its reason.
        """
        spec = self.trials.job(TrialSpec(BASE_TRIAL, {}, {}))
        export_on_workers(picks, self._folder, self.experiment, spec, self.workload.worker, on_export=on_export)

    def _confirming_workers(self) -> int | tuple[int, int]:
        """Return how many workers measure again: as many as trained, of those for which there still is room.

        On a cluster that was attached to it goes on with one where nodes are lost meanwhile.
        """
        work = self.workload
        most = min(work.num_workers * work.num_concurrent, work.num_slots)
        if self._cluster.is_own:
            return most
        if not work.is_growing:
            most = max(1, min(most, count_slots(read_nodes(ray.nodes()), work.worker)))
        can_shrink = most > 1 and work.worker.num_gpus == int(work.worker.num_gpus)  # Ray Train shrinks by whole GPUs
        return (1, most) if can_shrink else most

    @contextmanager
    def _leaving_on_sigterm(self) -> Iterator[None]:
        timers: list[threading.Timer] = []
        trials = self.trials

        def leave(number: int, frame: Any) -> None:
            if trials.is_leaving:
                raise KeyboardInterrupt
            trials.is_leaving = True
            self._folder.stop_file.touch()
            threading.Thread(target=self._folder.publish, args=(self._folder.stop_file,)).start()
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
            if trials.is_leaving:
                self._folder.remove(self._folder.stop_file)

    def _run_tune(self, *, needs_base: bool) -> None:
        trials, executor = self.trials, EXECUTORS.build(self.experiment.shared.resources.executor, {})
        watch = start_watch(self._folder, self.workload)
        if needs_base:
            append_event(self._folder.trial_events_file(BASE_TRIAL), "suggested")
            watch.begin(BASE_TRIAL)

        def suggest() -> JobSpec | None:
            job = trials.suggest()
            if job is not None:
                watch.begin(job.trial)
            return job

        def on_end(job: JobSpec, *how: Any) -> None:
            watch.end(job.trial)
            trials.on_end(job, *how)

        suggester = Suggester(
            suggest,
            first=trials.job(TrialSpec(BASE_TRIAL, {}, {})) if needs_base else None,
            num_trials=trials.num_left,
        )
        tuner = tune.Tuner(
            executor.trainable(self.workload),
            tune_config=tune.TuneConfig(
                search_alg=suggester,
                scheduler=StoppingScheduler(trials.on_report),
                num_samples=trials.num_left + int(needs_base),
                max_concurrent_trials=self.workload.num_concurrent,
                reuse_actors=executor.reuses_workers,
            ),
            run_config=tune.RunConfig(
                name="tune",  # not the run's: Ray takes fewer names than file systems do
                storage_path=str(self._folder.scratch_dir),
                failure_config=tune.FailureConfig(max_failures=TUNE_FAILURES),
                # Ray would have each gang write an empty one into that folder, which need not be on the gang's node
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[Recorder(on_end, logs=self._cluster.logs)],
                verbose=0,
            ),
        )
        with watch.looking(), memory_kills_told():
            tuner.fit()
