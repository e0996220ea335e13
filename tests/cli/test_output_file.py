from pathlib import Path

import pytest
from PIL import Image

from rltune.cli.output_file import check_output, save_picture
from rltune.errors import UserError
from rltune.training import grids
from tests.cli.conftest import Call


@pytest.mark.parametrize("command", [["sample", "--prompt", "a cat"], ["builtin", "scenes"]], ids=["sample", "scenes"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grid", "must end as a picture does, got "),
        ("grid.txt", "write .png, .jpg, .webp or .tif"),
        ("grid.psd", "must end as a picture does, got "),  # which Pillow reads and does not write
        ("folder.png", "is a folder; name a file in it, such as "),
        ("file.txt/grid.png", "cannot be made, "),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_drawn(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], name: str, message: str
) -> None:
    def draw(*_: object, **__: object) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(grids, "draw_rows", draw)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").touch()
    code, out, err = call(*command, "-o", tmp_path / name)
    assert (code, out) == (2, "")
    assert f"error --output: {tmp_path}" in err or "error --output: must" in err
    assert message in err


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    for name in ("a/b/grid.PNG", "a/grid.jpeg", "grid.webp"):
        check_output(tmp_path / name)
        assert (tmp_path / name).parent.is_dir()
        assert not (tmp_path / name).exists()


def test_a_picture_that_its_kind_has_no_room_for_becomes_a_png(tmp_path: Path) -> None:
    tall = Image.new("RGB", (2, 70_000))  # a JPEG has 65,535 rows at most
    assert save_picture(tall, tmp_path / "grid.jpg") == tmp_path / "grid.png"
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    with Image.open(tmp_path / "grid.png") as written:
        assert written.size == (2, 70_000)
    with pytest.raises(UserError, match=r"gone.grid.jpg could not be written \(.*No such file"):
        save_picture(tall, tmp_path / "gone" / "grid.jpg")
