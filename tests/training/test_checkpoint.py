"""What a checkpoint says of itself, and that anything that became of its files is seen before it is used."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rltune.diffusion.lora import load_lora_state
from rltune.errors import RunError, StorageError
from rltune.training.checkpoint import (
    ADAPTER_FILE,
    META_FILE,
    SELECTED_FILE,
    TRAINER_FILE,
    Evaluated,
    Progress,
    Selected,
    load_adapter,
    load_checkpoint,
    newest_whole,
    read_checkpoint_meta,
    save_checkpoint,
    why_not_handed_on,
    why_not_whole,
)

FILES = (ADAPTER_FILE, META_FILE, SELECTED_FILE, TRAINER_FILE)
PRESENT = {"lora_A": torch.arange(6.0).reshape(2, 3)}
EARLIER = {"lora_A": -torch.arange(6.0).reshape(2, 3)}
BEST = Evaluated(20, {"eval/brightness": 0.7, "gain/brightness": 0.2})
LAST = Evaluated(40, {"eval/brightness": 0.6, "gain/brightness": 0.1})


class Held:
    """A part that counts how often it is given a state."""

    def __init__(self) -> None:
        self.num_loaded = 0

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": torch.ones(3)}

    def load_state_dict(self, state: Any) -> None:
        self.num_loaded += 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint_1"
    save(path, Progress(step=40, images_seen=160, queries=160))
    return path


def save(path: Path, progress: Progress) -> None:
    save_checkpoint(path, PRESENT, {"held": Held()}, progress, last=LAST, selected=Selected(BEST, EARLIER))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_says_what_it_holds(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert why_not_whole(folder) == ""
    meta = read_checkpoint_meta(folder)
    assert meta.progress == Progress(step=40, images_seen=160, queries=160)
    assert (meta.last, meta.selected) == (LAST, BEST)
    assert meta.metrics == {
        "step": 40.0,
        "images_seen": 160.0,
        "queries": 160.0,
        "calls": 0.0,
        "selected_step": 20.0,
        **BEST.metrics,
    }
    assert meta.files.keys() == {ADAPTER_FILE, SELECTED_FILE, TRAINER_FILE}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == meta.files[name] for name in meta.files)


def test_what_is_handed_on_is_the_selected_where_it_is_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    assert torch.equal(load_adapter(folder)["lora_A"], EARLIER["lora_A"])
    for name, selected in (("last", None), ("now", Selected(LAST, EARLIER))):
        save_checkpoint(tmp_path / name, PRESENT, {}, Progress(40, 160), last=LAST, selected=selected)
        assert not (tmp_path / name / SELECTED_FILE).exists()
        assert torch.equal(load_adapter(tmp_path / name)["lora_A"], PRESENT["lora_A"])
        assert read_checkpoint_meta(tmp_path / name).metrics["selected_step"] == 40
    save_checkpoint(tmp_path / "none", PRESENT, {}, Progress(3, 12))
    assert read_checkpoint_meta(tmp_path / "none").metrics == {
        "step": 3.0,
        "images_seen": 12.0,
        "queries": 0.0,
        "calls": 0.0,
    }


@pytest.mark.slow
def test_every_bit_flipped_in_what_it_says_of_itself_is_seen(folder: Path) -> None:
    for at in range((folder / META_FILE).stat().st_size):
        flip(folder / META_FILE, at)
        assert why_not_whole(folder) == f"{META_FILE} is not as it was written"
        flip(folder / META_FILE, at)
    assert why_not_whole(folder) == ""


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "first bit": lambda path: flip(path, 0),
    "last bit": lambda path: flip(path, -1),
    "half": cut(0.5),
    "empty": cut(0),
    "a byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_nothing_is_changed(
    folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(folder / name)
    what = "is not as it was written" if (folder / name).exists() else "is missing"
    assert why_not_whole(folder) == f"{name} {what}"
    held, network = Held(), nn.Linear(2, 2)
    before, random_state = network.weight.clone(), torch.get_rng_state()
    with pytest.raises(RunError, match=rf"checkpoint_1: cannot be resumed from \({name} {what}\)"):
        load_checkpoint(folder, partial(load_lora_state, network), {"held": held})
    assert held.num_loaded == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(network.weight, before)
    if name in (SELECTED_FILE, META_FILE):  # which is the one that it hands on, and says so
        assert why_not_handed_on(folder) == f"{name} {what}"
        with pytest.raises(RunError, match=rf"checkpoint_1: is not whole \({name} {what}\)"):
            load_adapter(folder)
    else:
        assert why_not_handed_on(folder) == ""
        assert torch.equal(load_adapter(folder)["lora_A"], EARLIER["lora_A"])


def test_meta_that_cannot_be_read_is_a_fault_with_its_folder(folder: Path) -> None:
    (folder / META_FILE).write_text(json.dumps({"step": 40, "images_seen": 160}))  # as an older version wrote it
    with pytest.raises(RunError, match=r"checkpoint_1: cannot be read \(checkpoint\.json is not as it was written\)"):
        read_checkpoint_meta(folder)


def test_the_newest_whole_checkpoint_is_found_behind_broken_ones(tmp_path: Path) -> None:
    storage = tmp_path / "checkpoints"
    assert newest_whole(storage) == (None, {})
    names = [f"checkpoint_2026-01-0{day}_10-00-00.000000" for day in (1, 2, 3, 4)]
    # the run folder was given another name in between, and with it Ray's folder
    paths = [storage / job / name for job, name in zip(("b-001", "b-001", "a-001", "a-001"), names, strict=True)]
    for step, path in enumerate(paths):
        save(path, Progress(step, 4 * step))
    (storage / "a-001" / ".validate_storage_marker").touch()
    assert newest_whole(storage) == (paths[3], {})
    (paths[3] / TRAINER_FILE).unlink()  # a copy that a kill cut short
    assert newest_whole(storage) == (paths[2], {paths[3]: "trainer.pt is missing"})
    flip(paths[2] / ADAPTER_FILE, 20)
    found, passed = newest_whole(storage)
    assert found == paths[1]
    assert list(passed) == [paths[3], paths[2]]
    for path in paths[:2]:
        shutil.rmtree(path)
        path.mkdir()
    assert newest_whole(storage)[0] is None
    assert len(newest_whole(storage)[1]) == 4


def test_a_checkpoint_of_another_adapter_is_refused(folder: Path) -> None:
    def refuse(state: dict[str, Tensor]) -> None:
        raise ValueError("adapter keys differ")

    with pytest.raises(RunError, match="cannot be resumed from \\(adapter keys differ"):
        load_checkpoint(folder, refuse, {})


def test_a_full_disk_leaves_the_old_checkpoint_and_no_part_of_the_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="checkpoint_1: no space left on device; free some, the same command resum"):
        save(folder, Progress(step=60, images_seen=240))
    assert read_checkpoint_meta(folder).progress.step == 40
    assert why_not_whole(folder) == ""
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint_1"]
