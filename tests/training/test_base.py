"""The base model's measurements on disk."""

import tracemalloc
from pathlib import Path

import numpy as np

from rltune.rewards.mixture import Calibration
from rltune.training.base import BaseReference, load_base, save_base
from rltune.training.evaluation import drift
from rltune.training.units import Unit


def test_what_is_saved_is_loaded_and_its_images_are_read_when_they_are_looked_at(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 128, 128, 3), dtype=np.uint8)  # 1.6 MB
    calibration = {"a": Calibration(1.0, 0.5, (0.5, 1.5))}
    saved = BaseReference(calibration, {"a": np.array([1.0, 2.0])}, pixels, {"a": Unit(0.5, "standard deviation")})
    save_base(tmp_path / "base", saved)
    tracemalloc.start()
    loaded = load_base(tmp_path / "base")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded is not None
    assert peak < 5e5  # a spread is wanted more often than the images
    assert (loaded.calibration, loaded.units) == (saved.calibration, saved.units)
    assert loaded.values["a"].tolist() == [1.0, 2.0]
    assert drift(loaded.pixels_NHW3, pixels, 2).tolist() == [0.0] * 16
