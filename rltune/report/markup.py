"""HTML and SVG that is escaped by being built: a string is text, and only what ``tag`` returns is markup.

Text from a user (a prompt, a reason, a name) loses characters that neither HTML nor XML has, and known secrets.
"""

from functools import lru_cache
from html import escape

from rltune.redaction import SHORTEST, redact

_LOST = dict.fromkeys((*range(32), *range(127, 160), 65534, 65535), "�")
_LOST |= dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")  # halves of a character: no UTF-8
_LOST = {code: lost for code, lost in _LOST.items() if chr(code) not in "\n\t"}
VOID = frozenset({"br", "meta", "img", "input", "link"})
Attribute = str | float | bool | None


class Markup(str):
    """Text that is HTML or SVG already."""


Node = Markup | str | float | None
"""What stands in an element: a string is text, None is nothing."""


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """Return a text as it may be shown: without secrets, and without characters that no document may hold.

    What secrets are known is looked up once a text; ``clean.cache_clear()`` has it looked up anew.
    """
    return (redact(text) if len(text) >= SHORTEST else text).translate(_LOST)


def render(node: Node) -> Markup:
    """Return a node as markup."""
    if isinstance(node, Markup):
        return node
    if isinstance(node, str):
        return Markup(escape(clean(node)))
    return Markup("" if node is None else str(node))


def join(*nodes: Node) -> Markup:
    """Return nodes one after the other."""
    return Markup("".join(map(render, nodes)))


def tag(name: str, /, *children: Node, **attributes: Attribute) -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        children: What stands in it; secrets in text are masked.
        attributes: Those that are None or False are left out. ``_`` stands for ``-``, one at the end for nothing.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{''.join(map(render, children))}</{name}>")


def _attribute(key: str, value: Attribute) -> str:
    name = key.rstrip("_").replace("_", "-")
    if isinstance(value, bool):
        return f" {name}" if value else ""
    if isinstance(value, float):
        return f' {name}="{round(value, 1):g}"'
    return f' {name}="{escape(str(value).translate(_LOST))}"'
