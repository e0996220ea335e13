import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from rltune.errors import UserError
from rltune.training.prompts import load_prompts, read_prompts


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_a_file_gives_its_lines_without_comments_and_blanks(tmp_path: Path) -> None:
    found = load_prompts(write(tmp_path, "p.txt", "# animals\n a cat \n\nein Bär\n"), where="prompts.train")
    assert found.prompts == ("a cat", "ein Bär")
    assert found.notes == ("1 line with # left out",)


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbf# a comment\na cat\n", ("a cat",)),
        (b"\xef\xbb\xbfa cat\r\na dog\r\n", ("a cat", "a dog")),
        (
            "one\u2028prompt\nwith \x0b and \x85 and \x1c in it\n",
            ("one\u2028prompt", "with \x0b and \x85 and \x1c in it"),
        ),
        (
            "[cinematic] a cat\n{red|blue} star\ntext, poster\n",
            ("[cinematic] a cat", "{red|blue} star", "text, poster"),
        ),
    ],
)
def test_lines_end_at_newlines_alone_and_a_mark_is_no_text(
    tmp_path: Path, content: str | bytes, prompts: tuple[str, ...]
) -> None:
    assert read_prompts(write(tmp_path, "p.txt", content), where="prompts.train") == prompts


def test_a_list_is_taken_as_it_stands() -> None:
    written = ("#1 prize winner", " two\nlines", "a cat")
    assert read_prompts(written, where="prompts.train") == written
    with pytest.raises(UserError, match=r"^prompts\.train\[1\]: a prompt must say something, got '  '; delete it$"):
        read_prompts(("a cat", "  "), where="prompts.train")


PROMPTS = ('a "red" cat, sitting', "two\nlines", "#1")
CSV = '\ufeffid,Prompt,text\n1,"a ""red"" cat, sitting",x\n\n2,"two\nlines",\n3,#1,y\n'
ROWS = [{"caption": prompt, "id": i} for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    ("name", "content", "notes"),
    [
        ("p.csv", CSV, ("column 'Prompt'",)),
        ("P.TSV", CSV.replace(", sitting", "; sitting").replace(",", "\t").replace(";", ","), ("column 'Prompt'",)),
        ("p.json", json.dumps(PROMPTS), ()),
        ("p.json", json.dumps(ROWS), ("column 'caption'",)),
        ("p.jsonl", "\n".join(map(json.dumps, PROMPTS)), ()),
        (
            "p.jsonl",
            "\n".join(map(json.dumps, [*ROWS, {"caption": None}])),
            ("column 'caption'", "1 empty one left out"),
        ),
    ],
)
def test_tables_and_json_are_read_by_their_column(
    tmp_path: Path, name: str, content: str, notes: tuple[str, ...]
) -> None:
    found = load_prompts(write(tmp_path, name, content), where="prompts.train")
    assert (found.prompts, found.notes) == (PROMPTS, notes)


def test_a_parquet_file_is_read_by_its_column(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet"), where="prompts.train") == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", None, r"prompts cannot be read \(No such file or directory\)"),
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"# only a comment\n", "holds no prompt"),
        ("p.txt", b"\xff\xfea\0", "UTF-16 text.*save it as UTF-8"),
        ("p.txt", b"caf\xe9\n", r"not UTF-8 text, byte 0xe9 at offset 3"),
        ("p.txt", b"a\0b", "it holds a NUL"),
        ("p.txt", b"a cat\ra dog\r", "carriage returns alone"),
        ("p.txt", b"PAR1\x15\x04", "this is a parquet file.*name it .parquet"),
        ("p.xlsx", b"PK\x03\x04..", "a zip or Excel file"),
        ("p.txt", '{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "this is JSON.*name the file .jsonl"),
        ("p.txt", '[\n  "a cat",\n  "a dog"\n]\n', r"this is JSON.*name the file .json$"),
        ("p.txt", "id,prompt\n1,a cat\n", "its first line is a table's, 'id,prompt'.*name the file .csv"),
        ("p.list", "prompt\na cat\n", "its first line is a table's"),
        ("p.csv", "a cat\na dog\n", r"no column holds prompts, it has 'a cat'.*call the one that does 'prompt'"),
        ("p.csv", "prompt;id\na cat;1\n", r"no column holds prompts, it has 'prompt;id'"),
        ("p.csv", "caption,text\na,b\n", r"several columns may hold the prompts, 'caption', 'text'"),
        ("p.csv", "prompt\na cat, sitting\n", r"line 2 has 2 cells under 1 column.*in double quotes"),
        ("p.csv", 'prompt\n"a cat\na dog\n', r"is not that of a table"),
        ("p.json", '{"prompt": ["a"]}', "must be a list, this is an object"),
        ("p.json", '"a cat"\n"a dog"', "not JSON.*name the file .jsonl"),
        ("p.json", '["a cat", {"prompt": "a"}]', "item 2 is an object, item 1 is a string"),
        ("p.json", "[1, 2]", "item 1 is a number"),
        ("p.jsonl", '{"prompt": "a"}\n{"caption": "b"}', "line 2 has no 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 5}', "column 'prompt' must hold text, it has '5'"),
        ("p.jsonl", "a cat", "line 1 is not JSON"),
        ("p.parquet", "a cat", "not a parquet file"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    source = str(tmp_path / name) if content is None else write(tmp_path, name, content)
    with pytest.raises(UserError, match=rf"(?s)^prompts\.eval: .*{message}") as raised:
        read_prompts(source, where="prompts.eval")
    assert f"got {source!r}; " in str(raised.value)


def test_a_folder_is_answered_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"this is a folder, got .*; name a file in it: .*JSON lines"):
        read_prompts(str(tmp_path), where="prompts.train")


def test_shipped_sets_are_apart() -> None:
    train, held_out = (read_prompts(name, where="prompts") for name in ("builtin", "builtin-heldout"))
    assert len(train) > 100
    assert len(held_out) > 100
    assert not set(train) & set(held_out)
