"""Where workers of one machine meet."""

from pathlib import Path

import pytest

from rltune.orchestration.loopback import meeting_file


def test_each_group_meets_at_a_place_of_its_own_below_the_cluster_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert len({meeting_file() for _ in range(3)}) == 3
    assert meeting_file().parent == tmp_path
