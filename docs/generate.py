"""Write the generated halves of ``reference.md`` and ``commands.md``: ``python docs/generate.py``.

What stands above the marker in those pages is written by hand; what stands below it comes from the code.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main

from rltune.cli.main import app
from rltune.config.options import node_of, options_section
from rltune.config.schema import belongs_to_whole_sweep, node_at
from rltune.config.words import describe, is_leaf, known_keys
from rltune.estimators.base import ESTIMATORS
from rltune.registry import Registry
from rltune.rewards.base import REWARDS

DOCS = Path(__file__).parent
MARKER = "<!-- Everything below is written by: python docs/generate.py -->\n"
NAMED = {"rewards": "NAME", "constraints": "NAME"}
"""Sections whose keys are the user's own names."""
KINDS = {
    "path": "PATH",
    "Path": "PATH",
    "str": "TEXT",
    "int range": "N",
    "float range": "X",
    "list[str]": "TEXT",
    "list[Path]": "PATH",
}
"""What typer calls the kind of an option's value -> what the page calls it."""
IN_THE_SECTION = {"k", "draw", "std"}
"""Settings of estimators that stand in the section ``estimator`` itself, and are told of there."""


def main() -> None:
    """Bring every generated page up to date."""
    for name in PAGES:
        page = DOCS / name
        page.write_text(rendered(page), encoding="utf-8")


def rendered(page: Path) -> str:
    """Return what a generated page should hold."""
    head, marker, _ = page.read_text(encoding="utf-8").partition(MARKER)
    assert marker, f"{page} lacks the line {MARKER}"
    return head + MARKER + "\n" + "\n".join(PAGES[page.name]()).rstrip() + "\n"


def reference() -> Iterator[str]:
    """Yield every setting, section by section, and the options of estimators and rewards."""
    root = _node(())
    loose = [key for key in known_keys(root) if is_leaf(_node((key,)))]
    yield "## The experiment itself\n"
    for key in loose:
        yield from _setting((key,))
    for key in known_keys(root):
        if key not in loose:
            yield f"\n## {key}\n"
            yield from _section((key,), depth=2)
    yield "\n## Options of estimators\n"
    yield "Write them as `estimator: {name: NAME, options: {OPTION: VALUE}}`.\n"
    for name in ESTIMATORS.names():
        yield from _options(name, ESTIMATORS, without=IN_THE_SECTION)
    yield "\n## Options of rewards\n"
    yield "Write them as `rewards: {NAME: {options: {OPTION: VALUE}}}`. Rewards without options are left out.\n"
    for name in REWARDS.names():
        yield from _options(name, REWARDS)


def _node(path: tuple[str, ...]) -> Mapping[str, Any]:
    node = node_at(path)
    assert node is not None, path
    return node


def _section(path: tuple[str, ...], depth: int) -> Iterator[str]:
    yield _plain(_node(path).get("description", "")) + "\n"
    if belongs_to_whole_sweep(path):
        yield "All trials of a sweep share this section, so none of it can be searched.\n"
    inside = (*path, NAMED[path[0]]) if path[0] in NAMED and len(path) == 1 else path
    keys = known_keys(_node(inside))
    sections = [key for key in keys if not is_leaf(_node((*inside, key))) and known_keys(_node((*inside, key)))]
    for key in keys:
        if key not in sections:
            yield from _setting((*inside, key))
    for key in sections:
        yield f"\n{'#' * (depth + 1)} {'.'.join((*inside, key))}\n"
        yield from _section((*inside, key), depth + 1)


def _setting(path: tuple[str, ...]) -> Iterator[str]:
    node = _node(path)
    what = describe(node) if is_leaf(node) else "a mapping of options"
    notes = [_plain(what), _default(node)]
    if belongs_to_whole_sweep(path) and not belongs_to_whole_sweep(path[:1]):
        notes.append("the same in all trials, so it cannot be searched")
    elif len(path) == 1 and belongs_to_whole_sweep(path):
        notes.append("cannot be searched")
    yield f"- **`{'.'.join(path)}`** ({'; '.join(notes)})  \n  {_plain(node.get('description', ''))}"


def _default(node: Mapping[str, Any]) -> str:
    if "default" not in node:
        return "required"
    return _default_value(node["default"])


def _default_value(default: Any) -> str:
    if isinstance(default, bool | int | float | list) and default != []:
        return f"default `{json.dumps(default)}`"
    if isinstance(default, str) and default:
        return f"default `{default}`"
    return "may be left out"


def _options(name: str, registry: Registry[Any], *, without: Collection[str] = ()) -> Iterator[str]:
    takes = [option for option in registry.options(name) if option.name not in without]
    nodes = node_of(options_section(name, takes)).get("properties", {})
    if takes:
        yield f"\n### {name}\n"
    for option in takes:
        what = f"{_plain(describe(nodes[option.name]))}; {_default_value(option.default)}"
        yield f"- **`{option.name}`** ({what})  \n  {_plain(option.text)}".rstrip()


def _plain(text: str) -> str:
    """Return a docstring's text as one line of Markdown."""
    return " ".join(text.replace("``", "`").split())


def commands() -> Iterator[str]:
    """Yield every command with its arguments and options."""
    yield from _commands(typer.main.get_command(app), "rltune")


def _commands(group: Any, words: str) -> Iterator[str]:
    for name, command in group.commands.items():
        line, is_group = f"{words} {name}", hasattr(command, "commands")
        arguments = [param for param in command.params if not param.opts[0].startswith("-")]
        usage = [line, *(_argument(param) for param in arguments)]
        usage += ["[OPTIONS]"] if len(command.params) > len(arguments) and not is_group else []
        yield f"\n### {line}\n\n{_plain(command.help or '')}\n\n```text\n{' '.join(usage)}\n```\n"
        with command.make_context(line, [], resilient_parsing=True) as context:
            for param in command.params:
                label, text = param.get_help_record(context)
                kind = re.search(r"<(.*)>", label)
                of = f" {KINDS[kind[1]]}" if kind else ""
                shown = _argument(param) if param in arguments else ", ".join(param.opts) + of
                yield f"- `{shown}`: {_plain(text)}"
        if is_group:
            yield from _commands(command, line)


def _argument(param: Any) -> str:
    name = (param.metavar or param.name).upper().removesuffix("S" if param.nargs == -1 else "")
    name += "..." if param.nargs == -1 else ""
    return name if param.required else f"[{name}]"


PAGES: Mapping[str, Callable[[], Iterator[str]]] = {"reference.md": reference, "commands.md": commands}

if __name__ == "__main__":
    main()
