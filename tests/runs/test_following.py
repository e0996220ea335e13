import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltune.runs.following import TAIL, Following


def lines(first: int, last: int) -> str:
    return "".join(json.dumps({"step": step, "text": "x" * step}) + "\n" for step in range(first, last + 1))


def steps(following: Following) -> tuple[bool, list[int]]:
    is_anew, rows = following.read()
    return is_anew, [row["step"] for row in rows]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_reading_goes_on_where_the_last_one_ended(path: Path) -> None:
    following = Following(path)
    assert steps(following) == (False, [])  # not there yet
    path.write_text(lines(1, 3))
    assert steps(following) == (True, [1, 2, 3])
    assert steps(following) == (False, [])
    append(path, lines(4, 4) + lines(5, 5)[:7])
    assert steps(following) == (False, [4])
    append(path, lines(5, 5)[7:])
    assert steps(following) == (False, [5])


def test_following_costs_what_is_new(path: Path) -> None:
    path.write_text(lines(1, 500))
    following, size = Following(path), path.stat().st_size
    following.read()
    assert following.num_bytes == size
    for step in range(501, 601):
        append(path, lines(step, step))
        assert steps(following) == (False, [step])
    assert following.num_bytes == path.stat().st_size + 100 * TAIL


def test_a_file_that_a_resume_wrote_anew_is_read_from_its_start(path: Path) -> None:
    path.write_text(lines(1, 9))
    following = Following(path)
    following.read()
    partial = path.with_suffix(".partial")
    partial.write_text(lines(1, 12))  # longer than before, and another file
    partial.replace(path)
    assert steps(following) == (True, list(range(1, 13)))


@pytest.mark.parametrize(("left", "more"), [(4, 0), (4, 1), (0, 0), (4, 30)])
def test_a_file_that_was_cut_is_read_from_its_start(path: Path, left: int, more: int) -> None:
    path.write_text(lines(1, 9))
    following = Following(path)
    following.read()
    text = lines(1, left) + lines(20, 19 + more)  # in the same file; with 30 it is longer than before
    with path.open("r+") as file:
        file.truncate(0)
        file.write(text)
    assert steps(following) == (True, [*range(1, left + 1), *range(20, 20 + more)])


def test_a_file_that_is_gone_is_void_and_may_come_again(path: Path) -> None:
    path.write_text(lines(1, 2))
    following = Following(path)
    following.read()
    path.unlink()
    assert steps(following) == (True, [])
    assert steps(following) == (False, [])
    path.write_text(lines(1, 1))
    assert steps(following) == (True, [1])


def test_what_is_no_row_is_passed_over(path: Path) -> None:
    path.write_text('{"step": 1}\n{"step": 2, "st\n\x00\x00\n[3]\n{"step": 4}\n')
    assert steps(Following(path)) == (True, [1, 4])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), max_size=12))
def test_in_pieces_of_any_size_it_says_what_it_says_at_once(sizes: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path, text, found = Path(folder) / "rows", lines(1, 12), list[int]()
        path.touch()
        following = Following(path)
        for size in [*sizes, len(text)]:
            append(path, text[:size])
            text = text[size:]
            found += steps(following)[1]
        assert found == list(range(1, 13))
