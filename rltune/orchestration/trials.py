"""The trials of a sweep: which comes next, whether one goes on, how each ended. Decides; starts nothing, knows no Ray.

What was decided is on disk before it counts, so that a sweep that is started again goes on from the run folder alone.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rltune.errors import ExperimentError, RunError, StorageError, writing
from rltune.orchestration.claiming import Claim
from rltune.orchestration.job_spec import STORAGE_ERROR, JobSpec
from rltune.orchestration.outcome import Ending, failed, find_checkpoint, judge
from rltune.orchestration.workload import Workload
from rltune.records import to_record
from rltune.runs.base_scores import BaseScores, load_scores
from rltune.runs.confirmations import Measured, measured, read_confirmations
from rltune.runs.events import append_event
from rltune.runs.fronts import front_as_csv, front_as_dict, search_front
from rltune.runs.layout import BASE_TRIAL, TrialSpec
from rltune.runs.mixtures import read_mixtures, reported_front
from rltune.runs.objectives import Front, Objectives, find_front, nearest
from rltune.runs.results import TrialResult, append_result, read_results
from rltune.runs.rows import read_metrics
from rltune.runs.store import write_atomically
from rltune.search.budget import Spending
from rltune.search.searcher import Search
from rltune.search.stopping import Rules
from rltune.search.study import StudyFile
from rltune.training.checkpoint import own_metrics


class Abort(BaseException):
    """Ends Tune's loop from one of its callbacks, which would take any Exception for a warning."""


class Trials:
    """The trials of one run, those that ended before this start included.

    Args:
        claim: The run folder and its experiment.
        workload: What runs where.
        prior_results: Ended trials of another run that the search learns from.
        is_loopback: Whether the cluster is our own on one machine, where nothing may listen to the network.
    """

    def __init__(
        self, claim: Claim, workload: Workload, *, prior_results: Sequence[TrialResult] = (), is_loopback: bool
    ) -> None:
        self.folder, self.experiment = claim.folder, claim.experiment
        self._claim, self._is_loopback = claim, is_loopback
        self._shared = claim.config_of(claim.experiment.shared)
        self._objectives = Objectives(self._shared.objective_names)
        self._lock = threading.Lock()
        self.is_leaving = False
        """Whether no further trial is to start, and those that run are to write a checkpoint and leave."""
        self.storage_error: RunError | None = None
        """Why nothing can go on."""
        self.over = ""
        """Why no further trial is started although some are left; empty while they are."""
        self.stopped: dict[str, str] = {}
        """Trial that was stopped and has not ended yet -> why."""
        self._rules: Rules | None = None
        self._volumes: list[float] = []
        self._base_scores: BaseScores | None = None
        self._is_out_of_budget = False
        folder, experiment = self.folder, self.experiment
        self._results = read_results(folder.results_file)
        ended = {result.trial for result in self._results}
        unfinished = [spec for spec in folder.read_trials() if spec.id not in ended and spec.id != BASE_TRIAL]
        trained = [result for result in self._results if result.trial != BASE_TRIAL]
        self._search = Search(
            experiment, self._objectives, results=trained, unfinished=unfinished, prior_results=prior_results
        )
        self._study_file = StudyFile(folder.study_file, folder.name, experiment) if experiment.is_searched else None
        self.num_left = max(workload.num_trials - len(trained), 0)
        """Trials still to be trained."""
        self.spending = Spending(folder, gpus_per_trial=workload.num_workers * workload.num_gpus_per_worker)
        self._num_gpus_per_worker = workload.num_gpus_per_worker

    # ---- where it stands

    @property
    def results(self) -> list[TrialResult]:
        """Trials that ended, in the order in which they did."""
        return list(self._results)

    @property
    def base_result(self) -> TrialResult | None:
        """How the base model's trial ended; None while it has not."""
        return next((result for result in reversed(self._results) if result.trial == BASE_TRIAL), None)

    @property
    def chosen(self) -> list[TrialResult]:
        """What was picked by its own measurements, which luck has raised: the front of a search, or a checkpoint.

        A basis is measured again in any case, with its points.
        """
        if self.experiment.is_searched:
            front = self.search_front()
            return [member for member in front.members if member.trial != BASE_TRIAL] if front else []
        is_wanted = self._shared.evaluate.select != "last" or self._shared.model.adapter.kind == "basis"
        return [result for result in self._results if result.is_ok and result.trial != BASE_TRIAL and is_wanted]

    @property
    def nearest(self) -> TrialResult | None:
        """The trained trial that breaks its constraints least; None where none ended well."""
        scores = self._scores
        return nearest(self._results, scores.sizes) if scores else None

    def measured(self, result: TrialResult) -> Measured:
        """Return a trial as it is to be reported: by fresh measurements where there are any."""
        return measured(result, self.experiment, read_confirmations(self.folder))

    def front(self) -> Front | None:
        """Return the front as it stands, by fresh measurements where all members have one, and with its soups."""
        front = self.search_front()
        if front is None:
            return None
        return reported_front(front, self.experiment, read_confirmations(self.folder), read_mixtures(self.folder))

    def search_front(self) -> Front | None:
        """Return the front by the evaluations that trials were chosen by."""
        return search_front(self._results, self.experiment, self._scores)

    def write_front(self) -> None:
        """Bring the study and the front's files up to date."""
        if self._study_file is not None:
            self._study_file.update(self.results)
        front = self.front()
        if front is not None:
            folder = self.folder
            write_atomically(folder.path / "front.json", json.dumps(to_record(front_as_dict(front)), indent=2))
            write_atomically(folder.path / "front.csv", front_as_csv(front))
            folder.publish(folder.path / "front.json", folder.path / "front.csv")

    # ---- what comes next

    def suggest(self) -> JobSpec | None:
        """Return the next trial, its record on disk; None when no more are wanted.

        Raises:
            Abort: The run folder can no longer be written.
        """
        self.check_budget()
        while not (self.is_leaving or self.over) and self.num_left > self.spending.num_running:
            with self._or_abort(), self._lock:
                spec = self._search.ask()
                try:
                    job = self.job(spec)
                except ExperimentError as error:
                    invalid = error
                else:
                    self.folder.write_trial(spec)
                    self.spending.begin(spec.id)
                    append_event(self.folder.trial_events_file(spec.id), "suggested")
                    return job
            self._record_invalid(spec, invalid)
        return None

    def job(self, spec: TrialSpec) -> JobSpec:
        """Return a trial as it travels to its workers.

        Raises:
            ExperimentError: Its values are no valid run.
        """
        config = self._claim.config_of(self._shared if spec.id == BASE_TRIAL else self.experiment.concrete(spec.values))
        key = self._claim.key_of(config)
        return JobSpec(
            trial=spec.id,
            run_dir=str(self.folder.path),
            uri="" if self.folder.copy is None else self.folder.where,
            begun=self._claim.record.started,
            config=config.model_dump(mode="json"),
            num_gpus_per_worker=self._num_gpus_per_worker,
            work_dir=str(Path.cwd()),
            is_loopback=self._is_loopback,
            waits_for_base=self.base_result is None and key == self._claim.record.base_key,
            base_key=key,
        )

    def shares_base(self, result: TrialResult) -> bool:
        """Return whether a trial is drawn and scored as the base model of the run is, so that LoRAs mix with its."""
        config = self._claim.config_of(self.experiment.concrete(result.values))
        return self._claim.key_of(config) == self._claim.record.base_key

    def _record_invalid(self, spec: TrialSpec, error: ExperimentError) -> None:
        """Record a suggestion that is no valid run as a trial that failed: the search may only not repeat it."""
        faults = "; ".join(str(fault) for fault in error.faults)
        with self._or_abort():
            self.folder.write_trial(spec)
            self.take(failed(spec, f"never started, since its settings are no valid run: {faults}"))

    # ---- what becomes of it

    def on_report(self, job: JobSpec, report: Mapping[str, Any]) -> bool:
        """Return whether a trial is to be stopped, and note why.

        Raises:
            Abort: The trial says that the run folder can no longer be written.
        """
        if STORAGE_ERROR in report:
            self.storage_error = StorageError(str(report[STORAGE_ERROR]))
            raise Abort
        if job.trial == BASE_TRIAL or report.get("is_preempted"):
            return False
        self.check_budget()
        rules = self.rules
        # not what evaluate.select chose: a rebuilt rule reads metrics.jsonl, which has each step's own
        reason = rules.on_report(job.trial, own_metrics(report)) if rules else None
        if report.get("is_final") == 1.0:
            return False
        if self.over and self._is_out_of_budget and report.get("step", 0) > 0:
            reason = self.over
        if reason:
            self.stopped[job.trial] = reason
        return bool(reason)

    def on_end(self, job: JobSpec, last: Mapping[str, Any], error: str, duration_s: float) -> None:
        """Record how a trial ended; one that was interrupted has not.

        Args:
            job: The trial.
            last: Its last report.
            error: Ray's text of what went wrong; empty if nothing did.
            duration_s: How long it ran.

        Raises:
            Abort: The run folder can no longer be written, or the base model could not be measured.
        """
        _, is_storage, what = error.partition("StorageError: ")
        with self._or_abort():
            if is_storage:
                raise StorageError(what)
            self.folder.bring(self.folder.base_dir, self.folder.trial_dir(job.trial))
            result = self._judge(job, last, error, duration_s)
            if result is None:  # interrupted: the same command takes it up again
                return
            append_event(self.folder.trial_events_file(job.trial), "ended")
            self.folder.publish(self.folder.trial_events_file(job.trial))
            self.take(result)

    def _judge(self, job: JobSpec, last: Mapping[str, Any], error: str, duration_s: float) -> TrialResult | None:
        failure = self.folder.failure_file(job.trial)
        ending = Ending(
            self.folder.read_trial(job.trial) or TrialSpec(job.trial, {}, {}),
            last,
            failure.read_text().strip() if failure.exists() else error,
            self.stopped.get(job.trial, ""),
            duration_s,
            self.folder.checkpoints_dir(job.trial),
        )
        base = self._scores.summary if self._scores else None
        return judge(
            ending,
            self._shared,
            self._objectives,
            base,
            lambda metrics: find_checkpoint(self.folder, job.trial, metrics),
        )

    def take(self, result: TrialResult) -> None:
        """Take in how a trial ended: on disk first, then for the search and the front."""
        with self._lock:
            append_result(self.folder.results_file, result)
            self.folder.publish(self.folder.results_file)
            self._results.append(result)
            self.spending.end(result.trial, result.duration_s)
            if result.trial != BASE_TRIAL:
                self._search.tell(result)
                self.num_left -= 1
        if result.trial == BASE_TRIAL and not result.is_ok:
            raise Abort  # nothing can be compared with it
        self.take_stock([result])
        self.write_front()

    def forget_failed_base(self) -> None:
        """Measure a base model again that could not be measured: what stopped it may have been put right since."""
        base = self.base_result
        if base is not None and not base.is_ok:
            self.folder.remove(self.folder.failure_file(BASE_TRIAL))
            self._results.remove(base)

    # ---- when to end

    @property
    def rules(self) -> Rules | None:
        """The stopping rules, rebuilt from what all trials have measured so far; None before the base model."""
        scores = self._scores
        if self._rules is None and scores is not None:
            self._rules = Rules(self._shared, self._objectives, scores.summary, scores.sizes)
            for spec in self.folder.read_trials():
                rows = read_metrics(self.folder.trial_dir(spec.id) / "metrics.jsonl")
                self._rules.replay(spec.id, rows)
        return self._rules

    def take_stock(self, ended: Sequence[TrialResult]) -> None:
        """Take in trials that ended, in turn: has the front stopped to grow?"""
        if self._shared.stop.stalled_trials is not None and self._scores is not None:
            before = len(self._results) - len(ended)
            for count in range(before + 1, len(self._results) + 1):
                front = find_front(self._results[:count], self._objectives, self._scores.sizes)
                self._volumes += [] if front is None else [front.hypervolume]
        self.check_budget()

    def check_budget(self) -> None:
        """Note why no further trial should start, once there is a reason."""
        rules = self.rules
        if rules is None or self.over:
            return
        spent = rules.out_of_budget(elapsed_s=self.spending.elapsed_s, gpu_s=self.spending.gpu_s)
        self._is_out_of_budget = bool(spent)
        self.over = spent or rules.stalled(self._volumes) or ""

    @property
    def _scores(self) -> BaseScores | None:
        """What the base model scored, read once it is there: a moment before its result is recorded."""
        if self._base_scores is None:
            self._base_scores = load_scores(self.folder.base_dir / self._claim.record.base_key)
        return self._base_scores

    @contextmanager
    def _or_abort(self) -> Iterator[None]:
        """End the run where the folder cannot be written: it holds all that is known."""
        try:
            with writing(self.folder.path):
                yield
        except RunError as error:
            self.storage_error = error
            raise Abort from error
