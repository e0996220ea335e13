"""What a run needs to go on as if it had never stopped: adapters, optimiser, random state, progress; one folder."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from rltune.errors import RunError, writing
from rltune.records import check_schema, from_record, to_record

ADAPTER_FILE = "adapter.safetensors"
"""The adapters as they are at the checkpoint's own step."""
SELECTED_FILE = "selected.safetensors"
"""The adapters that ``evaluate.select`` chose, where they are those of an earlier step."""
TRAINER_FILE = "trainer.pt"
META_FILE = "checkpoint.json"
OWN = "own/"
"""Before a metric's name in a report: of the report's own step, where another one is selected."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Rounds done."""
    images_seen: int
    queries: int = 0
    """Reward queries made, over all workers."""
    calls: int = 0
    """Passes of an image through the network, over all workers; see ``Tally``."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on held-out prompts."""

    step: int
    """Rounds done when it was made."""
    metrics: Mapping[str, float]
    """``eval/NAME``, ``gain/NAME`` and their standard errors."""


@dataclass(frozen=True)
class Selected:
    """An evaluation with the adapters that gave it."""

    evaluated: Evaluated
    adapter: Mapping[str, Tensor]
    """peft's key names."""


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says of itself."""

    progress: Progress
    last: Evaluated | None = None
    """The last evaluation before it or at it."""
    selected: Evaluated | None = None
    """The evaluation that ``evaluate.select`` chose; None where the last one counts."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> sha256 of every other file of the folder."""

    @property
    def metrics(self) -> dict[str, float]:
        """What a report at this point says: how far the run is, and what the adapters it hands on were measured at."""
        return report_of(self.progress, self.selected or self.last)


def report_of(progress: Progress, counted: Evaluated | None, last: Evaluated | None = None) -> dict[str, float]:
    """Return a run's progress with the metrics that count for it, and the step they were measured at.

    Where those are of an earlier step than the ``last`` evaluation, which is of this one, its own go along under
    ``own/``: see ``own_metrics``.
    """
    metrics = {name: float(value) for name, value in asdict(progress).items()}
    if counted is None:
        return metrics
    metrics |= dict(counted.metrics) | {"selected_step": float(counted.step)}
    if last is not None and counted.step < last.step == progress.step:
        metrics |= {f"{OWN}{name}": value for name, value in last.metrics.items()}
    return metrics


def own_metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report with what its very step measured in the place of what was selected: as in ``metrics.jsonl``."""
    own = {name.removeprefix(OWN): value for name, value in report.items() if name.startswith(OWN)}
    return {**report, **own}


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    progress: Progress
    last: Evaluated | None = None
    selected: Selected | None = None


class Part(Protocol):
    """Something that a checkpoint holds: an optimiser, a moving average, what an estimator learns."""

    def state_dict(self) -> Any:
        """Return its state."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Take over a state."""
        ...


def save_checkpoint(
    folder: Path,
    adapter: Mapping[str, Tensor],
    parts: Mapping[str, Part],
    progress: Progress,
    *,
    last: Evaluated | None = None,
    selected: Selected | None = None,
) -> None:
    """Write a checkpoint; ``folder`` appears whole or not at all.

    Args:
        folder: Where to.
        adapter: The present values of what is evaluated and exported, peft's key names.
        parts: What training goes on with. The network's own adapters are ``parts`` too where they are not ``adapter``.
        progress: How far the run has come.
        last: The last evaluation.
        selected: What ``evaluate.select`` chose; None where the last one counts.

    Raises:
        StorageError: There is no room, or the folder cannot be written.
    """
    trainer = {
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    buffer = io.BytesIO()  # the libraries' own writers do not say that a disk is full
    torch.save(trainer, buffer)
    contents = {ADAPTER_FILE: save(dict(adapter)), TRAINER_FILE: buffer.getvalue()}
    if selected is not None and selected.evaluated.step != progress.step:
        contents[SELECTED_FILE] = save(dict(selected.adapter))
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    meta = CheckpointMeta(progress, last, selected.evaluated if selected else None, files)
    contents[META_FILE] = _meta_text(to_record(asdict(meta))).encode()
    partial = folder.with_name(folder.name + ".partial")
    try:
        with writing(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, content in contents.items():
                (partial / name).write_bytes(content)
                _flush(partial / name)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(
    folder: Path, load_adapters: Callable[[dict[str, Tensor]], None], parts: Mapping[str, Part]
) -> Resumed:
    """Put a checkpoint's state into freshly built objects of the same shapes, and return where it goes on.

    ``load_adapters`` puts in the adapters' values. It comes first, then ``parts`` in their order. A checkpoint that is
    not whole changes nothing.

    Raises:
        RunError: The checkpoint is not whole, or belongs to another adapter.
    """
    try:
        meta = _whole(folder)
        load_adapters(load_file(folder / ADAPTER_FILE))
        trainer = torch.load(folder / TRAINER_FILE, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(trainer["parts"][name])
        selected = None if meta.selected is None else Selected(meta.selected, _handed_on(folder, meta))
    except Exception as error:  # what does not fit fails in as many ways as it has readers
        raise RunError(f"checkpoint {folder}: cannot be resumed from ({error}); delete this folder to go on") from error
    torch.set_rng_state(trainer["torch_rng"])
    if trainer["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(trainer["cuda_rng"])
    return Resumed(meta.progress, meta.last, selected)


def keep_newest(checkpoint: Path, target: Path, *, count: int) -> None:
    """Move a checkpoint to ``target``, which appears whole or not at all, and delete all but the newest beside it.

    Args:
        checkpoint: What ``save_checkpoint`` wrote, perhaps on another file system.
        target: Its place; names beside it sort by age.
        count: How many stay.
    """
    partial = target.with_name(f"{target.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(checkpoint, partial)
    partial.rename(target)
    _flush(target.parent)
    for old in sorted(path for path in target.parent.glob("checkpoint_*") if path.suffix != ".partial")[:-count]:
        shutil.rmtree(old)


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the adapters that a checkpoint hands on, peft's key names: the selected, or else the present.

    Raises:
        RunError: They are not as they were written. What training would go on with may be broken.
    """
    try:
        meta = _read_meta(folder)
        _check_file(folder, meta, _handed_on_file(meta))
        return _handed_on(folder, meta)
    except (ValueError, OSError) as error:
        raise RunError(f"checkpoint {folder}: is not whole ({error}); train it again") from error


def read_checkpoint_meta(folder: Path) -> CheckpointMeta:
    """Return what a checkpoint says of itself; its other files are not looked at.

    Raises:
        RunError: It cannot be read.
    """
    try:
        return _read_meta(folder)
    except (ValueError, OSError) as error:
        raise RunError(f"checkpoint {folder}: cannot be read ({error})") from error


def why_not_handed_on(folder: Path) -> str:
    """Return why the adapters that a checkpoint hands on cannot be had, empty where they can; reads no other file."""
    try:
        _check_file(folder, meta := _read_meta(folder), _handed_on_file(meta))
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def why_not_whole(folder: Path) -> str:
    """Return what is wrong with a checkpoint's files, empty where nothing is."""
    try:
        _whole(folder)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder and in those directly below it, newest first: names sort by time."""
    names = ("checkpoint_*", "step-??????")  # Ray Train's and FolderReporter's
    found = {path for name in names for at in (name, f"*/{name}") for path in folder.glob(at) if path.is_dir()}
    return sorted(found, key=lambda path: path.name, reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint of ``list_checkpoints`` that is whole, and why those newer than it are not."""
    passed: dict[Path, str] = {}
    for path in list_checkpoints(folder):
        why = why_not_whole(path)
        if not why:
            return path, passed
        passed[path] = why
    return None, passed


def _whole(folder: Path) -> CheckpointMeta:
    """Return what a checkpoint says of itself once every file has been found as it was written."""
    meta = _read_meta(folder)
    for name in meta.files:
        _check_file(folder, meta, name)
    return meta


def _check_file(folder: Path, meta: CheckpointMeta, name: str) -> None:
    if not (folder / name).is_file():
        raise ValueError(f"{name} is missing")
    with (folder / name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != meta.files[name]:
            raise ValueError(f"{name} is not as it was written")


def _handed_on_file(meta: CheckpointMeta) -> str:
    return SELECTED_FILE if SELECTED_FILE in meta.files else ADAPTER_FILE


def _handed_on(folder: Path, meta: CheckpointMeta) -> dict[str, Tensor]:
    return load_file(folder / _handed_on_file(meta))


def _meta_text(content: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"content": content, "sha256": digest}, indent=1)


def _read_meta(folder: Path) -> CheckpointMeta:
    if not (folder / META_FILE).is_file():
        raise ValueError(f"{META_FILE} is missing")
    try:
        text = (folder / META_FILE).read_bytes().decode()
        content = json.loads(text)["content"]
        is_as_written = _meta_text(content) == text
    except (ValueError, LookupError, TypeError):
        is_as_written = False
    if not is_as_written:
        raise ValueError(f"{META_FILE} is not as it was written")
    last, selected = (
        None if content[name] is None else Evaluated(content[name]["step"], content[name]["metrics"])
        for name in ("last", "selected")
    )
    check_schema(content, folder)
    return CheckpointMeta(from_record(Progress, content["progress"], folder), last, selected, content["files"])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
