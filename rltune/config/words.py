"""A node of a JSON schema in words, for messages: what would be right there, and what to do about what stands there."""

from collections.abc import Mapping
from typing import Any

from rltune.config.distributions import show
from rltune.registry import suggest

Node = Mapping[str, Any]


def is_leaf(node: Node) -> bool:
    """Return whether one value, and not a section, stands here."""
    return bool(node) and node.get("type") != "object"


def known_keys(node: Node) -> tuple[str, ...]:
    """Return the keys of a section."""
    return tuple(node.get("properties", ()))


def describe(node: Node) -> str:
    """Return what would be right at ``node``, for people: ``a whole number, at least 1``."""
    if "x-expects" in node:
        return str(node["x-expects"])
    if "anyOf" in node:
        return " or ".join(describe(branch) for branch in node["anyOf"] if branch.get("type") != "null")
    if "const" in node or "enum" in node:
        values = [show(value) for value in node.get("enum", [node.get("const")])]
        return values[0] if len(values) == 1 else ", ".join(values[:-1]) + " or " + values[-1]
    kind = node.get("type")
    if kind == "array":
        size = f"{len(node['prefixItems'])} items" if "prefixItems" in node else "items"
        item = node["prefixItems"][0] if "prefixItems" in node else node["items"]
        return f"a list of {size}, each {describe(item)}"
    if kind == "object":
        keys = known_keys(node)
        return f"a section with any of the keys {', '.join(keys)}" if keys else "a section of names and their settings"
    noun = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}.get(str(kind), "text")
    multiple = f", a multiple of {node['multipleOf']}" if "multipleOf" in node else ""
    return noun + _interval(node) + multiple


def _interval(node: Node) -> str:
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']} to {node['maximum']}"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = [f"{word} {node[key]}" for key, word in words.items() if key in node]
    return ", " + " and ".join(bounds) if bounds else ""


def what_is_wrong(node: Node, value: Any) -> tuple[str, str]:
    """Return what is wrong with ``value``, which does not fit ``node``, and what to do about it."""
    return f"must be {describe(node)}, got {show(value)}", _remedy(node, value)


def _remedy(node: Node, value: Any) -> str:
    branches = node.get("anyOf", (node,))
    options = next((branch["enum"] for branch in branches if "enum" in branch), ())
    if isinstance(value, str) and options:
        return suggest(value, tuple(options))
    if isinstance(value, float) and node.get("type") == "integer" and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, str) and node.get("type") in ("integer", "number") and value.strip().isdecimal():
        return "remove the quotes"
    default = node.get("default")
    return "" if default in (None, "") or not is_leaf(node) else f"the default is {show(default)}"
