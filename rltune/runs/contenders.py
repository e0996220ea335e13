"""Runs that are to be compared: what each has, and whether what they measured compares."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from rltune.config.load import Experiment
from rltune.errors import UserError
from rltune.runs.base_scores import load_scores
from rltune.runs.confirmations import Confirmation, comparable, confirmed_front, read_confirmations
from rltune.runs.fronts import checked, search_front
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.objectives import Front
from rltune.runs.record import Record, base_folder, read_record, read_run
from rltune.runs.results import read_results


@dataclass(frozen=True)
class Contender:
    """A run with what a comparison looks at."""

    path: Path
    experiment: Experiment
    record: Record
    front: Front
    """By the numbers of the search."""
    fresh: Front | None
    """By those of single fresh prompts; None where there are none."""
    confirmations: Sequence[Confirmation]
    num_trials: int
    """Trials that ended, the base model not counted."""

    @property
    def fresh_prompts(self) -> tuple[str, ...]:
        """What it was measured on again; none where it was not."""
        found = comparable(self.confirmations)
        return () if found is None or self.fresh is None else tuple(found.base.prompts)


def read_contender(path: Path, objectives: Sequence[str], *, like: Contender | None = None) -> Contender:
    """Return what a comparison looks at.

    Args:
        path: A run folder.
        objectives: What its front is over; its own if left out.
        like: Another run, whose order objectives have where they are the same.

    Raises:
        UserError: There is no run at ``path``, it is of an old version, its base model has no result yet, or an
            objective was not measured.
        RunError: Its record cannot be read.
    """
    folder, experiment = read_run(path)
    record = read_record(folder)
    if record is None:
        raise UserError(f"{path}: an older rltune started it and noted no prompts, so it compares with nothing")
    reference, results = load_scores(base_folder(folder, record)), read_results(folder.results_file)
    names = checked(objectives, reference) if reference else ()
    if not names and like is not None and set(like.front.objectives.names) == set(experiment.shared.objective_names):
        names = like.front.objectives.names
    front = search_front(results, experiment, reference, objectives=names)
    if front is None:
        raise UserError(f"{path}: the base model has no result yet; see: rltune status {quote(str(path))}")
    confirmations = read_confirmations(folder)
    found = comparable(confirmations)
    has_values = found is not None and all(name in found.base.values for name in front.objectives.names)
    return Contender(
        path=path,
        experiment=experiment,
        record=record,
        front=front,
        fresh=confirmed_front(front, experiment, confirmations) if has_values else None,
        confirmations=confirmations,
        num_trials=sum(result.trial != BASE_TRIAL for result in results),
    )


def check_comparable(contenders: Sequence[Contender]) -> None:
    """Check that all were measured as the first was.

    Raises:
        UserError: Other objectives, prompts, sampler or base model.
    """
    first = contenders[0]
    for other in contenders[1:]:
        if faults := list(_faults(first, other)):
            raise UserError(
                f"{other.path}: does not compare with {first.path}: {'; '.join(faults)}; compare runs with the same "
                "objectives (--objectives names common ones), held-out prompts, sampler and base model"
            )


def _faults(first: Contender, other: Contender) -> Iterator[str]:
    """Say what was measured otherwise."""
    names, other_names = first.front.objectives.names, other.front.objectives.names
    if names != other_names:
        yield f"its objectives are {', '.join(other_names)} and not {', '.join(names)}"
    ours, theirs = (_measured_on(run.record, names) for run in (first, other))
    for what in dict.fromkeys((*ours, *theirs)):
        if ours.get(what) != theirs.get(what):
            is_digest = what in ("base model", "held-out prompts") or what.startswith("reward")
            values = "another" if is_digest else f"{theirs.get(what)} and not {ours.get(what)}"
            yield f"{what}: {values}"
    if first.fresh_prompts and other.fresh_prompts and first.fresh_prompts != other.fresh_prompts:
        yield f"fresh prompts: {len(other.fresh_prompts)}, others than its {len(first.fresh_prompts)}"


def _measured_on(record: Record, objectives: Sequence[str]) -> Mapping[str, Any]:
    """Return what decides the numbers of a front, by what it is called."""
    parts = record.base_settings
    evaluate = parts["evaluate"]
    about = {
        "base model": [parts["model"], parts.get("model_config"), parts.get("model_drop")],
        "task": parts.get("task", "text_to_image"),
        "held-out prompts": parts["prompts"]["eval"],
        "evaluate.prompts": evaluate["prompts"],
        "evaluate.images_per_prompt": evaluate["images_per_prompt"],
    }
    about |= {f"sampler.{name}": value for name, value in parts["sampler"].items()}
    for name in objectives:
        if name in parts["rewards"]:
            section = parts["rewards"][name]
            about[f"reward {name}"] = {**section, "reward": section["reward"] or name}
        settings = (f"rewards.{name}.reward", f"evaluate.judges.{name}")
        about[f"reward code of {name}"] = [parts["code"][setting] for setting in settings if setting in parts["code"]]
    return about
