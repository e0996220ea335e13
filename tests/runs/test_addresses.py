"""An address is never taken for a folder: ``s3://bucket`` is a path to Python, of a folder ``s3:`` here."""

from pathlib import Path

import pytest

from rltune.errors import UserError
from rltune.runs.addresses import as_folder, is_address
from rltune.runs.layout import RunFolder

ADDRESSES = ("s3://bucket/runs", "gs://bucket", "memory://runs", "abfs://container@account/runs", "file:///shared/runs")
FOLDERS = ("runs", "/shared/runs", "C:/runs", "runs/s3://bucket", "a:b/runs", "s3:", "~/runs")


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_known_also_by_what_a_path_makes_of_it(address: str) -> None:
    assert is_address(address)
    assert is_address(Path(address))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_none(folder: str) -> None:
    assert not is_address(folder)
    assert as_folder(folder, "--storage") == Path(folder)


def test_it_is_refused_as_it_was_written() -> None:
    with pytest.raises(UserError, match=r"^--storage: must be a local or a shared folder.*'s3://bucket/runs'$"):
        as_folder(Path("s3://bucket/runs"), "--storage")


def test_no_run_folder_lies_at_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="s3://bucket/runs/mix"):
        RunFolder(Path("s3://bucket/runs") / "mix")
    assert not list(tmp_path.iterdir())
