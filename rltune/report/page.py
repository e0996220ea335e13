"""The report of a run: one page of HTML."""

import json
from datetime import datetime
from typing import Any

import rltune
from rltune.redaction import redact
from rltune.report.data import page_data
from rltune.report.document import document, own_file
from rltune.report.gather import Gathered
from rltune.report.markup import Markup, clean, join, tag
from rltune.report.sections import SECTIONS, Story
from rltune.runs.layout import BASE_TRIAL


def page(story: Story) -> str:
    """Return the report."""
    run = story.run
    clean.cache_clear()
    script, data = own_file("page.js"), page_data(run, story.pictures, first_trials(run), story.hacked)
    top = (tag("h1", run.folder.name), tag("p", _as_of(story), class_="dim"))
    return document(
        f"{run.folder.name}: rltune report",
        tag("main", *top, *(make(story) for make in SECTIONS)),
        tag("div", id="tip"),
        tag("script", _embedded(data), type="application/json", id="data"),
        tag("script", Markup(script)),
        script=script,
    )


def first_trials(run: Gathered) -> list[str]:
    """Return the trials whose pictures and curves must not be missing: the knee, then the rest of the front."""
    knee = [run.front.knee.trial] if run.front.knee is not None else []
    members = [member.trial for member in run.front.members if member.trial != BASE_TRIAL]
    return list(dict.fromkeys([*knee, *members]))


def _as_of(story: Story) -> str:
    run = story.run
    ended, wanted = sum(result.trial != BASE_TRIAL for result in run.results), run.experiment.num_trials
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    left = "" if ended >= wanted else "; while the run goes on this file is written again: reload it"
    return f"rltune {rltune.__version__}, {now}: {ended} of {wanted} trials ended{left}."


def _embedded(data: dict[str, Any]) -> Markup:
    """Return data as JSON that no text in it can end; pictures, in which no secret is, are not looked through."""
    rest = {name: value for name, value in data.items() if name != "sheets"}
    text = redact(json.dumps(rest, separators=(",", ":"), allow_nan=False))
    text = f'{text[:-1]},"sheets":{json.dumps(data["sheets"])}}}'
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return join(Markup(text))
