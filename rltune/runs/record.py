"""``resolved.json``: what a run's settings meant when it was started. A resume and every reader go by it."""

import copy
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rltune
from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment, load_experiment, parse_experiment
from rltune.config.yamlfile import write_yaml
from rltune.errors import RunError, UserError
from rltune.records import from_record, to_record
from rltune.runs.layout import RunFolder
from rltune.runs.remote import opened
from rltune.runs.store import write_atomically

LIBRARIES = ("ray", "torch", "diffusers", "transformers", "peft", "accelerate", "open_clip_torch", "optuna")
_OF_SEARCH = ("search.trials", "search.prune", "search.grace", "search.reduction")
MAY_CHANGE = ("name", "track", "stop", "sweep", "resources", *_OF_SEARCH)
"""Sections and settings that may be others on a resume: how much to do, and on what."""
_KEPT = ("precision", "prefix_precision", "decoder_precision", "compile", "decoder_tiles")
MAY_NOT = tuple(f"resources.{name}" for name in _KEPT)
"""Those below ``MAY_CHANGE`` that change numbers all the same."""
OF_CODE = re.compile(r"judges\.|estimator\.(k|draw|std)$|estimator\.options\.|rewards\.[^.]+\.(reward$|options\.)")
"""Settings whose defaults are those of an estimator or a reward: readers do without."""


@dataclass(frozen=True)
class RecordedPrompts:
    """A prompt set as it was when the run was started."""

    setting: str
    """``prompts.train`` or ``prompts.eval``."""
    source: str
    """What the experiment calls it; empty where it writes the prompts out."""
    file: str
    """The run's own copy, a JSON list, relative to the run folder."""
    count: int
    sha256: str
    """Of the prompts: ``prompts_digest``."""


@dataclass(frozen=True)
class Pin:
    """Something that an experiment names, by what it held when the run was started."""

    setting: str
    named: str
    """As the experiment has it."""
    digest: str
    """Of the content; a commit of a model on the hub; empty where neither was to be had."""
    path: str = ""
    """Where it was, absolute; empty for what is no file here."""
    files: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """File -> size, times of change in ns and sha256: one that has the first three still need not be read again."""


@dataclass(frozen=True)
class Record:
    """What a run's settings meant when it was started."""

    started: str
    versions: Mapping[str, str]
    work_dir: str
    """Where it was started: relative paths of the experiment are meant from there."""
    settings: Mapping[str, Any]
    """Every setting, defaults included and ``auto`` precision decided; distributions as they were written."""
    base_key: str
    """Name of the base model's measurements where a trial shares them: ``base/KEY``."""
    base_settings: Mapping[str, Any]
    """What decides those measurements."""
    prompts: Sequence[RecordedPrompts] = ()
    pins: Sequence[Pin] = ()

    @property
    def precision(self) -> str:
        """Number format of the frozen networks, ``auto`` decided."""
        return str(self.settings["resources"]["precision"])


def read_record(folder: RunFolder) -> Record | None:
    """Return a run's record; None where an older version, or nobody yet, has started it.

    Raises:
        UserError: A newer version wrote it.
        RunError: It cannot be read.
    """
    file = folder.resolved_file
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        content["prompts"] = [from_record(RecordedPrompts, row, file) for row in content["prompts"]]
        content["pins"] = [from_record(Pin, row, file) for row in content["pins"]]
        return from_record(Record, content, file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: cannot be read ({error}); bring it back from a copy of the run") from error


def write_record(folder: RunFolder, record: Record) -> None:
    """Write a run's record."""
    write_atomically(folder.resolved_file, json.dumps(to_record(asdict(record)), indent=1))


def prompts_digest(prompts: Sequence[Any]) -> str:
    """Return the sha256 of a list of prompts, as a run keeps them: of pictures the content counts, and not the path."""
    return hashlib.sha256(json.dumps([_content(prompt) for prompt in prompts]).encode()).hexdigest()


def _content(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    return [prompt["prompt"], *(prompt[f"{name}_sha256"] or prompt[name] for name in ("image", "mask"))]


def base_of(export: Path, named: str) -> str:
    """Return the base model of an exported LoRA: a relative folder as it was meant where its run was started.

    Args:
        export: The LoRA's folder, perhaps still that of its run.
        named: What its card calls the base model.
    """
    record = read_record(RunFolder(export.resolve().parent.parent))
    if record is None or Path(named).expanduser().exists():
        return named
    pins = (pin for pin in record.pins if (pin.setting, pin.named) == ("model.base", named))
    return next((pin.path for pin in pins if pin.path and Path(pin.path).exists() and named != "builtin"), named)


def settled(config: RunConfig, record: Record | None) -> RunConfig:
    """Return a concrete experiment with what was decided when its run was started: precision, commit of the base."""
    if record is None:
        return config
    resources = config.resources.model_copy(update={"precision": record.precision})
    model = config.model
    pin = next((pin for pin in record.pins if pin.setting == "model.base" and pin.named == model.base), None)
    if pin is not None and not pin.path and pin.digest and model.base != "builtin":
        model = model.model_copy(update={"revision": pin.digest})
    return config.model_copy(update={"resources": resources, "model": model})


def with_own_prompts(config: RunConfig, folder: RunFolder, record: Record | None) -> RunConfig:
    """Return a concrete experiment with its prompts written out, from the run's own copies.

    Raises:
        RunError: A copy is gone or altered.
    """
    own: dict[str, Any] = {}
    for name in ("train", "eval"):
        source = getattr(config.prompts, name)
        sets = [] if record is None else [row for row in record.prompts if row.setting == f"prompts.{name}"]
        # a set that is the only one of its setting may be called otherwise by now: it has the same prompts
        found = next((row for row in sets if row.source == source), sets[0] if len(sets) == 1 else None)
        if found is not None and isinstance(source, str):
            prompts = _read_prompts(folder, found)
            # with pictures the copy itself is the set: it names them, and what they were
            own[name] = prompts if config.task == "text_to_image" else str((folder.path / found.file).absolute())
    return config.model_copy(update={"prompts": config.prompts.model_copy(update=own)})


def _read_prompts(folder: RunFolder, recorded: RecordedPrompts) -> tuple[Any, ...]:
    file = folder.path / recorded.file
    try:
        prompts = tuple(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: the run's prompts cannot be read ({error}); bring them back from a copy") from error
    if prompts_digest(prompts) != recorded.sha256:
        raise RunError(f"{file}: the run's prompts were altered; bring them back from a copy of the run")
    return prompts


def record_trial(folder: RunFolder, trial: str, config: Mapping[str, Any], base_key: str) -> None:
    """Write down what a trial is trained with: its concrete experiment, and by which versions from when on.

    Raises:
        OSError: The file cannot be written.
    """
    file, now = folder.config_file(trial), versions()
    by = list(read_trial_versions(folder, trial))
    if not by or {**by[-1], "since": ""} != {"since": "", **now}:
        by.append({"since": datetime.now(UTC).isoformat(timespec="seconds"), **now})
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"trial": trial, "base_key": base_key, "versions": by, "config": dict(config)}
    write_atomically(file, json.dumps(to_record(content), indent=1))


def read_trial_versions(folder: RunFolder, trial: str) -> Sequence[Mapping[str, str]]:
    """Return by which versions a trial was trained, oldest first; none where it was not noted."""
    file = folder.config_file(trial)
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["versions"])
    except (OSError, ValueError, LookupError):
        return []


def base_folder(folder: RunFolder, record: Record | None) -> Path:
    """Return where a run keeps what the base model measured.

    A run of a version before there were records has its only measurement under a name that nobody knows any more.

    Raises:
        RunError: Such a run has several.
    """
    if record is not None:
        return folder.base_dir / record.base_key
    found = [path for path in folder.base_dir.glob("*") if (path / "base.json").is_file()]
    if len(found) > 1:
        raise RunError(
            f"{folder.path}: was started by an older rltune, and several measurements of the base model are in "
            f"{folder.base_dir}; keep the one that trial 000 made"
        )
    return found[0] if found else folder.base_dir / "none"


def read_run(path: str | Path) -> tuple[RunFolder, Experiment]:
    """Return a run folder and its experiment, with the defaults that held when it was started.

    Raises:
        UserError: There is no run at ``path``, or a newer version started it.
        RunError: Its record cannot be read, or what it lies on does not answer.
    """
    folder = opened(path)
    if not folder.experiment_file.is_file():
        raise UserError(f"{path}: not a run folder, it has no experiment.yaml; name one such as runs/mix")
    record = read_record(folder)
    experiment = load_experiment(folder.experiment_file, must_find_files=False)
    return folder, with_recorded_defaults(experiment, record)[0]


@contextmanager
def standing_where_started(folder: RunFolder) -> Iterator[None]:
    """Stand where a run was started, while that folder is there: its experiment's relative paths are meant from there.

    Raises:
        UserError: A newer version started the run.
        RunError: Its record cannot be read.
    """
    record = read_record(folder)
    if record is None or not Path(record.work_dir).is_dir():
        yield
        return
    with chdir(record.work_dir):
        yield


def with_recorded_defaults(experiment: Experiment, record: Record | None) -> tuple[Experiment, dict[str, Any]]:
    """Return an experiment with the defaults that held when its run was started, and those that are others by now.

    Settings that it writes out are as they are, and so are those that may change on a resume.
    """
    if record is None:
        return experiment, {}
    now, then = leaves(settings_of(experiment)), leaves(record.settings)
    changed = {
        path: then[path]
        for path, value in now.items()
        if then.get(path, value) != value
        and not is_written(path, experiment.raw)
        and not may_change(path)
        and not OF_CODE.match(path)
    }
    return with_values(experiment, changed), changed


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """Return an experiment with further values written out, by dotted path."""
    if not values:
        return experiment
    raw = copy.deepcopy(dict(experiment.raw))
    for path, value in values.items():
        *sections, last = path.split(".")
        section = raw
        for name in sections:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = value
    written = parse_experiment(write_yaml(raw), experiment.source, must_find_files=False)
    return replace(written, defaults=experiment.defaults)


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """Return every setting of an experiment with defaults, in JSON's types; distributions as they are written."""
    shared = experiment.shared
    settings: dict[str, Any] = shared.model_dump(mode="json")
    settings["objectives"] = list(shared.objective_names)
    settings["model"]["lora"] = experiment.lora.model_dump(mode="json")
    for path in experiment.space:
        *sections, last = path.split(".")
        section, written = settings, experiment.raw
        for name in sections:
            section, written = section.setdefault(name, {}), written[name]
        section[last] = copy.deepcopy(written[last])
    return settings


def leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted path -> value of everything in settings that is no section."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def is_written(path: str, raw: Any) -> bool:
    """Return whether an experiment's file has a setting, or a value in place of its section; null is none."""
    for name in path.split("."):
        if not isinstance(raw, Mapping):
            return raw is not None
        if name not in raw:
            return False
        raw = raw[name]
    return raw is not None


def may_change(path: str) -> bool:
    """Return whether a setting may be another on a resume."""
    return path not in MAY_NOT and any(f"{path}.".startswith(f"{kept}.") for kept in MAY_CHANGE)


def versions() -> dict[str, str]:
    """Return what decides numbers beside settings: rltune, its libraries, Python, the machine."""
    return {
        "rltune": rltune.__version__,
        "git": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in LIBRARIES},
    }


def _git_commit() -> str:
    command = ["git", "-C", str(Path(rltune.__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
