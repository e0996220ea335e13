"""What a run found, as tables: its front, and the gains of a single training."""

from collections.abc import Mapping, Sequence
from shlex import quote

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rltune.cli.tables import BREACH_MARK, FittedTable, format_value, short_labels
from rltune.config.sections import JOINT_SHARES
from rltune.intervals import half_width
from rltune.runs.confirmations import Measured
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.metrics import OVER_PROMPTS
from rltune.runs.objectives import Front
from rltune.runs.results import TrialResult

BEATEN_MARK = "~"
PROBABILITY = "P(non-dominated)"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def front_view(front: Front, *, where: Sequence[str] = ()) -> RenderableType:
    """Return the front as a table, with what it was measured on, who does not hold its place, and its hypervolume.

    Settings that do not fit beside the objectives stand below them. ``where`` are the conditions that trials meet.
    """
    paths = list(dict.fromkeys(path for member in front.members for path in member.values))
    asked = [f"Of the trials with {', '.join(where)} in the search."] if where else []
    parts = [
        *asked,
        *_measured(front),
        *_marked(front),
        *_of_places(front),
        *_of_shares(front),
        _volume(front),
        *_of_soups(front),
    ]
    notes = Text(" ".join(parts), style="dim")
    table = FittedTable(
        lambda shown: _front_table_with(shown, front), paths, below=lambda shown: _settings_table_with(shown, front)
    )
    trust: list[RenderableType] = [Text(), _trust_table(front)] if _places(front) or _has_shares(front) else []
    return Group(table, *trust, *(_soup_tables(front) if front.soups else []), notes)


def _places(front: Front) -> Mapping[str, float]:
    return front.fresh.non_dominated if front.fresh else {}


def _has_shares(front: Front) -> bool:
    return any(f"eval/{name}" in member.metrics for member in front.members for name in JOINT_SHARES)


def _trust_table(front: Front) -> Table:
    """Return how probable each place is, and the shares of images that beat the base model's or fall behind."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    places, shares = _places(front), JOINT_SHARES if _has_shares(front) else ()
    table.add_column("trial")
    for name in [*([PROBABILITY] if places else []), *shares]:
        table.add_column(name, justify="right")
    for member in front.members:
        if member.trial != BASE_TRIAL:
            is_knee = front.knee is not None and member.trial == front.knee.trial
            place = [_probability(places.get(member.trial))] if places else []
            cells = (_share(member, name, front.num_prompts) for name in shares)
            table.add_row(member.trial, *place, *cells, style="bold" if is_knee else None)
    return table


def _soup_tables(front: Front) -> list[RenderableType]:
    """Return the soups of the front with what they measured, and what they are mixtures of."""
    soups = front.soups.members if front.soups else ()
    measured, made = (Table(box=None, pad_edge=False, header_style="dim") for _ in range(2))
    for table in (measured, made):
        table.add_column("soup" if any(soup.kind == "soup" for soup in soups) else "basis")
    for name in front.objectives.names:
        measured.add_column(name, justify="right")
    made.add_column("of trials")
    made.add_column(PROBABILITY, justify="right")
    for soup in soups:
        objectives = (_front_objective(soup.result, name, front.num_prompts) for name in front.objectives.names)
        measured.add_row(soup.name, *objectives)
        made.add_row(soup.name, soup.recipe, _probability(soup.non_dominated))
    return [Text(), measured, Text(), made] if soups else []


def _of_soups(front: Front) -> list[str]:
    """Say what soups are, how many were measured, and what they add to the front."""
    soups = front.soups
    if soups is None:
        return []
    num = len(soups.members)
    of_them = f"{num} of them are on the front" if num != 1 else "one of them is on the front"
    half = "" if soups.growth_half_width is None else f" {PLUS_MINUS} {soups.growth_half_width:.2g}"
    growth = soups.hypervolume - front.hypervolume
    return [
        f"{soups.words}; {of_them}, by the numbers shown, so luck has "
        f"raised these. With all of them the hypervolume is {soups.hypervolume:.4g}, {growth:+.2g}{half}."
    ]


def _probability(value: float | None) -> str:
    """Return a probability; draws are too few to tell 0.999 from 1."""
    return "" if value is None else ">0.99" if value > 0.99 else "<0.01" if value < 0.01 else f"{value:.2f}"


def _share(member: TrialResult, name: str, num_prompts: int) -> str:
    value = member.metrics.get(f"eval/{name}")
    if value is None:
        return ""
    half = half_width(member.metrics.get(f"eval/{name}_se"), num_prompts - 1)
    return f"{value:.3f}{PLUS_MINUS}{half:.3f}" if half else f"{value:.3f}"  # all prompts alike: no error is known


def _of_places(front: Front) -> list[str]:
    if not _places(front):
        return []
    words = "how probable it is that no other member, nor the base model, is as good in every objective"
    return [f"{PROBABILITY}: {words}."]


def _of_shares(front: Front) -> list[str]:
    if not _has_shares(front):
        return []
    words = "shares of images that are better, and worse, than the base model's of the same noise in every objective"
    return [f"domination and collapse: {words} of the run that scores single images."]


def _measured(front: Front) -> list[str]:
    """Say what the numbers were measured on, and what the interval is."""
    fresh, num = front.fresh, front.num_prompts
    interval = f", with its 95 % interval over {num} prompts" if num > 1 else ""
    parts = [f"Beside each value the gain over the base model, paired by prompt and noise{interval}."]
    by_search = "Members, their order and the knee are by the numbers of the search."
    if fresh is not None and fresh.num_reused:
        what = f"Measured again with fresh noise, but on the {fresh.num_reused} prompts that trials were chosen by"
        parts.append(f"{what}, since prompts.eval holds too few others: luck with prompts has raised it. {by_search}")
    elif fresh is not None:
        parts.append(f"Measured again on {num} prompts, and noise, that no trial was chosen by. {by_search}")
    elif front.num_candidates > 1:
        parts.append(
            f"Members were chosen from {front.num_candidates} trials by these very numbers: luck has raised them."
        )
    return parts


def _marked(front: Front) -> list[str]:
    """Say who breaks a constraint or does not hold its place, if anyone."""
    broken = {member.trial: _breaches(member) for member in front.members if not member.is_feasible}
    beaten = {trial: why for trial, why in front.not_held.items() if trial not in broken}
    parts = []
    if broken:
        listed = ", ".join(f"{trial} ({why})" for trial, why in broken.items())
        parts.append(f"{BREACH_MARK} breaks a constraint, so it is neither picked nor counted: {listed}.")
    if beaten:
        listed = ", ".join(f"{trial} ({why})" for trial, why in beaten.items())
        parts.append(f"{BEATEN_MARK} does not hold its place on them: {listed}.")
    return parts


def _breaches(result: TrialResult) -> str:
    return ", ".join(f"{name} by {bad:.3g}" for name, bad in result.constraints.items() if bad > 0)


def _volume(front: Front) -> str:
    reference = ", ".join(
        f"{name} {value:.3f}" for name, value in zip(front.objectives.names, front.reference_D, strict=True)
    )
    fresh = front.fresh
    half = "" if fresh is None or fresh.half_width is None else f" {PLUS_MINUS} {fresh.half_width:.2g}"
    null = "the base model alone has 1"
    if fresh is not None and fresh.half_width_without_effect is not None:
        null = f"without any effect it would be 1 {PLUS_MINUS} {fresh.half_width_without_effect:.2g}"
    if not any(member.is_feasible for member in front.members):
        null = "what breaks a constraint covers nothing"
    luck = ""
    if fresh is not None and fresh.search_hypervolume is not None:
        luck = f" By the numbers that chose its members, which luck raises, it was {fresh.search_hypervolume:.4g}."
    return (
        f"Hypervolume {front.hypervolume:.4g}{half}, in {_units(front)}, from the reference point {reference} "
        f"(the base model minus one of them); {null}.{luck}"
    )


def _units(front: Front) -> str:
    """Say what objectives are counted in."""
    others = {name: what for name, what in front.unit_words.items() if name in front.objectives.names}
    others = {name: what for name, what in others.items() if what != OVER_PROMPTS}
    usual = "standard deviations of the base model"
    listed = ", ".join(f"{name}: {what}" for name, what in others.items())
    return f"{usual} over prompts" + (f" (but of {listed})" if others else "")


def _front_table_with(paths: Sequence[str], front: Front) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("trial")
    for name in front.objectives.names:
        table.add_column(name, justify="right")
    for label in short_labels(paths):
        table.add_column(label, justify="right", style="dim")
    for member in front.members:
        is_knee = front.knee is not None and member.trial == front.knee.trial
        is_beaten = member.trial in front.not_held
        mark = BREACH_MARK if not member.is_feasible else BEATEN_MARK if is_beaten else ""
        table.add_row(
            f"{mark} knee".strip() if is_knee else mark,
            f"{member.trial} base" if member.trial == BASE_TRIAL else member.trial,
            *(_front_objective(member, name, front.num_prompts) for name in front.objectives.names),
            *(format_value(member.values.get(path, "")) for path in paths),
            style="bold" if is_knee else None,
        )
    return table


def _settings_table_with(paths: Sequence[str], front: Front) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("trial")
    for label in short_labels(paths):
        table.add_column(label, justify="right")
    for member in front.members:
        if member.values:
            is_knee = front.knee is not None and member.trial == front.knee.trial
            values = (format_value(member.values.get(path, "")) for path in paths)
            table.add_row(member.trial, *values, style="bold" if is_knee else None)
    return table


def _front_objective(member: TrialResult, name: str, num_prompts: int) -> str:
    value = f"{member.metrics[f'eval/{name}']:.3f}"
    if member.trial == BASE_TRIAL:
        return value
    half = _half_width(member, name, num_prompts)
    interval = "" if half is None else f"{PLUS_MINUS}{half:.3f}"
    return f"{value} {member.metrics[f'gain/{name}']:+.3f}{interval}"  # short: three objectives must fit 80 columns


def _half_width(result: TrialResult, name: str, num_prompts: int) -> float | None:
    """Return half the width of the interval of a gain; None of a single prompt."""
    return half_width(result.metrics.get(f"gain/{name}_se", 0.0), num_prompts - 1)


def nothing_to_export(front: Front, closest: TrialResult | None, run: str) -> str:
    """Return why no LoRA of a sweep is exported, and the command that exports one all the same."""
    if closest is None:
        return "Nothing is exported: no trial ended well."
    if front.num_candidates == 0:
        why = f"no trial keeps every constraint; trial {closest.trial} is the nearest, it breaks {_breaches(closest)}"
    elif any(member.trial != BASE_TRIAL for member in front.members):
        why = "no member of the front keeps every constraint on fresh prompts"
        closest = next(member for member in front.members if member.trial != BASE_TRIAL)
    else:
        why = "no trial is better than the base model in any objective"
    return f"Nothing is exported: {why}. To have it all the same: rltune export {quote(run)} --pick {closest.trial}"


def gain_view(measured: Measured) -> RenderableType:
    """Return what a trial gained over the base model in every reward and judge, with intervals over the prompts."""
    result, num_prompts = measured.result, measured.num_prompts
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("held-out prompts")
    for label in ("base", "trained", "gain"):
        table.add_column(label, justify="right")
    for key, gain in result.metrics.items():
        kind, _, name = key.partition("/")
        if kind != "gain" or name.endswith("_se"):
            continue
        value, half = result.metrics[f"eval/{name}"], _half_width(result, name, num_prompts)
        table.add_row(
            name,
            f"{value - gain:.3f}",
            f"{value:.3f}",
            f"{gain:+.3f}" if half is None else f"{gain:+.3f} {PLUS_MINUS} {half:.3f}",
            style="bold" if half is not None and abs(gain) > half else None,
        )
    return Group(table, Text(" ".join(_gain_notes(measured)), style="dim"))


def _gain_notes(measured: Measured) -> list[str]:
    num, reused, result = measured.num_prompts, measured.num_reused, measured.result
    if num < 2:
        parts = ["Of a single prompt there is no interval: evaluate.prompts asks for more."]
    else:
        parts = [
            f"{PLUS_MINUS} is a 95 % interval over the {num} prompts, paired: same prompts and noise. "
            "Bold where it excludes zero."
        ]
    if reused == 0:
        by = "the checkpoint was selected by others" if measured.is_selected else "nothing was selected by them"
        parts.append(f"They are fresh: {by}.")
    elif reused and measured.is_selected:
        what = "The noise is fresh, but the checkpoint was selected by these prompts, since prompts.eval holds too few"
        parts.append(f"{what} others: luck with prompts has raised it.")
    elif measured.is_selected and reused is None:
        parts.append("The checkpoint was selected by these very numbers: luck has raised them.")
    if not result.is_feasible:
        parts.append(f"{BREACH_MARK} It breaks a constraint: {_breaches(result)}.")
    return parts
