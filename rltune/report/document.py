"""A document of HTML that needs nothing else: no file beside it, no network, no font of its own."""

import base64
import hashlib
from importlib.resources import files

from rltune.report.drawing import shape_rules, styles
from rltune.report.markup import Markup, tag


def document(title: str, *body: Markup, script: str = "") -> str:
    """Return a document in light and in dark, as the reader's system is.

    Args:
        title: What a browser calls it.
        body: What stands in it.
        script: The one script that may run, which ``body`` has; without it none may.
    """
    colours = f"{styles(is_dark=False)}@media(prefers-color-scheme:dark){{{styles(is_dark=True)}}}{shape_rules()}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(colours + own_file("page.css"))),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def own_file(name: str) -> str:
    """Return a file of this package."""
    return (files("rltune.report") / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Return what a browser may do with the page: run its own script, show its own pictures, ask nobody."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"script-src 'sha256-{digest}'; " if script else ""
    return f"default-src 'none'; {scripts}style-src 'unsafe-inline'; img-src data:"
