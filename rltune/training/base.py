"""The base model as the reference of every trial: what its images score, and what a unit of each reward is.

N: images. P: prompts. H, W: image rows and columns.
"""

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from rltune.diffusion.sampling import Sampler
from rltune.rewards.base import Reward
from rltune.rewards.mixture import Calibration, calibrate, score
from rltune.training.evaluation import ImageSet, Pixels, Values, per_prompt, sample_and_score
from rltune.training.workers import Workers


@dataclass(frozen=True)
class BaseReference:
    """The base model's measurements."""

    calibration: Mapping[str, Calibration]
    """Mean and standard deviation of each raw reward on images of training prompts."""
    values: Mapping[str, Values]
    """Each reward and judge on the held-out set, ``(P,)``: the mean over each prompt's images."""
    pixels_NHW3: Pixels
    """Held-out images, that drift is measured from."""

    @property
    def spread(self) -> dict[str, float]:
        """Standard deviation over held-out prompts of each reward and judge; 0 for a single prompt."""
        return {
            name: float(values_P.std(ddof=1)) if len(values_P) > 1 else 0.0 for name, values_P in self.values.items()
        }


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
    return BaseReference(
        calibration={name: calibrate(torch.from_numpy(values_N)) for name, values_N in raw.values.items()},
        values=per_prompt(held_out, held_out.pixels_NHW3, eval_images, judges),
        pixels_NHW3=held_out.pixels_NHW3,
    )


def save_base(folder: Path, base: BaseReference) -> None:
    """Write the reference; the folder appears whole or not at all, and one that is there already is kept."""
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    np.save(partial / "pixels.npy", base.pixels_NHW3)
    numbers = {
        "calibration": {name: asdict(unit) for name, unit in base.calibration.items()},
        "values": {name: values_P.tolist() for name, values_P in base.values.items()},
    }
    (partial / "base.json").write_text(json.dumps(numbers, indent=2))
    if folder.exists():
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def load_base(folder: Path) -> BaseReference | None:
    """Return a saved reference, or None where there is none."""
    if not (folder / "base.json").is_file():
        return None
    numbers = json.loads((folder / "base.json").read_text())
    return BaseReference(
        calibration={
            name: Calibration(unit["mean"], unit["std"], tuple(unit["values"]))
            for name, unit in numbers["calibration"].items()
        },
        values={name: np.array(values_P) for name, values_P in numbers["values"].items()},
        pixels_NHW3=np.load(folder / "pixels.npy", allow_pickle=False),
    )
