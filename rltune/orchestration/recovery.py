"""What a trial goes on from after a break: its newest whole checkpoint, and smaller batches where memory ran out."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rltune.config.clashes import find_clashes
from rltune.config.experiment import RunConfig
from rltune.config.rules import Known
from rltune.orchestration.ray_private import SNAPSHOT_FILE, named_in_snapshot
from rltune.records import from_record, to_record
from rltune.runs.events import note_event
from rltune.runs.store import write_atomically
from rltune.training.checkpoint import list_checkpoints, newest_whole, read_checkpoint_meta, why_not_whole

RETRY_FILE = "retry.json"
RETRY_EVAL_BATCH = 4
"""Images sampled at a time without gradient once memory ran out."""


def resume_point(trial_dir: Path, checkpoints_dir: Path, *, is_main: bool = True) -> Path | None:
    """Return the checkpoint that a trial goes on from, None from its first step; notes what was passed over.

    Args:
        trial_dir: The trial's folder, for its events.
        checkpoints_dir: Where its checkpoints are.
        is_main: Whether this worker writes files.

    Raises:
        StorageError: The event cannot be written.
    """
    found, passed = newest_whole(checkpoints_dir)
    if passed and is_main:
        where = f"step {read_checkpoint_meta(found).progress.step}, {found.name}" if found else "its first step"
        why = ", ".join(f"{path.name} ({reason})" for path, reason in passed.items())
        note_event(trial_dir, f"went on from {where}; not whole: {why}")
    return found


def tidy_storage(train_dir: Path, *, num_to_keep: int) -> None:
    """Make a job's storage such that Ray Train starts on it, before it does.

    Ray refuses to start where its snapshot cannot be read or names a checkpoint that is gone, and deletes a whole
    checkpoint to keep a broken one. Such a snapshot is removed: which checkpoint a trial goes on from is found by
    looking. What no snapshot names, nobody deletes; so what a later whole checkpoint has replaced goes here.
    """
    checkpoints = [path for path in list_checkpoints(train_dir) if path.parent == train_dir]
    broken = {path.name for path in checkpoints if why_not_whole(path)}
    whole = [path for path in checkpoints if path.name not in broken]
    snapshot = train_dir / SNAPSHOT_FILE
    named = named_in_snapshot(snapshot)
    if named is None or not named <= {path.name for path in whole}:
        snapshot.unlink(missing_ok=True)
        named = set()
    if not whole:
        return
    replaced = [path for path in checkpoints if path.name in broken and path.name < whole[0].name]
    for path in (*replaced, *whole[num_to_keep:]):
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Retry:
    """How a trial is tried once more after memory ran out; the global batch, and so the gradient, stays."""

    micro_batch: int
    eval_batch: int
    """Images sampled at a time without gradient."""
    reason: str

    def apply(self, config: RunConfig) -> RunConfig:
        """Return the experiment with the smaller micro-batch."""
        return config.model_copy(update={"optim": config.optim.model_copy(update={"micro_batch": self.micro_batch})})


def read_retry(trial_dir: Path) -> Retry | None:
    """Return how a trial is tried once more, or None where memory has not run out."""
    path = trial_dir / RETRY_FILE
    return from_record(Retry, json.loads(path.read_text()), path) if path.is_file() else None


def plan_retry(trial_dir: Path, config: RunConfig, known: Known, reason: str, *, is_evaluation: bool) -> bool:
    """Write down how a trial is tried once more after memory ran out, and return whether there is a way.

    Args:
        trial_dir: The trial's folder.
        config: The experiment as it was tried.
        known: The rewards that compare images, which must stay together.
        reason: What ran out of memory.
        is_evaluation: Whether images were drawn without gradient: then training stays as it is.

    Raises:
        OSError: The file cannot be written.
    """
    share = config.optim.batch // config.resources.workers
    before = min(config.optim.micro_batch or share, share)
    if is_evaluation:
        after = before if config.evaluate.images_per_prompt < max(before, RETRY_EVAL_BATCH + 1) else None
    else:
        after = smaller_micro_batch(config, known)
    if after is None:
        return False
    retry = Retry(micro_batch=after, eval_batch=RETRY_EVAL_BATCH, reason=reason)
    write_atomically(trial_dir / RETRY_FILE, json.dumps(to_record(asdict(retry)), indent=2))
    change = f"{after} images at a time instead of {before} (optim.micro_batch)" if after != before else "it"
    smaller = f"{RETRY_EVAL_BATCH} at a time in evaluation"
    what = smaller if after == before else f"{change}, {smaller}"
    note_event(trial_dir, f"ran out of memory, starts once more with {what}: {reason}")
    return True


def smaller_micro_batch(config: RunConfig, known: Known) -> int | None:
    """Return the largest micro-batch of at most half the present one that an experiment allows, or None."""
    share = config.optim.batch // config.resources.workers
    before = min(config.optim.micro_batch or share, share)
    return next((size for size in range(before // 2, 0, -1) if _is_allowed(config, known, size)), None)


def _is_allowed(config: RunConfig, known: Known, micro_batch: int) -> bool:
    smaller = Retry(micro_batch, RETRY_EVAL_BATCH, "").apply(config)
    return not find_clashes(smaller, known, must_find_files=False)


def memory_kills(exceptions: Iterable[BaseException]) -> list[str]:
    """Return what Ray says of the workers that it killed to free memory, of what ended the workers of a job.

    A worker that dies of something else is said to have died of one of several causes, memory among them: that text
    does not count.
    """
    found = []
    for error in exceptions:
        text = str(error)
        if type(error).__name__ == "OutOfMemoryError" or "low on memory" in text:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            found.append(lines[0] if lines else type(error).__name__)
    return found
