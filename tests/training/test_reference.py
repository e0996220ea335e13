"""The base model's measurements on disk, and one measurement whoever asks for it at the same time."""

import shutil
import threading
import tracemalloc
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rltune.rewards.mixture import Calibration
from rltune.runs.base_scores import BaseScores
from rltune.runs.metrics import Unit
from rltune.training import loop
from rltune.training import reference as base_module
from rltune.training.evaluation import drift
from rltune.training.reference import BaseReference, Claim, load_base, save_base


def test_what_is_saved_is_loaded_and_its_images_are_read_when_they_are_looked_at(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 128, 128, 3), dtype=np.uint8)  # 1.6 MB
    calibration = {"a": Calibration(1.0, 0.5, (0.5, 1.5))}
    scores = BaseScores(
        {"a": np.array([1.0, 2.0])}, {"a": Unit(0.5, "standard deviation")}, {"a": np.linspace(0, 1, 32) / 3}
    )
    saved = BaseReference(scores, calibration, pixels)
    save_base(tmp_path / "base", saved)
    tracemalloc.start()
    loaded = load_base(tmp_path / "base")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded is not None
    assert peak < 5e5  # a spread is wanted more often than the images
    assert (loaded.calibration, loaded.scores.units) == (saved.calibration, scores.units)
    assert loaded.scores.values["a"].tolist() == [1.0, 2.0]
    assert (loaded.samples.values["a"] == scores.image_values["a"]).all()
    assert drift(loaded.pixels_NHW3, pixels, 2).tolist() == [0.0] * 16


# ---- several that ask at once


def reference(value: float) -> BaseReference:
    return BaseReference(BaseScores({"brightness": np.array([value])}), {}, np.zeros((1, 2, 2, 3), np.uint8))


def run_of(rank: int = 0) -> Any:
    workers = SimpleNamespace(is_main=rank == 0, gather=lambda items: items)
    config = SimpleNamespace(evaluate=SimpleNamespace(judges=()))
    images = {"calibration_images": None, "eval_images": None, "eval_batch": 4, "sampler": None, "rewards": {}}
    return SimpleNamespace(workers=workers, config=config, **images)


def test_of_several_trials_one_measures_and_the_others_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, may_end, measured = threading.Event(), threading.Event(), []

    def measure(*_: Any, **__: Any) -> BaseReference:
        measured.append(threading.get_ident())
        started.set()
        assert may_end.wait(60)
        return reference(float(len(measured)))

    monkeypatch.setattr(loop, "measure_base", measure)
    monkeypatch.setattr(loop, "WAIT_S", 0.01)
    found: list[BaseReference] = []
    threads = [
        threading.Thread(target=lambda: found.append(loop._reference(run_of(), tmp_path / "base" / "key")))
        for _ in range(3)
    ]
    threads[0].start()
    assert started.wait(60)
    for thread in threads[1:]:
        thread.start()
    may_end.set()
    for thread in threads:
        thread.join(60)
    assert len(measured) == 1
    assert [float(base.scores.values["brightness"][0]) for base in found] == [1.0] * 3
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["key"]


def test_who_dies_while_it_measures_leaves_it_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> BaseReference:
        raise RuntimeError("CUDA error")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "measure_base", fail)
        with pytest.raises(RuntimeError, match="CUDA error"):
            loop._reference(run_of(), tmp_path / "key")
    monkeypatch.setattr(loop, "measure_base", lambda *_, **__: reference(2.0))
    assert float(loop._reference(run_of(), tmp_path / "key").scores.values["brightness"][0]) == 2.0


def test_where_no_lock_is_to_be_had_who_saves_first_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(base_module.fcntl, "flock", no_locks)
    with closing(Claim(tmp_path / "key")) as first, closing(Claim(tmp_path / "key")) as second:
        assert first.take()
        assert second.take()
    save_base(tmp_path / "key", reference(1.0))
    # the other has looked before and seen nothing
    monkeypatch.setattr(Path, "exists", lambda self: False)
    save_base(tmp_path / "key", reference(2.0))
    kept = load_base(tmp_path / "key")
    assert kept is not None
    assert float(kept.scores.values["brightness"][0]) == 1.0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["key"]


def test_another_worker_waits_until_it_sees_what_the_first_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "elsewhere", reference(3.0))
    monkeypatch.setattr(loop, "WAIT_S", 0.01)
    run = run_of(rank=1)
    run.workers.gather = lambda items: ["load", *items]

    def comes() -> None:
        shutil.copytree(tmp_path / "elsewhere", tmp_path / "partial")
        (tmp_path / "partial").rename(tmp_path / "key")

    timer = threading.Timer(0.1, comes)
    timer.start()
    base = loop._reference(run, tmp_path / "key")
    timer.join()
    assert float(base.scores.values["brightness"][0]) == 3.0
