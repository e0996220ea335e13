"""The Pareto front of a run, read from its folder, and in the forms that others read."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rltune.config.load import Experiment
from rltune.config.sections import JOINT_SHARES
from rltune.errors import UserError
from rltune.registry import suggest
from rltune.runs.base_scores import BaseScores, load_scores
from rltune.runs.confirmations import read_confirmations
from rltune.runs.filters import keep, parse_condition
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.mixtures import read_mixtures, reported_front
from rltune.runs.objectives import Front, Objectives, Soup, find_front
from rltune.runs.record import base_folder, read_record
from rltune.runs.results import TrialResult, read_results


def read_front(
    folder: RunFolder, experiment: Experiment, *, objectives: Sequence[str] = (), where: Sequence[str] = ()
) -> Front | None:
    """Return a run's front from its folder alone, or None while the base model has no result.

    It is by the fresh measurements of its members where all of them have one.

    Args:
        folder: The run.
        experiment: Its experiment.
        objectives: What the front is over, any rewards and judges that were measured; the experiment's if left out.
        where: Conditions on trials, such as ``diversity > 0.8``, by the numbers of the search; the others are left out.

    Raises:
        UserError: An objective or a condition names what was not measured.
    """
    reference = load_scores(base_folder(folder, read_record(folder)))
    if reference is None:
        return None
    results = read_results(folder.results_file)
    results = keep(results, [parse_condition(text, results) for text in where])
    front = search_front(results, experiment, reference, objectives=checked(objectives, reference))
    # a soup has no numbers of the search, so that it meets no condition on them
    return front and reported_front(
        front, experiment, read_confirmations(folder), [] if where else read_mixtures(folder)
    )


def checked(objectives: Sequence[str], reference: BaseScores) -> tuple[str, ...]:
    """Return objectives that a reader asks for.

    Raises:
        UserError: One was not measured, or is named twice.
    """
    for name in objectives:
        if name not in reference.values:
            raise UserError(f"--objectives: {name!r} was not measured; {suggest(name, tuple(reference.values))}")
        if objectives.count(name) > 1:
            raise UserError(f"--objectives: {name!r} is named twice; name each once")
    return tuple(objectives)


def search_front(
    results: Sequence[TrialResult],
    experiment: Experiment,
    reference: BaseScores | None,
    *,
    objectives: tuple[str, ...] = (),
) -> Front | None:
    """Return the front by the evaluations that trials were chosen by, or None while the base model has no result."""
    if reference is None:
        return None
    front = find_front(results, Objectives(objectives or experiment.shared.objective_names), reference.sizes)
    return front and replace(front, num_prompts=experiment.shared.evaluate.prompts, unit_words=reference.unit_words)


def front_as_dict(front: Front) -> dict[str, Any]:
    """Return the front in JSON's types.

    Members are trials (``kind`` is ``trial``, or ``base``) and, behind these, the soups that nothing has beaten; those
    that were are in ``soups_not_held``. What a soup is a mixture of is its ``soup``: trial -> weight.
    ``metrics`` of a member are what is reported; ``chosen_by`` those of the search, which differ where the front was
    ``is_measured_again``, and ``not_held`` says why it does not hold its place there; ``p_non_dominated`` is how
    probable it is that no other is better by its true values. Half widths are of 95 % intervals over prompts.
    ``hypervolume_of_search`` is by ``chosen_by``: what luck has raised.
    """
    fresh, soups = front.fresh, front.soups
    return {
        "objectives": {
            name: "maximize" if sign > 0 else "minimize"
            for name, sign in zip(front.objectives.names, front.objectives.signs_D, strict=True)
        },
        "units": {
            name: {"size": size, "what": front.unit_words.get(name, "")}
            for name, size in zip(front.objectives.names, front.unit_D.tolist(), strict=True)
        },
        "reference_point": dict(zip(front.objectives.names, front.reference_D.tolist(), strict=True)),
        "hypervolume": front.hypervolume,
        "hypervolume_half_width": fresh and fresh.half_width,
        "hypervolume_of_search": fresh.search_hypervolume if fresh else front.hypervolume,
        "hypervolume_without_effect": fresh and {"mean": 1.0, "half_width": fresh.half_width_without_effect},
        "hypervolume_with_soups": soups
        and {
            "mean": soups.hypervolume,
            "half_width": soups.half_width,
            "growth": soups.hypervolume - front.hypervolume,
            "growth_half_width": soups.growth_half_width,
        },
        "knee": front.knee.trial if front.knee else None,
        "best": {name: front.best(name).trial for name in front.objectives.names},
        "is_measured_again": fresh is not None,
        "prompts": front.num_prompts,
        "fresh_prompts": front.num_prompts - fresh.num_reused if fresh else 0,
        "members": [
            {
                "trial": member.trial,
                "kind": "base" if member.trial == BASE_TRIAL else "trial",
                "values": dict(member.values),
                "metrics": dict(member.metrics),
                "chosen_by": dict(chosen.metrics),
                "not_held": front.not_held.get(member.trial),
                "p_non_dominated": fresh and fresh.non_dominated.get(member.trial),
            }
            for member, chosen in zip(front.members, front.chosen, strict=True)
        ]
        + [_soup_as_dict(soup) for soup in (soups.members if soups else ())],
        "soups_not_held": [_soup_as_dict(soup) for soup in (soups.every if soups else ()) if soup.beaten],
    }


def _soup_as_dict(soup: Soup) -> dict[str, Any]:
    return {
        "trial": soup.name,
        "kind": soup.kind,
        "soup": dict(soup.weights),
        **({"mix": dict(soup.mix)} if soup.mix else {}),
        "values": {},
        "metrics": dict(soup.result.metrics),
        "chosen_by": None,
        "not_held": soup.beaten or None,
        "p_non_dominated": soup.non_dominated,
    }


def front_as_csv(front: Front) -> str:
    """Return the front as a table: trial, kind, objectives and gains over the base with errors, prompts, knobs.

    The soups of the front follow its trials; with any, a column says what they are mixtures of.
    Behind the objectives stand the shares of images that dominate or collapse, where they were measured, and how
    probable each place is, where members were measured again. Of a single prompt there are no standard errors.
    """
    paths = sorted({path for member in front.members for path in member.values})
    kinds = ("eval/{}", "eval/{}_se", "gain/{}", "gain/{}_se")
    columns = [kind.format(name) for name in front.objectives.names for kind in kinds]
    shares = [kind.format(name) for name in JOINT_SHARES for kind in kinds[:2]]
    columns += [column for column in shares if any(column in member.metrics for member in front.members)]
    columns = list(dict.fromkeys(columns))
    text = io.StringIO()
    writer = csv.writer(text)
    places = front.fresh.non_dominated if front.fresh else {}
    soups = front.soups.members if front.soups else ()
    head = ["trial", "kind", *(["soup"] if soups else []), *columns, *(["p_non_dominated"] if places else [])]
    writer.writerow([*head, "prompts", *paths])
    kinds_of = {soup.name: soup.kind for soup in soups} | {BASE_TRIAL: "base"}
    rows = [(member, "", places.get(member.trial, "")) for member in front.members]
    rows += [(soup.result, soup.recipe, "" if (p := soup.non_dominated) is None else p) for soup in soups]
    for member, recipe, probable in rows:
        kind = kinds_of.get(member.trial, "trial")
        metrics = [member.metrics.get(column, "") for column in columns]
        knobs = [member.values.get(path, "") for path in paths]
        about = [member.trial, kind, *([recipe] if soups else [])]
        writer.writerow([*about, *metrics, *([probable] if places else []), front.num_prompts, *knobs])
    return text.getvalue()
