"""The sections of a report, each from what was gathered to markup; one that has nothing to show is left out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote

from rltune.report.drawing import Dot, Drawing, Line, to_svg
from rltune.report.figures import CROWDED, Figure, front_figures, growth_figures, importance_figures, judge_figures
from rltune.report.gather import Gain, Gathered
from rltune.report.growth import Growth
from rltune.report.hacking import RULE, judges
from rltune.report.importance import FEWEST, Importance
from rltune.report.markup import Markup, Node, join, tag
from rltune.report.mixtures import role_of, slid, strength_figures
from rltune.report.parallel import colorings, parallel_figure
from rltune.report.pictures import Album
from rltune.report.words import (
    gain_and_half,
    measured_on,
    probability,
    question,
    setting_name,
    setup,
    shown_value,
    volume,
)
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.results import TrialResult


@dataclass(frozen=True)
class Story:
    """What the sections tell of."""

    run: Gathered
    grown: Growth
    importances: Sequence[Importance]
    pictures: Album
    hacked: Mapping[str, str]
    """Trials that look hacked, and why."""


MOST_NAMED = 20
"""Trials that are named in a sentence."""
Section = Callable[[Story], Markup | None]


def about(story: Story) -> Markup:
    """Return the question and the setup."""
    run = story.run
    rows = [tag("tr", tag("th", name), tag("td", fact)) for name, fact in setup(run)]
    return join(
        tag("p", question(run), class_="question"),
        tag("details", tag("summary", "The setup"), tag("table", *rows, class_="facts"), open=True),
    )


def front(story: Story) -> Markup:
    """Return the front: plots, the panel of a trial, and its members as a table."""
    run = story.run
    num_plots = len(run.objectives) * (len(run.objectives) - 1) // 2
    crowded = " With so many members, the knee alone has bars." if len(run.members) > CROWDED else ""
    what = "each pair of objectives; " if num_plots > 1 else ""
    note = (
        f"{what}better is to the right and above; the lines through the base model part better from worse. "
        "Bars are 95 % intervals over prompts, paired by prompt and noise; a dashed line leads from what a member was "
        f"chosen by to what it measured again.{crowded} Click a point for its pictures."
    )
    return join(
        tag("h2", "Pareto front"),
        tag("p", f"{measured_on(run)} {volume(run)}"),
        _legend(run),
        _figures(front_figures(run), is_wide=len(run.objectives) == 1),
        tag("p", f"{note[0].upper()}{note[1:]}", class_="dim"),
        _panel(),
        _members(run),
    )


def _panel() -> Markup:
    """Return where the script shows a trial."""
    head = tag("header", tag("select", id="which", aria_label="Trial"), tag("div", id="notes", class_="notes"))
    numbers = tag(
        "div",
        tag("div", tag("div", id="numbers"), class_="scroll"),
        tag("h3", "Settings"),
        tag("div", id="settings", class_="scroll"),
        tag("div", id="curves"),
        tag("div", id="export"),
    )
    return tag(
        "section",
        head,
        tag("div", tag("div", id="pictures", class_="prompts"), numbers, class_="columns"),
        tag("noscript", "Pictures and curves of trials are shown by a script, which this browser does not run."),
        id="trial",
    )


def _members(run: Gathered) -> Markup:
    """Return the front as a table."""
    places = run.front.fresh.non_dominated if run.front.fresh else {}
    head = [
        "trial",
        *(["P(non-dominated)"] if places else []),
        *run.objectives,
        *(setting_name(path) for path in run.settings),
    ]
    rows = []
    for member in run.front.members:
        gains = [_shown_gain(run, member, name) for name in run.objectives]
        values = [shown_value(member.values[path]) if path in member.values else "" for path in run.settings]
        is_knee = _is_knee(run, member.trial)
        name = f"{member.trial}{' base' if member.trial == BASE_TRIAL else ' knee' if is_knee else ''}"
        marks = " !" if not member.is_feasible else " ~" if member.trial in run.front.not_held else ""
        place = [probability(places.get(member.trial))] if places else []
        cells = [tag("td", text) for text in [name + marks, *place, *gains, *values]]
        rows.append(tag("tr", *cells, data_t=member.trial, tabindex="0", aria_label=f"trial {member.trial}"))
    reasons = [f"{trial}: {why}" for trial, why in run.front.not_held.items()]
    table = tag("table", tag("thead", tag("tr", *(tag("th", text) for text in head))), tag("tbody", *rows))
    marked = f"~ or !: does not hold its place on fresh prompts ({'; '.join(reasons)})." if reasons else ""
    sure = (
        "P(non-dominated): how probable it is that no other member, nor the base model, is better by its true values. "
    )
    notes = f"{sure if places else ''}{marked}"
    return join(tag("div", table, class_="scroll tall"), tag("p", notes, class_="dim") if notes else None, _soups(run))


def _soups(run: Gathered) -> Markup | None:
    """Return the mixtures that nothing has beaten as a table."""
    soups = run.front.soups
    if soups is None:
        return None
    rows = []
    for soup in soups.members:
        gains = [_value_and_gain(run.fresh_gain(soup.result.metrics, name)) for name in run.objectives]
        rows.append([soup.name, probability(soup.non_dominated), *gains, soup.recipe])
    head = tag("tr", *(tag("th", text) for text in ("soup", "P(non-dominated)", *run.objectives, "made of")))
    body = tag("tbody", *(tag("tr", *(tag("td", text) for text in row)) for row in rows))
    table = tag("div", tag("table", tag("thead", head), body), class_="scroll") if rows else None
    half = "" if soups.growth_half_width is None else f" \N{PLUS-MINUS SIGN} {soups.growth_half_width:.2g}"
    num = len(soups.members)
    note = (
        f"{soups.words}. Nothing has beaten {num} of them, by "
        "the numbers shown, so luck has raised these. With all of them the hypervolume is "
        f"{soups.hypervolume:.4g}, {soups.hypervolume - run.front.hypervolume:+.2g}{half}. "
        "A LoRA of one: rltune export RUN --pick NAME."
    )
    return join(table, tag("p", note, class_="dim"))


def _shown_gain(run: Gathered, member: TrialResult, name: str) -> str:
    gain = None if member.trial == BASE_TRIAL else run.gain(member, name)
    return f"{member.metrics[f'eval/{name}']:.4g}" if gain is None else _value_and_gain(gain)


def _value_and_gain(gain: Gain | None) -> str:
    return "" if gain is None else f"{gain.value:.4g} ({gain_and_half(gain.gain, gain.half)})"


def settings(story: Story) -> Markup | None:
    """Return the trials as lines through their settings."""
    run = story.run
    figure = parallel_figure(run)
    if figure is None:
        return None
    options = [tag("option", setting_name(path)) for path in colorings(run)]
    choice = tag("label", "Coloured by ", tag("select", *options, data_colors="yes"))
    ramp = join("low ", *(_mark(Line([(0, 7), (14, 7)], f"ramp{i}", 5)) for i in range(0, 8)), " high")
    least = f"--least:{min(figure.drawing.width, 900):.0f}px"
    return join(
        tag("h2", "Settings and what they gave"),
        tag("p", choice, " ", tag("span", ramp, class_="legend"), class_="legend"),
        tag("div", tag("figure", to_svg(figure.drawing)), class_="wide pick", style=least),
        tag("p", "A line a trial; thick: on the front. Gains have better above.", class_="dim"),
    )


def importance(story: Story) -> Markup | None:
    """Return what each setting has to do with each objective."""
    run = story.run
    if not run.settings:
        return None
    title = tag("h2", "Which settings mattered")
    if not story.importances:
        return join(title, tag("p", f"Fewer than {FEWEST} trials ran to their end: too few to say.", class_="dim"))
    num = max(row.num_trials for row in story.importances)
    note = (
        f"Spearman's rank correlation over the {num} trials that ran to their end, with its 95 % interval (Bonett and "
        "Wright 2000): to the right, more of the setting went with a better objective. Within the grey band a setting "
        "without any effect would lie in 95 % of cases. One setting at a time: weights that sum to 1 and settings that "
        "the search moved together share their credit, and an effect that rises and falls again does not show."
    )
    return join(title, _figures(importance_figures(run, list(story.importances))), tag("p", note, class_="dim"))


def growth(story: Story) -> Markup | None:
    """Return how the hypervolume grew."""
    if len(story.grown.volumes) < 3:
        return None
    fresh = " The dot at the end is the front on fresh prompts, with its interval." if story.run.front.fresh else ""
    note = (
        "By the numbers that trials were chosen by, which luck raises as trials become more."
        f"{fresh} Worker-seconds count all slots from the start, idle ones too."
    )
    return join(
        tag("h2", "Hypervolume"),
        _figures(growth_figures(story.run, story.grown)),
        tag("p", note, class_="dim"),
    )


def strengths(story: Story) -> Markup | None:
    """Return what LoRAs gain at other strengths."""
    run = story.run
    figures = list(strength_figures(run))
    if not figures:
        return None
    names = {trial: f"trial {trial}{', the knee' if _is_knee(run, trial) else ''}" for trial in slid(run)}
    marks = [tag("span", _mark(Dot(7, 7, 5, role_of(run, trial))), name) for trial, name in names.items()]
    note = (
        "The LoRA's strength, as a user of it sets it: at 0 the base model, at 1 what was trained. Gains over the base "
        "model on fresh prompts, paired by prompt and noise; bars are 95 % intervals over prompts."
    )
    return join(
        tag("h2", "At other strengths"),
        tag("div", *marks, class_="legend"),
        _figures(figures, class_="figures"),
        tag("p", note, class_="dim"),
    )


def _is_knee(run: Gathered, trial: str) -> bool:
    return run.front.knee is not None and trial == run.front.knee.trial


def hacked(story: Story) -> Markup | None:
    """Return judges against rewards, and which trials look hacked."""
    run = story.run
    if not judges(run):
        return None
    marked = [f"{trial} ({why})" for trial, why in story.hacked.items()]
    found = marked[:MOST_NAMED]
    more = f" and {len(marked) - MOST_NAMED} others" if len(marked) > MOST_NAMED else ""
    said = f"Marked: {', '.join(found)}{more}." if found else "No trial is marked."
    figures = [_figures(judge_figures(run, judge, story.hacked), class_="figures small pick") for judge in judges(run)]
    return join(tag("h2", "Judges against rewards"), tag("p", said), *figures, tag("p", RULE, class_="dim"))


def failed(story: Story) -> Markup | None:
    """Return the trials that failed or were stopped, by their reasons."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in story.run.results:
        if row.state != "ok":
            reasons.setdefault((row.state, row.reason), []).append(row.trial)
    if not reasons:
        return None
    rows = [
        tag("tr", tag("td", state), tag("td", ", ".join(trials), class_="text"), tag("td", reason, class_="text"))
        for (state, reason), trials in reasons.items()
    ]
    head = tag("tr", *(tag("th", text) for text in ("state", "trials", "reason")))
    return join(tag("h2", "Trials that failed or were stopped"), tag("div", tag("table", head, *rows), class_="scroll"))


def all_trials(story: Story) -> Markup:
    """Return where the script lists all trials."""
    num, out = len(story.run.trained), story.pictures.num_left_out
    left_out = f"The pictures of {out} trials are left out, to keep this page small; their folders have them."
    summary = tag("summary", f"{num} trained, with all gains and settings")
    listing = tag("details", summary, tag("div", id="rows", class_="scroll"), id="all")
    return join(tag("h2", "All trials"), tag("p", left_out, class_="dim") if out else None, listing)


def again(story: Story) -> Markup:
    """Return everything that is needed to run it again."""
    run = story.run
    named = run.named()
    file = run.folder.experiment_file.read_text(encoding="utf-8", errors="replace")
    kind = "sweep" if run.experiment.is_searched else "train"
    command = f"rltune {kind} {quote(f'{named}/experiment.yaml')} --name {quote(f'{run.folder.name}-again')}"
    versions = run.record.versions if run.record else {}
    facts = [tag("tr", tag("th", name), tag("td", text)) for name, text in versions.items()]
    content = [
        tag("tr", tag("th", row.setting), tag("td", f"{row.source or 'written out'}: {row.count}, {row.sha256[:16]}"))
        for row in (run.record.prompts if run.record else ())
    ]
    content += [
        tag("tr", tag("th", pin.setting), tag("td", f"{pin.named} {pin.digest[:16]}".strip()))
        for pin in (run.record.pins if run.record else ())
    ]
    return join(
        tag("h2", "Run it again"),
        tag("pre", command, class_="command"),
        tag("details", tag("summary", "experiment.yaml"), tag("pre", file, class_="long")),
        _folded("Versions", facts),
        _folded("What it was started with, by digests of the content", content),
    )


def _folded(title: str, rows: Sequence[Markup]) -> Markup | None:
    return tag("details", tag("summary", title), tag("table", *rows, class_="facts")) if rows else None


SECTIONS: Sequence[Section] = (about, front, settings, importance, growth, hacked, strengths, failed, all_trials, again)
"""In the order of the page."""


def _figures(figures: Iterable[Figure], *, class_: str = "figures pick", is_wide: bool = False) -> Markup:
    drawn = [tag("figure", to_svg(figure.drawing), id=f"figure-{figure.name}") for figure in figures]
    if is_wide:
        return tag("div", *drawn, class_="wide pick", style="--least:560px")
    return tag("div", *drawn, class_=class_)


def _legend(run: Gathered) -> Markup:
    entries: list[tuple[Dot, str]] = [
        (Dot(7, 7, 5, "base", is_square=True), "base model"),
        (Dot(7, 7, 5, "knee"), "knee: a good compromise" if len(run.objectives) > 1 else "best"),
        (Dot(7, 7, 5, "member"), "on the front"),
        (Dot(7, 7, 3.2, "trial"), "other trials"),
    ]
    if run.front.soups and run.front.soups.members:
        kinds = {soup.kind for soup in run.front.soups.members}
        what = "soup: a mixture of two" if "soup" in kinds else "basis: LoRAs trained together, at other weights"
        entries.insert(3, (Dot(7, 7, 4.5, "soup", is_square=True), what))
    if any(not run.shown(row).is_feasible for row in run.trained):
        entries.append((Dot(7, 7, 3.2, "trial", is_hollow=True), "breaks a constraint"))
    nodes: list[Node] = [tag("span", _mark(dot), text) for dot, text in entries]
    return tag("div", *nodes, class_="legend")


def _mark(shape: Dot | Line) -> Markup:
    return to_svg(Drawing(14, 14, (shape,), ""))
