"""``rltune sweep`` and ``rltune train``: print the plan, show the run, print what it found."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote

from rltune.cli.board import watch
from rltune.cli.front_table import front_view, gain_view, nothing_to_export
from rltune.cli.tables import status_view
from rltune.cli.terminal import console, errors, marked
from rltune.config.conditions import condition_in_words
from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment, load_experiment
from rltune.config.settings import NAME_PATTERN, NAME_RULE
from rltune.errors import UserError
from rltune.export.write import Exported
from rltune.orchestration.campaign import (
    Confirming,
    Event,
    Found,
    Mixing,
    NotConfirmed,
    Planned,
    Reported,
    Trained,
    check_kind,
    plan_run,
    run_campaign,
)
from rltune.orchestration.cluster import Cluster
from rltune.orchestration.inspection import Inputs, weights_in_words
from rltune.orchestration.known import known_names
from rltune.orchestration.memory_check import memory_in_words
from rltune.orchestration.plan import Plan
from rltune.orchestration.workload import Workload
from rltune.runs.record import is_written
from rltune.runs.status import read_status
from rltune.training.heldout import fresh_prompts
from rltune.training.prompts import cut_in_words, shortened


def run_experiment(
    path: Path,
    overrides: Sequence[str],
    *,
    address: str | None,
    name: str | None,
    storage: str | Path,
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
    check_kind(experiment, is_sweep=is_sweep)
    if dry_run:
        print_plan(*plan_run(experiment, storage=storage, address=address))
        return
    written: list[Path] = []
    reported: list[Path] = []
    here = Path.cwd()
    try:
        run_campaign(
            experiment, storage=storage, address=address, notify=_printing(here, written, reported), display=watch
        )
    finally:
        if written:
            console.print(
                f"\nSee it beside the base model:  rltune sample {quote(_shown(written[0], here))}", soft_wrap=True
            )
        for page in reported:
            console.print(
                f"{'' if written else chr(10)}All of it, to click on:        {_shown(page, here)}", soft_wrap=True
            )


def _printing(here: Path, written: list[Path], reported: list[Path]) -> Callable[[Event], None]:
    """Return what prints each stage; exported folders are added to ``written``, the page to ``reported``."""

    def show(event: Event) -> None:
        match event:
            case Planned():
                print_plan(event.plan, event.cluster)
                if event.is_resumed:
                    counts = f"{event.num_ended} trials have ended, {event.num_left} are left"
                    errors.print(f"resuming {event.plan.folder.where}: {counts}", soft_wrap=True)
            case Trained():
                _show_trained(event)
            case Confirming():
                errors.print("measuring what was chosen again on fresh prompts")
            case Mixing(num_soups, num_strengths, num_points):
                what = [(num_soups, "soups"), (num_strengths, "strengths"), (num_points, "points")]
                errors.print(f"measuring {' and '.join(f'{num} {name}' for num, name in what if num)} of its LoRAs")
            case NotConfirmed(why):
                errors.print(marked("warning", "yellow", why), soft_wrap=True)
            case Found():
                _show_found(event, here)
            case Reported(page, why_not):
                if why_not:
                    errors.print(marked("note", "yellow", f"{page} could not be written, {why_not}"), soft_wrap=True)
                else:
                    reported.append(page)
            case Exported():
                if not written:
                    console.print("\nExported", style="bold")
                written.append(event.folder)
                shown = _shown(event.folder, here)
                does = (
                    "draws what was measured" if event.format == "conditioning" else "loads in diffusers at weight 1.0"
                )
                console.print(f"{shown}  {does} ({event.proof})", soft_wrap=True)

    return show


def _show_trained(event: Trained) -> None:
    folder, experiment = event.plan.folder, event.plan.experiment
    table = status_view(read_status(folder, experiment), experiment.shared.objective_names)
    if event.num_left and not event.over:
        errors.print(table)
        errors.print(f"{event.num_left} trials are left; the same command resumes {folder.where}", soft_wrap=True)
        return
    console.print(table)
    if event.over:
        errors.print(f"ended with {event.num_left} trials left: {event.over}", soft_wrap=True)


def _show_found(found: Found, here: Path) -> None:
    if found.single is not None:
        console.print("\nGain over the base model", style="bold")
        console.print(gain_view(found.single))
        return
    console.print("\nPareto front", style="bold")
    console.print(front_view(found.front))
    if not found.picks:
        console.print(
            f"\n{nothing_to_export(found.front, found.nearest, _shown(found.folder.path, here))}", soft_wrap=True
        )


def _shown(path: Path, here: Path) -> str:
    """Return a path as short as it can be said from where the user stands."""
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _method(experiment: Experiment) -> str:
    config = experiment.shared
    name, k = (
        "searched" if path in experiment.space else value
        for path, value in (("estimator.name", config.estimator.name), ("estimator.k", config.estimator.k))
    )
    depth = "" if k is None else f", K {k}"
    name = "estimator searched" if name == "searched" else name
    steps = "" if config.sampler.steps is None else f", {config.sampler.steps} sampling steps"
    if not any(kind.num_rounds for kind in experiment.kinds):
        name, depth = "words alone", ""
    return f"{name} on the {config.model.base} model{steps}{depth}"


def _sampler(plan: Plan) -> str:
    """Say how images are drawn, and what of it is the model's own, decided or not."""
    section, space = plan.experiment.shared.sampler, plan.experiment.space
    given = {
        "steps": section.steps,
        "guidance": section.guidance,
        "embedded_guidance": section.embedded_guidance,
        "eta": section.eta,
        "rule": None if section.rule == "posterior" else section.rule,
        "negative": repr(section.negative) if section.negative else None,
    }
    given |= {name: "searched" for name in given if f"sampler.{name}" in space}
    parts = [
        f"{name} {value:g}" if isinstance(value, float | int) else f"{name} {value}"
        for name, value in given.items()
        if value is not None
    ]
    own = [
        path.removeprefix("sampler.") for path in plan.experiment.defaults if not is_written(path, plan.experiment.raw)
    ]
    parts += [f"of which {', '.join(own)} the model's own"] if own else []
    if open_names := [path.removeprefix("sampler.") for path in plan.undecided]:
        parts.append(f"{', '.join(open_names)} the model's own, decided when its files are on this machine")
    return ", ".join(parts)


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
    more = [
        name for name, is_asked in (("soups", config.sweep.soup), ("strengths", config.sweep.strengths)) if is_asked
    ]
    then = f", then {' and '.join(more)} of its best LoRAs" if more and experiment.is_searched else ""
    if not fresh.num_reused:
        return f"{what} measured again on {len(fresh.prompts)} fresh prompts{then}"
    return (
        f"{what} measured again with fresh noise, but on the same {len(fresh.prompts)} prompts: prompts.eval holds too "
        f"few others, so luck with prompts stays in{then}"
    )


def _training(work: Workload) -> str:
    return f"{work.num_steps} steps of {work.images_per_step} images, " if work.num_steps else ""


def _workers(work: Workload) -> str:
    fewest = f"{work.min_workers} to " if work.min_workers < work.num_workers else ""
    many = "s" if work.num_workers > 1 else ""
    return f"{fewest}{work.num_workers} worker{many} with {work.worker}{' each' if many else ''}"


def _nodes(work: Workload, cluster: Cluster) -> str:
    there = f"{work.num_nodes} of " if work.num_nodes < cluster.num_nodes else ""
    more = ", and those that its autoscaler brings" if work.is_growing else ""
    return f"{there}{cluster.num_nodes} nodes{more}"


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


def _memory(plan: Plan) -> dict[str, str]:
    """Say what a worker will take of memory; nothing where the base model is not on this machine."""
    if plan.memory is None:
        return {}
    where = "GPU" if plan.workload.num_gpus_per_worker else "worker"
    how = [
        text
        for text, is_so in (
            ("blocks in checkpoints", plan.memory.has_blocks),
            ("decoded in tiles", plan.memory.is_tiled),
        )
        if is_so
    ]
    return {"memory": "; ".join([f"about {memory_in_words(plan.memory)} a {where} at the most", *how])}


def _duration(plan: Plan) -> dict[str, str]:
    """Say how long it may take; nothing where that is not known."""
    if plan.duration is None:
        return {}
    (step_low, step_high), (low, high) = plan.duration.step_s, plan.duration.total_s
    step = f"{step_low:.2g} to {step_high:.2g} s a step, " if plan.workload.num_steps else ""
    return {
        "time": f"{step}{_roughly(low)} to {_roughly(high)} in all, from what "
        "networks compute and how fast this CPU multiplies; rewards are not counted"
    }


def _roughly(seconds: float) -> str:
    """Return a time of which the size alone is known: ``4 min``, ``2.5 h``."""
    return f"{max(1, round(seconds / 60))} min" if seconds < 3600 else f"{seconds / 3600:.2g} h"


def print_plan(plan: Plan, cluster: Cluster | None) -> None:
    """Print a plan, one fact a line."""
    experiment, work, inputs = plan.experiment, plan.workload, plan.inputs
    config = experiment.shared
    where = "a Ray cluster on this machine (loopback only)" if cluster is None or cluster.is_own else cluster.address
    lines = {
        "experiment": config.name,
        "method": _method(experiment),
        "sampler": _sampler(plan),
        "rewards": _rewards(experiment),
        **_prompts(experiment, inputs),
        "searched": _searched(experiment),
        "trials": f"the base model and {work.num_trials} {'trained' if work.num_steps else 'more'}, "
        f"{work.num_concurrent} at a time",
        "a trial": f"{_training(work)}{work.num_evaluations} evaluation{'s' if work.num_evaluations > 1 else ''} of "
        f"{work.images_per_evaluation}; {_workers(work)}",
        "images": f"{work.num_images:,} in all",
        **_memory(plan),
        **_duration(plan),
        "objectives": ", ".join(config.objective_names),
        "runs on": where
        if cluster is None or (cluster.num_nodes == 1 and not work.is_growing)
        else f"{where}, {_nodes(work, cluster)}",
    }
    if plan.folder.copy is not None:
        lines["lies at"] = plan.folder.where
    if confirmed := _confirmed(experiment):
        lines["at the end"] = confirmed
    if first := _first_trials(config):
        lines["first"] = first
    if inputs.notes:
        lines["note"] = "; ".join(inputs.notes)
    if inputs.missing:
        lines["weights"] = weights_in_words(inputs.missing)
    if cluster is not None and cluster.dashboard_url:
        lines["dashboard"] = cluster.dashboard_url
    for label, text in lines.items():
        errors.print(marked(f"{label:>11} ", "dim", text), soft_wrap=True)
