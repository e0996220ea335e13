"""``rltune sweep`` and ``rltune train``: print the plan, run it, show it, export what it found."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rltune.cli.board import watch
from rltune.cli.tables import front_view, gain_view, nothing_to_export, status_view
from rltune.cli.terminal import console, errors, marked
from rltune.config.conditions import condition_in_words
from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment, load_experiment
from rltune.config.rules import Known
from rltune.config.settings import NAME_PATTERN, NAME_RULE
from rltune.errors import RunError, UserError, writing
from rltune.orchestration.cluster import Cluster, connect, find_address
from rltune.orchestration.job import quiet_libraries
from rltune.orchestration.nodes import Node
from rltune.orchestration.plan import Plan, make_plan
from rltune.orchestration.preflight import Inputs, inspect_experiment, weights_in_words
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.record import standing_where_started
from rltune.training.heldout import fresh_prompts
from rltune.training.prompts import cut_in_words, shortened

if TYPE_CHECKING:
    from rltune.orchestration.sweep import Sweep
    from rltune.runs.results import TrialResult


def run_experiment(
    path: Path,
    overrides: Sequence[str],
    *,
    address: str | None,
    name: str | None,
    storage: Path,
    dry_run: bool,
    is_sweep: bool,
) -> None:
    """Run or resume an experiment, or print its plan.

    Raises:
        UserError: The experiment, the cluster or the run folder does not allow it; nothing was started.
        RunError: The base model could not be measured, or no trial ended well.
        KeyboardInterrupt: It was interrupted; the same call resumes.
    """
    if name is not None:
        if not re.fullmatch(NAME_PATTERN, name):
            raise UserError(f"--name: must be {NAME_RULE}, got {name!r}")
        overrides = [*overrides, f"name={json.dumps(name)}"]
    experiment = load_experiment(path, overrides, known_names(), must_find_files=False)
    folder = RunFolder(storage / experiment.shared.name)
    if is_sweep and not experiment.is_searched:
        raise UserError(
            f"{path}: every value is fixed, there is nothing to search; run: rltune train {quote(str(path))}"
        )
    if not is_sweep and experiment.is_searched:
        raise UserError(
            f"{path}: {', '.join(experiment.space)} are distributions; "
            f"fix each with --set, or run: rltune sweep {quote(str(path))}"
        )
    here = Path.cwd()
    with standing_where_started(folder):
        inputs = inspect_experiment(experiment, folder, is_attached=find_address(address) is not None)
        if dry_run:
            _print_plan(experiment, address, inputs)
            return
        with folder.lock(), writing(folder.path), connect(address) as cluster:
            _run(experiment, folder, cluster, here, inputs)


def known_names() -> Known:
    """Return every name that an experiment may use."""
    from rltune.estimators.base import ESTIMATORS
    from rltune.rewards.base import REWARDS, compares_group, has_gradient
    from rltune.runs.metrics import JUDGES
    from rltune.search.searcher import SAMPLERS

    estimators = {name: ESTIMATORS.get(name) for name in ESTIMATORS.names()}
    return Known(
        rewards=REWARDS.names(),
        estimators=tuple(estimators),
        judges=tuple(JUDGES),
        samplers=SAMPLERS,
        group_rewards=tuple(name for name in REWARDS.names() if compares_group(name)),
        rewards_without_gradient=tuple(name for name in REWARDS.names() if not has_gradient(name)),
        policy_estimators=tuple(name for name, kind in estimators.items() if not getattr(kind, "needs_gradient", True)),
        serial_estimators=tuple(name for name, kind in estimators.items() if getattr(kind, "has_serial_mode", False)),
    )


def _run(experiment: Experiment, folder: RunFolder, cluster: Cluster, here: Path, inputs: Inputs) -> None:
    from rltune.export.picks import best_picks
    from rltune.orchestration.sweep import Sweep
    from rltune.runs.status import read_status

    sweep = Sweep(experiment, folder, cluster)
    experiment = sweep.experiment
    print_plan(experiment, sweep.plan, cluster, inputs)
    if sweep.results:
        ended = sum(result.trial != BASE_TRIAL for result in sweep.results)
        errors.print(f"resuming {folder.path}: {ended} trials have ended, {sweep.num_left} are left", soft_wrap=True)
    with watch(folder, experiment):
        sweep.run()
    table = status_view(read_status(folder, experiment), experiment.shared.objective_names)
    if sweep.num_left and not sweep.over:
        errors.print(table)
        errors.print(f"{sweep.num_left} trials are left; the same command resumes {folder.path}", soft_wrap=True)
        raise KeyboardInterrupt
    console.print(table)
    if sweep.over:
        errors.print(f"ended with {sweep.num_left} trials left: {sweep.over}", soft_wrap=True)
    if sweep.chosen and experiment.shared.evaluate.confirm != 0:
        _confirm(sweep)
    front = sweep.front()
    trained = [result for result in sweep.results if result.is_ok and result.trial != BASE_TRIAL]
    if front is None or not trained:
        raise RunError(f"no trial of {folder.path} ended well; the reasons are in {folder.results_file}")
    if experiment.is_searched:
        console.print("\nPareto front", style="bold")
        console.print(front_view(front))
        picks = best_picks(front)
        if not picks:
            console.print(f"\n{nothing_to_export(front, sweep.nearest, _shown(folder.path, here))}", soft_wrap=True)
            return
    else:
        console.print("\nGain over the base model", style="bold")
        found = sweep.measured(trained[0])
        console.print(gain_view(found))
        picks = [found.result]
    console.print("\nExported", style="bold")
    quiet_libraries()
    _export(picks, folder, experiment, here)


def _export(picks: Sequence["TrialResult"], folder: RunFolder, experiment: Experiment, here: Path) -> None:
    from rltune.export.picks import Exported, export_trials

    written: list[Path] = []

    def show(exported: Exported) -> None:
        written.append(exported.folder)
        console.print(
            f"{_shown(exported.folder, here)}  loads in diffusers at weight 1.0 ({exported.proof})",
            soft_wrap=True,
        )

    try:
        export_trials(picks, folder, experiment, on_export=show)
    finally:
        if written:
            console.print(
                f"\nSee it beside the base model:  rltune sample {quote(_shown(written[0], here))}", soft_wrap=True
            )


def _confirm(sweep: "Sweep") -> None:
    errors.print("measuring what was chosen again on fresh prompts")
    try:
        sweep.confirm()
    except RunError as error:  # the search stands without it
        errors.print(marked("warning", "yellow", str(error)), soft_wrap=True)


def _shown(path: Path, here: Path) -> str:
    """Return a path as short as it can be said from where the user stands."""
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _print_plan(experiment: Experiment, address: str | None, inputs: Inputs) -> None:
    """Print what a run would do, for the cluster if one is there and for this machine if not; starts nothing."""
    import torch

    if find_address(address) is not None:
        with connect(address) as cluster:
            print_plan(experiment, make_plan(experiment, cluster.nodes), cluster, inputs)
        return
    here = Node(float(os.cpu_count() or 1), float(torch.cuda.device_count()), accelerators=None)
    print_plan(experiment, make_plan(experiment, [here]), None, inputs)


def _method(experiment: Experiment) -> str:
    config = experiment.shared
    name, k = (
        "searched" if path in experiment.space else value
        for path, value in (("estimator.name", config.estimator.name), ("estimator.k", config.estimator.k))
    )
    depth = "" if k is None else f", K {k}"
    name = "estimator searched" if name == "searched" else name
    return f"{name} on the {config.model.base} model, {config.sampler.steps} sampling steps{depth}"


def _rewards(experiment: Experiment) -> str:
    config, space = experiment.shared, experiment.space
    parts = []
    for name, section in config.rewards.items():
        weight = "searched" if f"rewards.{name}.weight" in space else f"{section.weight:g}"
        what = "" if section.reward is None else f" ({section.reward})"
        parts.append(f"{name}{what} {weight}")
    method = "searched" if "mixture.method" in space else config.mixture.method
    how = "" if method == "sum" else f"; mixture {method}"
    return f"{', '.join(parts)}{how}"


def _searched(experiment: Experiment) -> str:
    """Say what is searched, and where, if not always."""
    parts = [f"{path} {condition_in_words(kind)}".rstrip() for path, kind in experiment.space.items()]
    return ("; " if experiment.is_conditional else ", ").join(parts) or "nothing"


def _first_trials(config: RunConfig) -> str:
    """Say what the search starts from; empty if from nothing."""
    search = config.search
    parts = [f"{len(search.points)} point(s) of the file"] if search.points else []
    parts += [f"the trials of {search.warm_start}"] if search.warm_start else []
    return " and ".join(parts)


def _confirmed(experiment: Experiment) -> str:
    """Say what chosen trials are measured on again; empty if nothing is chosen, or its prompts cannot be read here."""
    config = experiment.shared
    if config.evaluate.confirm == 0 or not (experiment.is_searched or config.evaluate.select != "last"):
        return ""
    try:
        fresh = fresh_prompts(config)
    except UserError:  # told of elsewhere
        return ""
    what = "the front" if experiment.is_searched else "the selected checkpoint"
    if not fresh.num_reused:
        return f"{what} measured again on {len(fresh.prompts)} fresh prompts"
    return (
        f"{what} measured again with fresh noise, but on the same {len(fresh.prompts)} prompts: prompts.eval holds too "
        "few others, so luck with prompts stays in"
    )


def _workers(plan: Plan) -> str:
    fewest = f"{plan.min_workers} to " if plan.min_workers < plan.num_workers else ""
    many = "s" if plan.num_workers > 1 else ""
    return f"{fewest}{plan.num_workers} worker{many} with {plan.worker}{' each' if many else ''}"


def _nodes(plan: Plan, cluster: Cluster) -> str:
    return (
        f"{plan.num_nodes} of {cluster.num_nodes} nodes"
        if plan.num_nodes < cluster.num_nodes
        else f"{plan.num_nodes} nodes"
    )


def _prompts(experiment: Experiment, inputs: Inputs) -> dict[str, str]:
    """Say of each prompt set how many prompts were read and how, and the first of them."""
    config, lines = experiment.shared, {}
    for label, where, source in (
        ("prompts", "prompts.train", config.prompts.train),
        ("held out", "prompts.eval", config.prompts.eval),
    ):
        found = inputs.prompts[where]
        name = source if isinstance(source, str) else "written out"
        name = f"searched, {name} among others" if where in experiment.space else name
        used = f", {config.evaluate.prompts} used" if where == "prompts.eval" else ""
        how = "; ".join([name, *found.notes])
        lines[label] = f"{len(found.prompts)} ({how}){used}, the first {shortened(found.prompts[0])}"
    if inputs.cut:
        named = [prompt for found in inputs.prompts.values() for prompt in found.prompts]
        lines["cut"] = cut_in_words(inputs.cut, named)
    return lines


def print_plan(experiment: Experiment, plan: Plan, cluster: Cluster | None, inputs: Inputs) -> None:
    """Print a plan, one fact a line."""
    config = experiment.shared
    where = "a Ray cluster on this machine (loopback only)" if cluster is None or cluster.is_own else cluster.address
    lines = {
        "experiment": config.name,
        "method": _method(experiment),
        "rewards": _rewards(experiment),
        **_prompts(experiment, inputs),
        "searched": _searched(experiment),
        "trials": f"the base model and {plan.num_trials} trained, {plan.num_concurrent} at a time",
        "a trial": f"{plan.num_steps} steps of {plan.images_per_step} images, {plan.num_evaluations} evaluations of "
        f"{plan.images_per_evaluation}; {_workers(plan)}",
        "images": f"{plan.num_images:,} in all",
        "objectives": ", ".join(config.objective_names),
        "runs on": where if cluster is None or cluster.num_nodes == 1 else f"{where}, {_nodes(plan, cluster)}",
    }
    if confirmed := _confirmed(experiment):
        lines["at the end"] = confirmed
    if first := _first_trials(config):
        lines["first"] = first
    if inputs.missing:
        lines["weights"] = weights_in_words(inputs.missing)
    if cluster is not None and cluster.dashboard_url:
        lines["dashboard"] = cluster.dashboard_url
    for label, text in lines.items():
        errors.print(marked(f"{label:>11} ", "dim", text), soft_wrap=True)
