from pathlib import Path

import pytest

from rltune.orchestration import places
from rltune.orchestration.places import Place
from tests.cli.conftest import Call


@pytest.mark.parametrize(
    ("place", "token", "code", "line"),
    [
        (Place(Path("/a"), is_ray_s_own=True), Path("/h"), 0, "ok   Ray keeps its files in /a/ray"),
        (
            Place(Path("/a"), is_ray_s_own=False, fault="it is [b]"),
            Path("/h"),
            0,
            "note Ray keeps its files in /a/ray, not below TMPDIR: it is [b]",
        ),
        (
            Place(Path("/a"), is_ray_s_own=True, fault="it is bad", is_usable=False),
            Path("/h"),
            1,
            "bad  a Ray cluster of a run cannot keep its files in /a: it is bad; set RAY_TMPDIR to a folder with a "
            "short path that can be written",
        ),
        (
            Place(Path("/a"), is_ray_s_own=True),
            None,
            0,
            "note HOME is not there or cannot be written; a run keeps Ray's token in its environment",
        ),
    ],
    ids=["ray's own", "another", "none", "no home"],
)
def test_the_doctor_says_where_ray_keeps_its_files(
    call: Call, monkeypatch: pytest.MonkeyPatch, place: Place, token: Path | None, code: int, line: str
) -> None:
    monkeypatch.setattr(places, "find_place", lambda: place)
    monkeypatch.setattr(places, "token_folder", lambda: token)
    got, out, err = call("doctor")
    assert got == code
    assert line in out.splitlines()
    assert err == ("error doctor: 1 finding(s) marked bad stop every run; see above for what to do\n" if code else "")
