"""A run on object storage and its copies: nothing that was published is lost, nothing half is taken for whole."""

from contextlib import suppress
from pathlib import Path

import pytest

from rltune.errors import StorageError
from rltune.runs.copies import Copy, is_light, is_light_or_handed_on
from rltune.runs.objects import ObjectStore


def write(copy: Copy, key: str, text: str = "x") -> None:
    file = copy.path / key
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def everything(key: str) -> bool:
    return True


def files(copy: Copy) -> set[str]:
    found = {path.relative_to(copy.path).as_posix() for path in copy.path.rglob("*") if path.is_file()}
    return {key for key in found if ".jsonl.d/" not in key}


def test_a_copy_becomes_what_was_published(store: ObjectStore, tmp_path: Path) -> None:
    driver, other = Copy(store, tmp_path / "driver"), Copy(store, tmp_path / "other")
    for key in ("experiment.yaml", "trials/001/trial.json", "prompts/eval.json", "results.jsonl", "exports/1/a.json"):
        write(driver, key, f"{key}\n")
    for key in (".lock", ".ray/x", "a.partial", "exports/1.unproved/a", "trials/001/metrics.jsonl", "base/k/base.json"):
        write(driver, key)  # private, or a worker's
    driver.publish()
    write(other, "stale.json")
    write(other, "trials/001/failure.txt")
    write(other, "confirmed.jsonl", "old\n")
    write(other, "confirmed.jsonl.d/1.jsonl", "old\n")
    write(other, ".lock")
    other.bring()
    assert files(other) == {
        *("experiment.yaml", "trials/001/trial.json", "prompts/eval.json", "results.jsonl", "exports/1/a.json"),
        ".lock",
    }
    assert (other.path / "results.jsonl").read_text() == "results.jsonl\n"


def test_what_has_not_changed_is_neither_written_nor_read_again(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, other = Copy(store, tmp_path / "driver"), Copy(store, tmp_path / "other")
    write(driver, "front.json")
    write(driver, "results.jsonl", "1\n")
    driver.publish()
    other.bring()
    again = Copy(store, other.path)  # of a process that was started anew
    again.bring()
    for call in ("write", "read"):
        monkeypatch.setattr(ObjectStore, call, lambda self, key, *_: pytest.fail(key))
    driver.publish()
    again.bring()
    again.publish()


def test_lines_of_all_who_write_are_kept(store: ObjectStore, tmp_path: Path) -> None:
    driver, worker = Copy(store, tmp_path / "driver"), Copy(store, tmp_path / "worker")
    write(driver, "trials/001/events.jsonl", "1\n")
    driver.publish("trials/001/events.jsonl")
    worker.bring("trials/001/")
    with (worker.path / "trials/001/events.jsonl").open("a") as file:
        file.write("2\nhalf")
    worker.publish("trials/001/")
    with (driver.path / "trials/001/events.jsonl").open("a") as file:
        file.write("3\n")
    driver.bring("trials/", is_exact=False)
    driver.publish("trials/001/events.jsonl")
    assert (driver.path / "trials/001/events.jsonl").read_text() == "1\n3\n2\n"
    reader = Copy(store, tmp_path / "reader")
    reader.bring()
    assert (reader.path / "trials/001/events.jsonl").read_text() == "1\n2\n3\n"


def test_lines_of_a_folder_that_was_copied_there_come_first_and_each_once(store: ObjectStore, tmp_path: Path) -> None:
    store.write("results.jsonl", b"0\n1\n")
    store.append("results.jsonl", ["1", "2"])
    copy = Copy(store, tmp_path)
    for _ in range(2):
        copy.bring()
        assert (tmp_path / "results.jsonl").read_text() == "0\n1\n2\n"
    copy.publish()
    assert len(store.list()) == 2


CHECKPOINT = "trials/001/checkpoints/trial-001/checkpoint_1"


def write_checkpoint(copy: Copy, folder: str = CHECKPOINT) -> None:
    for name in ("adapter.safetensors", "checkpoint.json", "trainer.pt"):
        write(copy, f"{folder}/{name}")


def test_what_says_that_others_are_whole_comes_last_and_goes_first(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_write, real_delete = ObjectStore.write, ObjectStore.delete
    monkeypatch.setattr(ObjectStore, "write", lambda self, *given: (calls.append(given[0]), real_write(self, *given)))
    monkeypatch.setattr(ObjectStore, "delete", lambda self, key: (calls.append(key), real_delete(self, key)))
    worker = Copy(store, tmp_path)
    write_checkpoint(worker)
    write(worker, "trials/001/metrics.jsonl")
    write(worker, "base/k/base.json")
    write(worker, "base/k/pixels.npy")
    worker.publish("base/", "trials/001/")
    names = [key.rpartition("/")[2] for key in calls]
    assert names[-2:] == ["base.json", "checkpoint.json"]
    assert set(names[:-2]) == {"pixels.npy", "adapter.safetensors", "trainer.pt", "metrics.jsonl"}
    calls.clear()
    for file in (tmp_path / CHECKPOINT).iterdir():
        file.unlink()
    worker.prune("trials/001/checkpoints/")
    assert calls[0] == f"{CHECKPOINT}/checkpoint.json"
    assert store.list("trials/001/checkpoints/") == {}


@pytest.mark.parametrize("num_writes", range(6))
def test_a_kill_between_any_two_writes_leaves_no_checkpoint_that_looks_whole(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_writes: int
) -> None:
    """The first checkpoint is whole until the second one is."""
    first, second = CHECKPOINT, CHECKPOINT[:-1] + "2"
    worker = Copy(store, tmp_path / "worker")
    write_checkpoint(worker, first)
    worker.publish("trials/001/")
    write_checkpoint(worker, second)
    for file in (worker.path / first).iterdir():
        file.unlink()
    left = [num_writes]
    for name in ("write", "delete"):
        real = getattr(ObjectStore, name)

        def counted(self: ObjectStore, *arguments: object, real: object = real) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            real(self, *arguments)  # type: ignore[operator]

        monkeypatch.setattr(ObjectStore, name, counted)
    with suppress(KeyboardInterrupt):
        worker.publish("trials/001/")
        worker.prune("trials/001/checkpoints/")
    other = Copy(store, tmp_path / "other")
    other.bring("trials/001/", wanted=everything)
    marked = [path.parent for path in other.path.rglob("checkpoint.json")]
    assert marked
    assert all({"adapter.safetensors", "trainer.pt"} <= {file.name for file in folder.iterdir()} for folder in marked)


def test_readers_ask_for_no_weights_and_judges_of_a_trial_for_its_adapters_alone() -> None:
    heavy = (f"{CHECKPOINT}/trainer.pt", "base/k/pixels.npy", "study.db", "exports/1/lora.safetensors")
    adapter = f"{CHECKPOINT}/adapter.safetensors"
    assert not any(map(is_light, (*heavy, adapter)))
    assert not any(map(is_light_or_handed_on, heavy))
    assert is_light_or_handed_on(adapter)
    assert is_light("trials/001/samples/step-000004.png")


def test_who_may_not_write_any_more_writes_nothing(store: ObjectStore, tmp_path: Path) -> None:
    def lost() -> None:
        raise StorageError("lost")

    copy = Copy(store, tmp_path, check=lost)
    write(copy, "front.json")
    write(copy, "results.jsonl", "1\n")
    for action in (copy.publish, lambda: copy.publish("results.jsonl"), lambda: copy.remove("front.json")):
        with pytest.raises(StorageError, match="lost"):
            action()
    assert store.list() == {}
