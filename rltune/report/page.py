"""One page of HTML that needs nothing else: no file beside it, no network, no font of its own."""

import base64
import hashlib
import json
from datetime import datetime
from importlib.resources import files
from typing import Any

import rltune
from rltune.redaction import redact
from rltune.report.data import page_data
from rltune.report.drawing import shape_rules, styles
from rltune.report.gather import Gathered
from rltune.report.markup import Markup, clean, join, tag
from rltune.report.sections import SECTIONS, Story
from rltune.runs.layout import BASE_TRIAL


def page(story: Story) -> str:
    """Return the report."""
    run = story.run
    clean.cache_clear()
    script, data = _own("page.js"), page_data(run, story.pictures, first_trials(run), story.hacked)
    style = f"{styles(is_dark=False)}@media(prefers-color-scheme:dark){{{styles(is_dark=True)}}}{shape_rules()}"
    title = f"{run.folder.name}: rltune report"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style + _own("page.css"))),
    )
    top = (tag("h1", run.folder.name), tag("p", _as_of(story), class_="dim"))
    body = tag(
        "body",
        tag("main", *top, *(make(story) for make in SECTIONS)),
        tag("div", id="tip"),
        tag("script", _embedded(data), type="application/json", id="data"),
        tag("script", Markup(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


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


def _own(name: str) -> str:
    return (files("rltune.report") / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Return what a browser may do with the page: run its own script, show its own pictures, ask nobody."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"


def _embedded(data: dict[str, Any]) -> Markup:
    """Return data as JSON that no text in it can end; pictures, in which no secret is, are not looked through."""
    rest = {name: value for name, value in data.items() if name != "sheets"}
    text = redact(json.dumps(rest, separators=(",", ":"), allow_nan=False))
    text = f'{text[:-1]},"sheets":{json.dumps(data["sheets"])}}}'
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return join(Markup(text))
