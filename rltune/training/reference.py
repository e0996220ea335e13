"""The base model as the reference of every trial: what its images score, and what a unit of each reward is.

N: images. P: prompts. H, W: image rows and columns.
"""

import fcntl
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from rltune.diffusion.sampler import Sampler
from rltune.records import to_record
from rltune.rewards.base import Reward
from rltune.rewards.mixture import Calibration, calibrate, score
from rltune.runs.base_scores import NUMBERS_FILE, BaseScores, as_numbers, read_numbers, scores_of
from rltune.training.evaluation import ImageSet, Pixels, Samples, per_prompt, sample_and_score
from rltune.training.units import measure_units
from rltune.training.workers import Workers


@dataclass(frozen=True)
class BaseReference:
    """The base model's measurements."""

    scores: BaseScores
    """On the held-out set."""
    calibration: Mapping[str, Calibration]
    """Mean and standard deviation of each raw reward on images of training prompts."""
    pixels_NHW3: Pixels
    """Held-out images, that drift is measured from."""

    @property
    def samples(self) -> Samples:
        """The held-out images and, but in runs of before, what rewards say of each."""
        return Samples(self.pixels_NHW3, self.scores.image_values)


def measure_base(
    sampler: Sampler,
    rewards: Mapping[str, Reward],
    workers: Workers,
    *,
    calibration_images: ImageSet,
    eval_images: ImageSet,
    judges: Sequence[str],
    batch_size: int,
) -> BaseReference:
    """Sample and score the model as it is; adapters must be absent or switched off."""
    raw = sample_and_score(sampler, calibration_images, rewards, workers, batch_size=batch_size, read=score)
    held_out = sample_and_score(sampler, eval_images, rewards, workers, batch_size=batch_size)
    values = per_prompt(held_out, held_out, eval_images, judges, objectives=tuple(rewards))
    units = measure_units(values, held_out, eval_images.images_per_prompt, rewards)
    return BaseReference(
        BaseScores(values, units, held_out.values),
        calibration={name: calibrate(torch.from_numpy(values_N)) for name, values_N in raw.values.items()},
        pixels_NHW3=held_out.pixels_NHW3,
    )


def save_base(folder: Path, base: BaseReference) -> None:
    """Write the reference; the folder appears whole or not at all, and one that is there already is kept."""
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    np.save(partial / "pixels.npy", base.pixels_NHW3)
    numbers = {
        "calibration": {name: asdict(unit) for name, unit in base.calibration.items()},
        **as_numbers(base.scores),
    }
    (partial / NUMBERS_FILE).write_text(json.dumps(to_record(numbers), indent=2))
    try:
        partial.rename(folder)  # never onto one that is there: a folder with files is not replaced
    except OSError:
        shutil.rmtree(partial)
        if not folder.is_dir():
            raise


class Claim:
    """Which of several processes measures a base model: theirs who took it first, until they close it or die."""

    def __init__(self, folder: Path) -> None:
        self._path = folder.with_name(f"{folder.name}.lock")
        self._file: TextIO | None = None

    def take(self) -> bool:
        """Return whether it is ours; another's is not waited for."""
        if self._file is not None:
            return True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:
            pass  # a file system without locks: several measure, and who is first to save counts
        self._file = file
        return True

    def close(self) -> None:
        """Let go of it."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def load_base(folder: Path) -> BaseReference | None:
    """Return a saved reference, or None where there is none; its images are read when they are looked at."""
    numbers = read_numbers(folder)
    if numbers is None:
        return None
    return BaseReference(
        scores_of(numbers),
        calibration={
            name: Calibration(unit["mean"], unit["std"], tuple(unit["values"]))
            for name, unit in numbers["calibration"].items()
        },
        pixels_NHW3=np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False),
    )
