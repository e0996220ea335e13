"""RunConfig's JSON schema: where its paths lead to, and with options and distributions for editors."""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

from rltune.config.experiment import WHOLE_SWEEP, RunConfig
from rltune.config.options import node_of
from rltune.config.rules import Known, Section
from rltune.config.words import Node
from rltune.config.yamlfile import Path


@cache
def run_schema() -> Node:
    """Return the schema of a concrete run; not to be changed."""
    return RunConfig.model_json_schema()


def node_at(path: Path) -> Node | None:
    """Return what the schema says about ``path``: None where no such key is known, ``{}`` where anything goes."""
    node: Node | None = run_schema()
    for key in path:
        node = _child(node, key) if node is not None else None
    return node


def _child(node: Node, key: str) -> Node | None:
    if not node or node.get("additionalProperties") is True:
        return {}
    child: Node | None = None
    for branch in node.get("anyOf", (node,)):
        if key in branch.get("properties", {}):
            child = branch["properties"][key]
        elif isinstance(branch.get("additionalProperties"), Mapping):
            child = branch["additionalProperties"]
        elif branch.get("type") == "array" and key.isdigit():
            items = branch.get("prefixItems", [])
            child = items[int(key)] if int(key) < len(items) else branch.get("items")
    return _resolved(child) if child is not None else None


def _resolved(node: Node) -> Node:
    if "$ref" not in node:
        return node
    return {**run_schema()["$defs"][node["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in node.items() if k != "$ref"}}


def belongs_to_whole_sweep(path: Path) -> bool:
    """Return whether all trials share the value at ``path``, so that no distribution may stand there."""
    return any(".".join(path[: depth + 1]) in WHOLE_SWEEP for depth in range(len(path)))


def json_schema(known: Known | None = None) -> dict[str, Any]:
    """Return the schema of an experiment file for editors: RunConfig's, where a value may also be a distribution.

    Args:
        known: What estimators and rewards take; else their options are free.
    """
    schema = copy.deepcopy(dict(run_schema()))
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "rltune experiment"
    schema["$defs"]["Choice"] = _distribution("choice", "One of these values.", {"type": "array", "minItems": 1})
    pairs = (
        ("IntRange", "int", "A whole number from low to high.", "integer"),
        ("FloatRange", "float", "A number from low to high.", "number"),
        ("LogFloatRange", "log_float", "A positive number from low to high, uniform in its logarithm.", "number"),
    )
    for name, kind, text, item in pairs:
        pair = {"type": "array", "items": {"type": item}, "minItems": 2, "maxItems": 2}
        schema["$defs"][name] = _distribution(kind, text, pair)
    scalar = {"type": ["string", "number", "boolean", "null"]}
    schema["$defs"]["When"] = {
        "description": "Searched only where each of these searched choices has taken this option, or one of these.",
        "type": "object",
        "additionalProperties": {"anyOf": [scalar, {"type": "array", "items": scalar, "minItems": 1}]},
        "minProperties": 1,
    }
    for name in ("Choice", *(name for name, *_ in pairs)):
        schema["$defs"][name]["properties"]["when"] = {"$ref": "#/$defs/When"}
    schema["$defs"]["IntRange"]["properties"]["step"] = {"type": "integer", "minimum": 1}
    schema["$defs"]["Simplex"] = _distribution("simplex", "Weights that sum to one over all rewards.", {"const": True})
    _admit(schema, schema, ())
    if known is not None and (known.estimator_options or known.reward_options):
        _type_options(schema, known)
    return schema


def _type_options(schema: dict[str, Any], known: Known) -> None:
    """Say which options there are where a name says whose they are: not where that is a distribution."""
    sections = schema["$defs"]
    estimator, reward = sections["EstimatorConfig"], sections["RewardConfig"]
    default = estimator["properties"]["name"]["default"]
    estimator["allOf"] = [
        _where("name", name, _options(schema, f"estimator.{name}", section), is_default=name == default)
        for name, section in known.estimator_options.items()
    ]
    options = {name: _options(schema, f"reward.{name}", section) for name, section in known.reward_options.items()}
    reward["allOf"] = [_where("reward", name, then) for name, then in options.items()]
    rewards = schema["properties"]["rewards"]
    rewards["properties"] = {
        name: {"allOf": [rewards["additionalProperties"], {"if": {"required": ["reward"]}, "else": then}]}
        for name, then in options.items()
    }


def _where(key: str, name: str, then: dict[str, Any], *, is_default: bool = False) -> dict[str, Any]:
    named: dict[str, Any] = {"properties": {key: {"const": name}}}
    return {"if": named if is_default else named | {"required": [key]}, "then": then}


def _options(schema: dict[str, Any], name: str, section: Section) -> dict[str, Any]:
    """Add the options of ``name`` to the schema's definitions, and return what a section with such options fits."""
    node = copy.deepcopy(dict(node_of(section)))
    for key, child in node.get("properties", {}).items():
        if child.get("type") != "object":
            node["properties"][key] = _or_distribution(child, ())
    schema["$defs"][name] = node
    return {"properties": {"options": {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}}}


def _distribution(kind: str, text: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": text,
        "type": "object",
        "properties": {kind: value},
        "required": [kind],
        "additionalProperties": False,
    }


def _admit(node: dict[str, Any], root: dict[str, Any], path: Path) -> None:
    """Let distributions stand for the values below ``node``, and nothing for a section: ``optim:`` is all defaults."""
    for key, child in node.get("properties", {}).items():
        here = (*path, key)
        if "$ref" in child:
            section = root["$defs"][child["$ref"].rsplit("/", 1)[1]]
            _admit(section, root, here)
            child.setdefault("description", section["description"])  # pydantic leaves out what says the same
            child["anyOf"] = [{"$ref": child.pop("$ref")}, {"type": "null"}]
        elif child.get("type") == "object":
            child["type"] = ["object", "null"]
            items = child["additionalProperties"]
            if isinstance(items, dict) and "$ref" in items:
                _admit(root["$defs"][items["$ref"].rsplit("/", 1)[1]], root, (*here, "*"))
            elif isinstance(items, dict):
                child["additionalProperties"] = _or_distribution(items, (*here, "*"))
        elif not belongs_to_whole_sweep(here):
            node["properties"][key] = _or_distribution(child, here)


def _or_distribution(leaf: dict[str, Any], path: Path) -> dict[str, Any]:
    notes: dict[str, Any] = {key: leaf.pop(key) for key in ("title", "description", "default") if key in leaf}
    branches = leaf.get("anyOf", [leaf])
    for branch in branches:
        if branch.get("type") == "array" and "prefixItems" in branch:
            branch["prefixItems"] = [_or_distribution(item, path) for item in branch["prefixItems"]]
    kinds = {branch.get("type") for branch in branches}
    names = [] if kinds <= {"array"} else ["Choice"]
    names += ["IntRange"] if kinds & {"integer", "number"} else []
    names += ["FloatRange", "LogFloatRange"] if "number" in kinds else []
    names += ["Simplex"] if path == ("rewards", "*", "weight") else []
    return {**notes, "anyOf": [*branches, *({"$ref": f"#/$defs/{name}"} for name in names)]}
