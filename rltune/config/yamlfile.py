"""YAML text <-> plain data, with the line of each value. Scalars are YAML 1.2's: 1e-3 is a number, ``no`` is text."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from rltune.config.distributions import BESIDE, KINDS
from rltune.errors import Fault

Path = tuple[str, ...]
_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_EXPONENT = "[eE][-+]?[0-9]+"
_FLOAT = rf"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:{_EXPONENT})?|[0-9]+{_EXPONENT}|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
_DISTRIBUTION_KEYS = BESIDE | set(KINDS)
_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", r"<<", "<"),
)
"""YAML 1.2's core schema (yaml.org/spec/1.2.2, section 10.3.2), no 0x or 0o. PyYAML follows 1.1: 1e-3 is text there."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own attribute


class _Dumper(yaml.SafeDumper):
    """Keeps YAML 1.1's resolvers too, so that text which either version would misread is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """PyYAML writes Unicode's line breaks bare and then reads them as spaces; in double quotes it escapes them."""
    return dumper.represent_scalar(_STR, text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _represent_text)
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _firsts = ["" if char == "\0" else char for char in _first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _firsts)


class YamlError(ValueError):
    """Text that is not YAML. ``line`` counts from 1; None if the text has none to point at."""

    def __init__(self, line: int | None, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.line, self.what, self.remedy = line, what, remedy


def read_yaml(text: str) -> tuple[Any, dict[Path, int], list[tuple[int, Fault]]]:
    """Return the data, the line of every path in it, and the faults of its keys with their lines.

    Raises:
        YamlError: It is not YAML, or holds more than plain data.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[Path, int] = {}
            faults: list[tuple[int, Fault]] = []
            if node is not None:
                _visit(node, (), lines, faults, ())
            data = None if node is None else loader.construct_document(node)
            return _unshared(data), lines, faults
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at column {mark.column + 1}" if mark else ""
        what = f"not valid YAML{place} ({error.problem or error.context})"
        raise YamlError(mark.line + 1 if mark else None, what, "check indentation, colons and brackets") from None
    except yaml.reader.ReaderError as error:
        what = f"not valid YAML, got the character {chr(error.character)!r}"
        raise YamlError(text.count("\n", 0, error.position) + 1, what, "delete it") from None


def _visit(
    node: yaml.Node,
    path: Path,
    lines: dict[Path, int],
    faults: list[tuple[int, Fault]],
    above: tuple[yaml.Node, ...],
    *,
    holds_paths: bool = False,
) -> None:
    """Note the line of everything below ``node``; check its keys and make them text, as ``1:`` would be a number.

    Its own keys are dotted paths in a distribution's ``when`` and in a point of ``search.points``.
    """
    if node in above:
        raise YamlError(node.start_mark.line + 1, "an alias holds itself", "write the values out")
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines.setdefault((*path, str(i)), item.start_mark.line + 1)
            _visit(item, (*path, str(i)), lines, faults, above, holds_paths=path == ("search", "points"))
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        is_distribution = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)} <= _DISTRIBUTION_KEYS
        for key, value in node.value:
            if key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(line, "a key must be text, got a list or mapping", "write it as 'key: value'")
            key.tag = _STR
            name, here = key.value, (*path, key.value)
            if name in seen:
                what = f"stands here twice, got it first on line {seen[name]}"
                faults.append((line, Fault(".".join(here), what, "delete one")))
            if "." in name and not holds_paths:
                parts = name.split(".")
                nested = ": {".join(parts) + ": .." + "}" * (len(parts) - 1)
                faults.append(
                    (line, Fault(".".join(here), f"a key must not hold a dot, got {name!r}", f"write {nested}"))
                )
            seen[name] = lines[here] = line
            _visit(value, here, lines, faults, above, holds_paths=is_distribution and name == "when")


def _unshared(data: Any) -> Any:
    """Copy what ``*alias`` made one object of, so that a change in one place stays there."""
    if isinstance(data, dict):
        return {key: _unshared(value) for key, value in data.items()}
    return [_unshared(item) for item in data] if isinstance(data, list) else data


def write_yaml(data: Mapping[str, Any]) -> str:
    """Return ``data`` as YAML text that ``read_yaml`` reads back equal, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
