"""What an experiment names, by its content: base model, weights, references, own reward code. Read on the driver."""

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rltune.assets import BUILTIN_DIR, BUILTIN_PIPELINE_DIR
from rltune.config.distributions import Choice
from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment
from rltune.rewards.base import REWARDS
from rltune.rewards.references import picture_files
from rltune.runs.metrics import JUDGES
from rltune.runs.record import Pin
from rltune.training.rewards import PICTURES

WEIGHTS_OPTIONS = ("weights", "head", "model", "clip", "vocab")
"""Options of registered rewards that may name a file or folder of the user's."""
NOT_WEIGHTS = (".md", ".png", ".jpg", ".jpeg", ".webp", ".gif")
"""Files in a base model's folder that nothing is loaded from."""

Stamp = tuple[int, int, int]
_known: dict[tuple[str, Stamp], str] = {}
"""(path, stamp) -> sha256 of what this process has read or been told."""


def find_pins(experiment: Experiment, before: Sequence[Pin] = ()) -> tuple[Pin, ...]:
    """Return everything that an experiment names, pinned.

    A file is read in full, unless its size and times are those of ``before``.

    Args:
        experiment: With relative paths from the current folder.
        before: Pins of the same run.
    """
    for pin in before:
        _known.update({(file, (row[0], row[1], row[2])): row[3] for file, row in pin.files.items()})
    pins = [*_base_pins(experiment.shared), *_start_pins(experiment)]
    for name in experiment.shared.rewards:
        pins += _reward_pins(experiment, name)
    for judge in experiment.shared.evaluate.judges:
        if judge not in JUDGES and judge not in experiment.shared.rewards:
            pins += _published(f"evaluate.judges.{judge}", judge)
    return tuple(pins)


def digests_for(config: RunConfig, pins: Sequence[Pin]) -> dict[str, str]:
    """Return setting -> digest of what a concrete experiment names, of the pins that have one."""
    named = config.model_dump(mode="json")
    return {pin.setting: pin.digest for pin in pins if pin.digest and _at(named, pin.setting) in (pin.named, None)}


def _at(settings: Any, path: str) -> Any:
    for name in path.split("."):
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings if isinstance(settings, str) else None


def _base_pins(config: RunConfig) -> Iterator[Pin]:
    base, file = config.model.base, Path(config.model.base).expanduser()
    if not file.is_file():
        yield _pipeline_pin("model.base", base, config.model.revision)
        return
    yield _pin("model.base", base, file, [file])
    if config.model.config is not None:
        yield _pipeline_pin("model.config", config.model.config, None)


def _pipeline_pin(setting: str, base: str, revision: str | None) -> Pin:
    folder = BUILTIN_PIPELINE_DIR if base == "builtin" else Path(base).expanduser()
    if folder.is_dir():
        inside = (Path(top) / name for top, name in _walk(folder))
        return _pin(setting, base, folder, [path for path in inside if path.suffix.lower() not in NOT_WEIGHTS])
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, "model_index.json", revision=revision)
    except HFValidationError:  # a folder that is not there
        found = None
    return Pin(setting, base, Path(found).parent.name if isinstance(found, str) else "")


def _start_pins(experiment: Experiment) -> Iterator[Pin]:
    for given in _candidates(experiment, "model.lora.start", experiment.lora.start):
        if given is not None:
            yield _pin("model.lora.start", given, Path(given).expanduser(), _files(Path(given).expanduser()))


def _reward_pins(experiment: Experiment, name: str) -> Iterator[Pin]:
    section, place = experiment.shared.rewards[name], f"rewards.{name}"
    for kind in _candidates(experiment, f"{place}.reward", section.reward):
        if kind is None or kind in REWARDS.names():
            yield from _published(f"{place}.reward", kind or name)
        else:
            yield _code_pin(f"{place}.reward", kind)
    is_own = ":" in (section.reward or name)
    for option, value in section.options.items():
        for given in _candidates(experiment, f"{place}.options.{option}", value):
            setting = f"{place}.options.{option}"
            if option == PICTURES and not is_own:
                yield _picture_pin(setting, given)
            elif option == "function" and isinstance(given, str) and ":" in given:
                yield _code_pin(setting, given)
            elif isinstance(given, str) and given and (is_own or option in WEIGHTS_OPTIONS):
                path = Path(given).expanduser()
                if path.is_file() or (path.is_dir() and not is_own):
                    yield _pin(setting, given, path, _files(path))
    for given in _candidates(experiment, f"{place}.trust.reference", section.trust.reference):
        if given is not None and given != "builtin":
            yield _pin(f"{place}.trust.reference", given, Path(given).expanduser(), _files(Path(given).expanduser()))


def _picture_pin(setting: str, given: str | Sequence[str]) -> Pin:
    """Pin pictures by what they hold, in their order, whatever they are called."""
    files = [path.absolute() for path in picture_files(given) if path.is_file()]
    rows: dict[str, list[Any]] = {str(file): [*_stamp(file), _sha256(file)] for file in files}
    root = os.path.commonpath([file.parent for file in files]) if files else ""
    named = given if isinstance(given, str) else ", ".join(given)
    return Pin(setting, named, _digest({"": [rows[str(file)][3] for file in files]}) if files else "", root, rows)


def _candidates(experiment: Experiment, path: str, value: Any) -> Sequence[Any]:
    """Return what a setting may be: the options of a choice, or its value."""
    kind = experiment.space.get(path)
    return kind.options if isinstance(kind, Choice) else [value]


def _published(setting: str, kind: str) -> Iterator[Pin]:
    """Pin weights that are published, where they are on this machine, or that ship with rltune."""
    if kind not in REWARDS.names():
        return
    card = REWARDS.card(kind)
    if card.is_shipped:
        weights = BUILTIN_DIR / "weights"
        shipped = [path for path in _files(weights) if not path.is_relative_to(BUILTIN_PIPELINE_DIR)]
        yield _pin(setting, kind, weights, shipped)
    names = {}
    for file in card.weights:
        path = file.find()
        if path is None:  # it will be fetched
            return
        # the hub's cache calls a file of weights by its digest
        names[file.file] = path.resolve().name if file.repo else _sha256(path)
    if names:
        yield Pin(setting, kind, _digest(names))


def _code_pin(setting: str, named: str) -> Pin:
    """Pin the source of ``module:name``, and of what it imports from where it lies itself."""
    module = named.partition(":")[0]
    places = (Path(entry or ".") for entry in [os.getcwd(), *sys.path])
    root = next((place for place in places if _module(place, module)), None)
    if root is None:  # not written in Python, or made by an import hook
        return Pin(setting, named, "")
    files = _sources(root.resolve(), module)
    return _pin(setting, named, root.resolve(), sorted(files))


def _sources(root: Path, module: str) -> set[Path]:
    start = _module(root, module)
    assert start is not None  # the caller has found it there
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    if any(start.is_relative_to(place) for place in installed):
        return {start}
    found, left = set[Path](), [(module, start)]
    while left:
        name, file = left.pop()
        if file in found:
            continue
        found.add(file)
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for imported in _imports(file, package):
            path = _module(root, imported)
            if path is not None and imported.split(".")[0] != "rltune":
                left.append((imported, path))
    return found


def _imports(file: Path, package: str) -> Iterator[str]:
    """Yield the dotted names that may be modules among what a file imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # whoever imports it says so
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            try:
                base = importlib.util.resolve_name(base, package) if node.level else base
            except ImportError:
                continue
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _module(root: Path, module: str) -> Path | None:
    base = root.joinpath(*module.split("."))
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def _pin(setting: str, named: str, path: Path, files: Sequence[Path]) -> Pin:
    rows: dict[str, list[Any]] = {str(file.absolute()): [*_stamp(file), _sha256(file)] for file in files}
    root = path.absolute()
    names = {str(Path(file).relative_to(root)) if root.is_dir() else "": row[3] for file, row in rows.items()}
    return Pin(setting, named, _digest(names) if names else "", str(root), rows)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    """Return a file, or those of a folder, hidden ones left out."""
    return [path] if path.is_file() else [Path(top) / name for top, name in _walk(path)]


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    for top, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        yield from ((top, name) for name in sorted(names) if not name.startswith("."))


def _sha256(path: Path) -> str:
    key = (str(path.absolute()), _stamp(path))
    if key not in _known:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def option_defaults(builder: Any) -> dict[str, Any]:
    """Return the defaults of what a registry builds, those that JSON can say."""
    defaults = {}
    for name, option in inspect.signature(builder).parameters.items():
        try:
            defaults[name] = json.loads(json.dumps(option.default))
        except TypeError:  # none, or made at each call
            continue
    return defaults
