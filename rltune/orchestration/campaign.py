"""A whole run, from its plan to its LoRAs: what ``rltune sweep``, a notebook and a submitted job all call.

It says what it does to a ``notify`` of the caller's and prints nothing.
"""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rltune.config.load import Experiment
from rltune.errors import RunError, UserError, writing
from rltune.export.picks import best_picks
from rltune.export.trials import export_trials
from rltune.export.write import Exported
from rltune.orchestration.cluster import Cluster, connect, find_address
from rltune.orchestration.metrics import exported
from rltune.orchestration.plan import Plan, plan, this_machine
from rltune.orchestration.survey import check_nodes
from rltune.orchestration.workload import work_out
from rltune.report.pictures import Shrinker
from rltune.report.write import kept_current, write_report
from rltune.runs.addresses import is_address
from rltune.runs.confirmations import Measured
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.objectives import Front
from rltune.runs.record import standing_where_started
from rltune.runs.remote import planned_folder, run_folder
from rltune.runs.results import TrialResult
from rltune.training.quiet import quiet_libraries

if TYPE_CHECKING:
    from rltune.orchestration.sweep import Sweep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """Nothing is wrong with the experiment, and the cluster is there; now it begins, or goes on."""

    plan: Plan
    cluster: Cluster
    num_ended: int
    """Trained trials that ended before this start."""
    num_left: int
    is_resumed: bool
    """Whether any trial had ended, the base model's included."""


@dataclass(frozen=True)
class Trained:
    """No trial runs any more."""

    plan: Plan
    num_left: int
    """Trials that were not trained to their end."""
    over: str
    """Why they are not to be; empty where they are, by the same call again."""


@dataclass(frozen=True)
class Confirming:
    """What was chosen is measured again on fresh prompts and noise."""


@dataclass(frozen=True)
class NotConfirmed:
    """It, or some of it, could not be measured again; what was measured before stands."""

    why: str


@dataclass(frozen=True)
class Mixing:
    """LoRAs of the front are mixed, and measured on the same prompts and noise."""

    num_soups: int
    num_strengths: int
    num_points: int = 0
    """Of bases."""


@dataclass(frozen=True)
class Found:
    """What a run found, before any of it is exported."""

    folder: RunFolder
    experiment: Experiment
    front: Front
    single: Measured | None
    """The one trained trial of a run without a search."""
    picks: tuple[TrialResult, ...]
    """Trials to export; none where no trained trial is on the front."""
    nearest: TrialResult | None
    """The trained trial that breaks its constraints least."""


@dataclass(frozen=True)
class Reported:
    """The run is told of on a page, as it stands at its end."""

    page: Path
    why_not: str = ""
    """Why the page could not be written; empty where it was."""


Event = Planned | Trained | Confirming | Mixing | NotConfirmed | Found | Reported | Exported
Notify = Callable[[Event], None]
Display = Callable[[RunFolder, Experiment], AbstractContextManager[None]]
"""Shows a run for as long as the block runs."""


def check_kind(experiment: Experiment, *, is_sweep: bool) -> None:
    """Check that an experiment has distributions to search, or that it has none.

    Raises:
        UserError: It is of the other kind.
    """
    source = experiment.source
    if is_sweep and not experiment.is_searched:
        raise UserError(
            f"{source}: every value is fixed, there is nothing to search; run: rltune train {quote(source)}"
        )
    if not is_sweep and experiment.is_searched:
        raise UserError(
            f"{source}: {', '.join(experiment.space)} are distributions; "
            f"fix each with --set, or run: rltune sweep {quote(source)}"
        )


def plan_run(experiment: Experiment, *, storage: str | Path, address: str | None) -> tuple[Plan, Cluster | None]:
    """Return what a run would do, and the cluster that is there; starts none, and stays attached to none.

    Raises:
        ExperimentError: Lists everything that is known to be wrong.
        RltuneError: The cluster that is named cannot be attached to, or the storage does not answer.
    """
    _check_stays(storage)
    folder = planned_folder(storage, experiment.shared.name)
    check_storage(experiment, folder)
    with standing_where_started(folder):
        if find_address(address) is None:
            return plan(experiment, [this_machine()], folder), None
        with connect(address) as cluster:
            return plan(experiment, cluster.nodes, folder, is_attached=True), cluster


def run_campaign(
    experiment: Experiment,
    *,
    storage: str | Path,
    address: str | None,
    notify: Notify = lambda event: None,
    display: Display = lambda folder, experiment: nullcontext(),
    exports: bool = True,
) -> Found:
    """Run or resume an experiment: plan, train, evaluate, measure again, export.

    Args:
        experiment: What to do.
        storage: Folder that holds run folders, or the address of one on object storage.
        address: Of the cluster, as in ``connect``.
        notify: Is told of each stage in this process and thread.
        display: Surrounds the training.
        exports: Whether to export what was picked.

    Raises:
        UserError: The experiment, the cluster or the run folder does not allow it; nothing was started.
        RunError: The base model could not be measured, no trial ended well, or an export failed.
        KeyboardInterrupt: It was interrupted; the same call resumes.
    """
    _check_stays(storage)
    with run_folder(storage, experiment.shared.name) as folder, standing_where_started(folder):
        check_storage(experiment, folder)
        is_attached = find_address(address) is not None
        # before Ray takes its seconds
        known = None if is_attached else plan(experiment, [this_machine()], folder, may_fetch=True)
        with folder.lock(), writing(folder.path), connect(address) as cluster:
            if known is None:
                known = plan(experiment, cluster.nodes, folder, is_attached=True, may_fetch=True)
            _check_decided(known)
            planned = replace(known, workload=work_out(known.experiment, cluster.nodes))
            if not cluster.is_own:
                where = folder.path if folder.copy is None else folder.copy.store
                check_nodes(cluster.nodes, planned.workload.worker, where)
            shrink = Shrinker()
            found, sweep = _run(planned, cluster, notify, display, shrink)
            notify(_report(folder, found.experiment, shrink))
            if exports and found.picks:
                if cluster.is_own:  # its processes are this machine's
                    quiet_libraries()
                    export_trials(found.picks, folder, found.experiment, on_export=notify)
                else:
                    sweep.export(found.picks, on_export=notify)
            return found


def check_storage(experiment: Experiment, folder: RunFolder) -> None:
    """Check that what a run keeps can lie where it does.

    Raises:
        UserError: A tracker wants a data base in the run folder, and that is no folder.
    """
    if folder.copy is not None and "mlflow" in experiment.shared.track and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            f"track: mlflow keeps a data base in the run folder, which {folder.where} cannot hold; set "
            "MLFLOW_TRACKING_URI to a server, or leave it out"
        )


def _report(folder: RunFolder, experiment: Experiment, shrink: Shrinker) -> Reported:
    try:
        return Reported(write_report(folder, experiment, shrink=shrink))
    except Exception as error:  # whatever is wrong with a page, the run has ended well
        logger.debug("the report could not be written", exc_info=True)
        return Reported(folder.report_file, f"{type(error).__name__}: {error}")


def _check_stays(storage: str | Path) -> None:
    """Check that a run is not written where Ray unpacks the files of a submitted job.

    Raises:
        UserError: It would go away with the job.
    """
    if not is_address(storage) and {"runtime_resources", "working_dir_files"} <= set(Path(storage).resolve().parts):
        raise UserError(
            f"--storage: {str(storage)!r} is in the folder that Ray unpacks a submitted job into and deletes with it, "
            "so that no run could be resumed or fetched; name one that stays, and that all nodes share"
        )


def _check_decided(known: Plan) -> None:
    """Check that a run can be recorded: what it leaves open must not depend on when the model is there.

    Raises:
        UserError: It leaves open what is the model's own, and nobody here knows that.
    """
    if known.undecided:
        base = known.experiment.shared.model.base
        raise UserError(
            f"{', '.join(known.undecided)}: the model's own, and the files of {base!r} are not here to say them; "
            f"write them, or run 'rltune models fetch {base}'"
        )


def _run(planned: Plan, cluster: Cluster, notify: Notify, display: Display, shrink: Shrinker) -> tuple[Found, "Sweep"]:
    from rltune.orchestration.sweep import Sweep  # ray, which a plan does without

    folder = planned.folder
    sweep = Sweep(planned, cluster)
    trials, experiment = sweep.trials, sweep.experiment
    planned = replace(planned, experiment=experiment)
    num_ended = sum(result.trial != BASE_TRIAL for result in trials.results)
    notify(Planned(planned, cluster, num_ended, trials.num_left, is_resumed=bool(trials.results)))
    with display(folder, experiment), kept_current(folder, experiment, shrink), exported(folder, experiment):
        sweep.run()
    notify(Trained(planned, trials.num_left, trials.over))
    if trials.num_left and not trials.over:
        raise KeyboardInterrupt
    if trials.chosen and experiment.shared.evaluate.confirm != 0:
        notify(Confirming())
        try:
            sweep.confirm()
            if mixtures := sweep.mixtures:
                num_soups, num_points = sum(row.is_soup for row in mixtures), sum(bool(row.mix) for row in mixtures)
                notify(Mixing(num_soups, len(mixtures) - num_soups - num_points, num_points))
                sweep.mix(mixtures)
        except RunError as error:  # the search stands without it
            notify(NotConfirmed(str(error)))
    front = trials.front()
    trained = [result for result in trials.results if result.is_ok and result.trial != BASE_TRIAL]
    if front is None or not trained:
        raise RunError(f"no trial of {folder.where} ended well; the reasons are in {folder.results_file}")
    single = None if experiment.is_searched else trials.measured(trained[0])
    picks = best_picks(front) if single is None else [single.result]
    found = Found(folder, experiment, front, single, tuple(picks), trials.nearest)
    notify(found)
    return found, sweep
