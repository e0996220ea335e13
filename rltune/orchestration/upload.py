"""What goes up with a submitted experiment: a small folder that the job runs in, and never weights.

It holds the experiment with its overrides, prompt files with their pictures, reference pictures of rewards, and the
user's own modules. Files below the current folder keep their place; prompt files and reference pictures from elsewhere
go to ``inputs/`` and are renamed in the experiment.
"""

import ast
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltune.canvas import Canvas
from rltune.config.load import Experiment
from rltune.config.prompts_section import BUILTIN_PROMPTS
from rltune.config.yamlfile import write_yaml
from rltune.errors import ExperimentError, Fault
from rltune.rewards.references import picture_files
from rltune.training.canvases import SETS, Pictured, prompt_set
from rltune.training.rewards import PICTURES, is_own

MAX_MIB = 200.0
"""Ray takes 512 MiB at the most, and keeps what goes up in the head's memory."""
OWN_CODE = re.compile(r"([^\W\d]\w*(?:\.\w+)*):\w+(?:\.\w+)*")
"""``module:name``, as rewards name functions."""
WEIGHTS_OR_RUNS = re.compile(
    r"model\.(base|config|lora\.start)(\.choice)?|search\.warm_start|rewards\.[^.]+\.options\..+"
)
"""Settings that may be a path of what does not go up."""


@dataclass(frozen=True)
class Upload:
    """A folder that is ready to go up."""

    folder: Path
    experiment_file: str
    """Name of the experiment in it."""
    files: tuple[str, ...]
    """All that it holds, relative."""
    size: int
    """Bytes."""
    notes: tuple[str, ...]
    """What has to be on the cluster, since it does not go up."""


def stage(experiment: Experiment, folder: Path) -> Upload:
    """Fill an empty folder with what an experiment needs from this machine; paths are from the current folder.

    Raises:
        ExperimentError: Something that it names cannot go up, or is too large.
    """
    faults: list[Fault] = []
    here = Path.cwd()
    moved, sources = _prompt_files(experiment, here, faults)
    sources |= {path: path.relative_to(here) for path in _own_code(experiment.raw, here)}
    sources |= {path: path.relative_to(here) for path in _references(experiment, here)}
    pictured, pictures = _reward_pictures(experiment, here)
    copies = {target: path for path, target in sources.items()} | pictures
    notes = _check_rest(experiment, faults, here)
    size = sum(path.stat().st_size for path in copies.values())
    if size > MAX_MIB * 2**20:
        largest = max(copies.values(), key=lambda path: path.stat().st_size)
        faults.append(
            Fault(
                "prompts",
                f"the files that would go up have {size / 2**20:.0f} MiB, the largest is {largest}",
                f"no more than {MAX_MIB:g} MiB do; put them on storage that the cluster sees",
            )
        )
    if faults:
        raise ExperimentError(experiment.source, faults)
    for target, path in copies.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / target)
    name = f"{experiment.shared.name}.yaml"
    raw = {**experiment.raw, "prompts": _renamed(experiment.raw.get("prompts"), moved)} if moved else experiment.raw
    for reward in _with_pictures(experiment) if pictured else ():
        raw = _replaced(raw, ("rewards", reward, "options", PICTURES), pictured)
    (folder / name).write_text(write_yaml(raw), encoding="utf-8")
    files = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    return Upload(folder, name, files, sum((folder / file).stat().st_size for file in files), notes)


def _prompt_files(experiment: Experiment, here: Path, faults: list[Fault]) -> tuple[dict[str, str], dict[Path, Path]]:
    """Return how prompt sources are called up there, where that differs, and their files -> places in the folder."""
    moved: dict[str, str] = {}
    files: dict[Path, Path] = {}
    for config in experiment.corners(("prompts",)):
        for name in SETS:
            source = getattr(config.prompts, name)
            if not isinstance(source, str) or source in BUILTIN_PROMPTS:
                continue
            path = Path(source).absolute()
            root, place = here, Path()
            if not path.is_relative_to(here) or Path(source).is_absolute():
                root, place = (path if path.is_dir() else path.parent), Path("inputs") / name
                moved[source] = str(place / path.relative_to(root))
            for file in [path, *_pictures(prompt_set(config, name).prompts)]:
                if file.is_relative_to(root):
                    files |= {part: place / part.relative_to(root) for part in _files_of(file)}
                else:
                    what = f"its picture {file} lies outside of {root}, and would not be found on the cluster"
                    faults.append(
                        Fault(f"prompts.{name}", what, "put pictures beside or below the file that names them")
                    )
    return moved, files


def _pictures(prompts: tuple[str, ...]) -> Iterator[Path]:
    for prompt in prompts:
        if isinstance(prompt, Canvas) and isinstance(prompt.source, Pictured):
            named = (prompt.source.image, prompt.source.mask)
            yield from (Path(os.path.normpath(name)) for name in named if os.path.isabs(name))


def _with_pictures(experiment: Experiment) -> list[str]:
    """Return the rewards that are given pictures."""
    rewards = experiment.shared.rewards.items()
    return [name for name, section in rewards if PICTURES in section.options and not is_own(name, section)]


def _reward_pictures(experiment: Experiment, here: Path) -> tuple[dict[str, str], dict[Path, Path]]:
    """Return how pictures that rewards compare with are called up there, where that differs, and places -> files."""
    moved: dict[str, str] = {}
    files: dict[Path, Path] = {}
    for reward in _with_pictures(experiment):
        for _, source in _texts(experiment.raw["rewards"][reward]["options"][PICTURES]):
            path = Path(os.path.abspath(Path(source).expanduser()))
            is_below = path.is_relative_to(here)
            root, place = (here, Path()) if is_below else (Path(path.anchor), Path("inputs") / "pictures")
            if not is_below or Path(source).is_absolute():
                moved[source] = str(place / path.relative_to(root))
            files |= {place / file.relative_to(root): file for file in picture_files(str(path)) if file.is_file()}
    return moved, files


def _replaced(raw: Mapping[str, Any], path: Sequence[str], names: Mapping[str, str]) -> dict[str, Any]:
    """Return settings with what stands at a path renamed."""
    key, *rest = path
    return {**raw, key: _replaced(raw[key], rest, names) if rest else _renamed(raw[key], names)}


def _files_of(path: Path) -> list[Path]:
    return [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    return names.get(str(Path(value).expanduser()), names.get(value, value)) if isinstance(value, str) else value


def _own_code(raw: Mapping[str, Any], here: Path) -> set[Path]:
    """Return the modules below the current folder that rewards name, and what those import from it."""
    found: set[Path] = set()
    waiting = [match[1] for _, text in _texts(raw.get("rewards") or {}) if (match := OWN_CODE.fullmatch(text))]
    while waiting:
        for file in _module_files(waiting.pop(), here) - found:
            found.add(file)
            waiting += _imported(file, here)
    return found


def _module_files(name: str, here: Path) -> set[Path]:
    """Return the files below a folder that importing a module reads, those of its packages among them."""
    parts = name.split(".")
    packages = [here.joinpath(*parts[:count], "__init__.py") for count in range(1, len(parts) + 1)]
    return {file for file in (*packages, here.joinpath(*parts).with_suffix(".py")) if file.is_file()}


def _imported(file: Path, here: Path) -> Iterator[str]:
    """Yield the names of modules that a file imports, and of what may be one, relative ones from ``here`` on."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(here).parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)
            yield base


def _references(experiment: Experiment, here: Path) -> Iterator[Path]:
    """Yield the files of reference images, which are small, below the current folder."""
    for section in experiment.shared.rewards.values():
        named = section.trust.reference
        if named not in (None, "builtin") and (path := Path(named).absolute()).is_relative_to(here):
            yield from _files_of(path)


def _check_rest(experiment: Experiment, faults: list[Fault], here: Path) -> tuple[str, ...]:
    """Note paths of weights and runs, which do not go up; a relative one means nothing up there."""
    notes: list[str] = []
    for where, text in _texts(experiment.raw):
        path = Path(text).expanduser()
        if text == "builtin" or not WEIGHTS_OR_RUNS.fullmatch(where) or not path.exists():
            continue
        if any(where.startswith(f"rewards.{reward}.options.{PICTURES}") for reward in _with_pictures(experiment)):
            continue
        if path.is_absolute():
            notes.append(f"{where}: {text} must be there on every node")
        else:
            what = f"weights and runs do not go up, got {text!r}, which is below {here}"
            faults.append(Fault(where, what, "give a path that every node has, or a model of the Hugging Face hub"))
    return tuple(notes)


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted path and text of every text in nested settings."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(part, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, where)
