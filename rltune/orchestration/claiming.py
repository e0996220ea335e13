"""A run folder is claimed by an experiment: recorded at its first start, compared with the record at every other."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rltune.config.distributions import Choice, show
from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment, load_experiment
from rltune.errors import UserError
from rltune.estimators.base import ESTIMATORS
from rltune.rewards.base import REWARDS
from rltune.runs.layout import RunFolder
from rltune.runs.metrics import JUDGES
from rltune.runs.record import (
    LIBRARIES,
    Pin,
    Record,
    RecordedPrompts,
    is_written,
    leaves,
    may_change,
    prompts_digest,
    read_record,
    settings_of,
    settled,
    versions,
    with_own_prompts,
    with_values,
    write_record,
)
from rltune.runs.store import write_atomically
from rltune.training.canvases import SETS, SetName, kept_form, prompt_set
from rltune.training.pins import digests_for, find_pins, option_defaults
from rltune.training.setup import base_key, base_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """A run folder that is an experiment's."""

    folder: RunFolder
    record: Record
    experiment: Experiment
    """With the defaults that held when the run was started."""

    def config_of(self, config: RunConfig) -> RunConfig:
        """Return a concrete experiment of this run with what was decided when it was started."""
        return settled(config, self.record)

    def key_of(self, config: RunConfig) -> str:
        """Return the name of the base model's measurements that a concrete experiment of this run shares."""
        return _base_of(config, self.folder, self.record)[0]


def check_claim(folder: RunFolder, experiment: Experiment, *, precision: str) -> Mapping[str, Any] | None:
    """Check that a run folder can be claimed by an experiment, and write nothing; arguments are those of ``claim_run``.

    Returns:
        Settings whose defaults are others by now -> their values when the run was started; None where it is still to
        be started, or nothing was measured before reward code that failed was put right.

    Raises:
        UserError: As ``claim_run``.
    """
    if not folder.experiment_file.is_file():
        return None
    record = read_record(folder)
    if record is None:
        raise UserError(
            f"{folder.path}: was started by an older rltune, which did not record what its settings meant; it can be "
            "read, but not gone on with: give another --name"
        )
    before = load_experiment(folder.experiment_file, must_find_files=False)
    pins = find_pins(experiment, record.pins)
    differences, defaults = _compare(experiment, before, record, pins, precision)
    if differences:
        raise UserError(
            f"{folder.experiment_file}: this run was started with other settings than {experiment.source} has now; "
            f"give another --name, or put the settings back to resume it: {'; '.join(differences)}"
        )
    changed, mended = [*_changed_prompts(experiment, record)], [*_changed_pins(record.pins, pins)]
    if mended and not changed and not any(folder.base_dir.glob("*/base.json")):
        return None
    if changed := [*changed, *mended]:
        raise UserError(
            f"{folder.path}: what this run was started with has changed, and two measurements in one table could not "
            f"be compared; put it back to resume, or give another --name: {'; '.join(changed)}"
        )
    return defaults


def claim_run(folder: RunFolder, experiment: Experiment, *, precision: str) -> Claim:
    """Record an experiment in a new run folder, or check that the one that is there asks the same of the same things.

    Args:
        folder: Locked by the caller.
        experiment: With relative paths from the current folder.
        precision: What ``resources.precision: auto`` is on the cluster: ``fp32`` or ``bf16``.

    Raises:
        UserError: The folder holds another experiment, what it names has changed, or cannot be read.
    """
    record = read_record(folder)
    defaults = check_claim(folder, experiment, precision=precision)
    if record is None or defaults is None:
        return _begin(folder, experiment, precision)
    for path, value in defaults.items():
        logger.warning(
            "%s is %s, the default of rltune %s that started this run; by now it is another",
            path,
            show(value),
            record.versions.get("rltune"),
        )
    _write_experiment(folder, experiment, _header(folder.experiment_file.read_text(encoding="utf-8")))
    return Claim(folder, record, with_values(experiment, defaults))


def _begin(folder: RunFolder, experiment: Experiment, precision: str) -> Claim:
    now, about = datetime.now(UTC).isoformat(timespec="seconds"), versions()
    pins = find_pins(experiment)
    settings = _full_settings(experiment, precision)
    record = Record(now, about, str(Path.cwd()), settings, "", {}, _keep_prompts(folder, experiment), pins)
    key, measured = _base_of(experiment.shared, folder, record)
    record = Record(now, about, record.work_dir, settings, key, measured, record.prompts, pins)
    write_record(folder, record)
    libraries = ", ".join(f"{name} {about[name]}" for name in LIBRARIES)
    header = f"rltune {about['rltune']}, git {about['git']}, Python {about['python']}, {about['platform']}"
    lines = (header, libraries, f"started {now}")
    _write_experiment(folder, experiment, "".join(f"# {line}\n" for line in lines))
    return Claim(folder, record, experiment)


def _base_of(config: RunConfig, folder: RunFolder, record: Record) -> tuple[str, dict[str, Any]]:
    asked = with_own_prompts(settled(config, record), folder, record)
    named = digests_for(config, record.pins)
    return base_key(asked, named), base_settings(asked, named)


def _write_experiment(folder: RunFolder, experiment: Experiment, header: str) -> None:
    write_atomically(folder.experiment_file, header + experiment.to_yaml())


def _header(text: str) -> str:
    """Return the comment that a run's first start left above its experiment."""
    lines = text.splitlines(keepends=True)
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[:count])


def _keep_prompts(folder: RunFolder, experiment: Experiment) -> tuple[RecordedPrompts, ...]:
    """Copy the prompts of every set that a trial may use into the run folder."""
    kept = []
    for name, source, number in _prompt_sources(experiment):
        prompts = kept_form(_read(experiment, name, source))
        file = folder.prompts_dir / f"{name}{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(prompts, indent=0, ensure_ascii=False) + "\n")
        shown = source if isinstance(source, str) else ""
        relative = str(file.relative_to(folder.path))
        kept.append(RecordedPrompts(f"prompts.{name}", shown, relative, len(prompts), prompts_digest(prompts)))
    return tuple(kept)


def _read(experiment: Experiment, name: SetName, source: str | Sequence[str]) -> tuple[str, ...]:
    shared = experiment.shared
    prompts = shared.prompts.model_copy(update={name: source})
    return prompt_set(shared.model_copy(update={"prompts": prompts}), name).prompts


def _prompt_sources(experiment: Experiment) -> Iterator[tuple[SetName, str | Sequence[str], str]]:
    """Yield every prompt set that a trial may use: its name, its source, its number where there are several."""
    for name in SETS:
        kind = experiment.space.get(f"prompts.{name}")
        if not isinstance(kind, Choice):
            yield name, getattr(experiment.shared.prompts, name), ""
            continue
        for number, source in enumerate(kind.options, start=1):
            yield name, str(source), f"-{number}"


def _full_settings(experiment: Experiment, precision: str) -> dict[str, Any]:
    """Return every setting, with the defaults of estimators and rewards too."""
    settings, shared = settings_of(experiment), experiment.shared
    if settings["resources"]["precision"] == "auto":
        settings["resources"]["precision"] = precision
    if "estimator.name" not in experiment.space:
        section, defaults = settings["estimator"], option_defaults(ESTIMATORS.get(shared.estimator.name))
        given = section["options"]
        for name in ("k", "draw", "std"):
            default = defaults.pop(name, None)
            if section[name] is None and name not in given:
                section[name] = default
        section["options"] = defaults | given
    for name, section in settings["rewards"].items():
        kind = shared.rewards[name].reward or name
        if kind in REWARDS.names() and f"rewards.{name}.reward" not in experiment.space:
            section["reward"] = kind
            section["options"] = option_defaults(REWARDS.get(kind)) | section["options"]
    judges = [name for name in shared.evaluate.judges if name not in JUDGES and name not in shared.rewards]
    return settings | {"judges": {name: option_defaults(REWARDS.get(name)) for name in judges}}


def _compare(
    experiment: Experiment, before: Experiment, record: Record, pins: Sequence[Pin], precision: str
) -> tuple[list[str], dict[str, Any]]:
    """Return what is asked otherwise than the run was started with, in words, and defaults that are others by now."""
    now, then = leaves(_full_settings(experiment, precision)), leaves(record.settings)
    same = {path for path, kind in experiment.space.items() if before.space.get(path) == kind}
    same |= _called_otherwise(record, pins, experiment)
    differences, defaults = [], dict[str, Any]()
    for section in ("rewards", "constraints"):
        names = [set(record.settings[section]), set(getattr(experiment.shared, section))]
        differences += [f"{section}.{name} is not there any more" for name in sorted(names[0] - names[1])]
        differences += [f"{section}.{name} is new" for name in sorted(names[1] - names[0])]
    if not is_written("objectives", before.raw) and not is_written("objectives", experiment.raw):
        same.add("objectives")  # they are the rewards
    for path in dict.fromkeys((*then, *now)):
        if may_change(path) or now.get(path) == then.get(path) or any(f"{path}.".startswith(f"{p}.") for p in same):
            continue
        is_asked, was_asked = is_written(path, experiment.raw), is_written(path, before.raw)
        if is_asked or was_asked or (path in now and path in then and path.startswith(("judges.", "resources."))):
            differences.append(f"{path} was {_shown(path, then)} and is {_shown(path, now)} now")
        elif path in now and path in then:
            defaults[path] = then[path]
    return differences, defaults


def _shown(path: str, settings: Mapping[str, Any]) -> str:
    return show(settings[path]) if path in settings else "not there"


def _called_otherwise(record: Record, pins: Sequence[Pin], experiment: Experiment) -> set[str]:
    """Return the settings that name, perhaps by another name, what the run was started with."""
    then = {pin.setting: pin.digest for pin in record.pins}
    same = {pin.setting for pin in pins if pin.digest and then.get(pin.setting) == pin.digest}
    sets = {row.setting: row.sha256 for row in record.prompts}
    for name, source, _ in _prompt_sources(experiment):
        if _prompts_of(experiment, name, source) == sets[f"prompts.{name}"]:
            same.add(f"prompts.{name}")
    return {setting for setting in same if setting not in experiment.space and not setting.endswith(".reward")}


def _prompts_of(experiment: Experiment, name: SetName, source: str | Sequence[str]) -> str:
    """Return the digest of a prompt set; empty where it cannot be read."""
    try:
        return prompts_digest(kept_form(_read(experiment, name, source)))
    except UserError:
        return ""


def _changed_prompts(experiment: Experiment, record: Record) -> Iterator[str]:
    for name, source, _ in _prompt_sources(experiment):
        setting = f"prompts.{name}"
        recorded = next((row for row in record.prompts if (row.setting, row.source) == (setting, source)), None)
        if recorded is None:
            continue  # written out: it is among the settings
        if _prompts_of(experiment, name, source) not in (
            "",
            recorded.sha256,
        ):  # gone, or not here: the run has its own copy
            count = len(_read(experiment, name, source))
            yield f"{setting}: {source!r} held {recorded.count} prompts, and holds {count} now that are not the same"


def _changed_pins(then: Sequence[Pin], now: Sequence[Pin]) -> Iterator[str]:
    present = {(pin.setting, pin.named): pin for pin in now}
    for pin in then:
        found = present.get((pin.setting, pin.named))
        if found is None or not pin.digest or found.digest == pin.digest:
            continue
        if not found.digest:
            if pin.path:
                yield f"{pin.setting}: {pin.named!r} is not there any more, it was {pin.path}"
            continue
        if not pin.path and pin.setting == "model.base":
            continue  # the hub has a newer commit: the run goes on with its own
        files = {name for name, _ in set(_contents(pin)) ^ set(_contents(found))} - {"."}
        what = f" ({', '.join(sorted(files)[:3])}{', ..' * (len(files) > 3)})" if files else ""
        yield f"{pin.setting}: {pin.named!r} is not what it was{what}"


def _contents(pin: Pin) -> list[tuple[str, str]]:
    """Return name and digest of each file of a pin."""
    return [(os.path.relpath(file, pin.path), row[3]) for file, row in pin.files.items()]
