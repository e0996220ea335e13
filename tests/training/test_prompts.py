from pathlib import Path

import pytest

from rltune.errors import UserError
from rltune.training.prompts import read_prompts


def test_a_file_gives_its_lines_without_comments_and_blanks(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("# animals\n a cat \n\nein Bär\n", encoding="utf-8")
    assert read_prompts(str(path), where="prompts.train") == ("a cat", "ein Bär")


@pytest.mark.parametrize("content", [None, b"", b"# only a comment\n", b"\xff\xfe\x00"])
def test_unusable_prompts_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"prompts\.eval: .*p\.txt.*; give"):
        read_prompts(str(path), where="prompts.eval")


def test_shipped_sets_are_apart() -> None:
    train, held_out = (read_prompts(name, where="prompts") for name in ("builtin", "builtin-heldout"))
    assert len(train) > 100
    assert len(held_out) > 100
    assert not set(train) & set(held_out)
