"""Prompt sets: shipped by name, written out, or from a file. What is no list of prompts is refused, not trained on."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltune.assets import BUILTIN_PROMPTS
from rltune.errors import UserError

COLUMNS = ("prompt", "caption", "text")
"""Columns of a table that prompts are read from, whatever their case; ``prompt`` goes before the other two."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
KINDS = "a text file with one prompt a line, .csv, .tsv, .json, .jsonl or .parquet"
TO_JSONL = 'write its prompts as JSON lines, as {"prompt": "a cat"}, into a .jsonl file'
MAGIC = {b"PAR1": "a parquet file", b"ARROW1": "an Arrow file", b"PK\x03\x04": "a zip or Excel file"}
MAGIC |= {b"\x1f\x8b": "a gzip file", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text"}
"""First bytes of files that people have prompts in, and that are no text."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and how they were come by."""

    prompts: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What a user should know: the column they are from, what was left out."""
    beside: tuple[Mapping[str, Any], ...] = ()
    """Of each prompt the other columns that were asked for, as far as the table has them; none where it is no table."""


def shortened(text: str, length: int = 60) -> str:
    """Return a text in quotes for a line of its own: what does not print is escaped, what is long is cut in the middle.

    A prompt's end tells as much as its beginning.
    """
    half = (length - 4) // 2
    return repr(text if len(text) <= length else f"{text[:half]} .. {text[-half:]}")


def cut_in_words(cut: Mapping[str, str], prompts: Sequence[str]) -> str:
    """Say which prompts are longer than the text encoder reads; empty if none is.

    Args:
        cut: Prompt -> the end of it that is not read.
        prompts: All of them; one that is there twice counts twice.
    """
    if not cut:
        return ""
    prompt, lost = next(iter(cut.items()))
    num_cut = sum(each in cut for each in prompts)
    are = "is" if num_cut == 1 else "are"
    return (
        f"{num_cut} of {len(prompts)} prompts {are} longer than the text encoder reads: of {shortened(prompt)} it "
        f"does not see {shortened(lost)}"
    )


class _NoList(Exception):  # noqa: N818 - it says what a file is not
    """What a file is instead of a list of prompts, and what to do."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def read_prompts(source: str | Sequence[str], *, where: str) -> tuple[str, ...]:
    """Return the prompts of a set, in order: those of ``load_prompts``.

    Raises:
        UserError: As there.
    """
    return load_prompts(source, where=where).prompts


def load_prompts(source: str | Sequence[str], *, where: str, beside: Sequence[str] = ()) -> PromptSet:
    """Return the prompts of a set, in order, and how they were come by.

    A text file has a prompt a line; empty lines and lines that start with ``#`` are left out. A table (``.csv``,
    ``.tsv``, ``.parquet``, ``.json`` or ``.jsonl`` of objects) is read by its column ``prompt``, else by ``caption`` or
    ``text``; JSON may also be a list of strings. Prompts that are written out are taken as they stand.

    Args:
        source: ``builtin``, ``builtin-heldout``, the path of a file, or the prompts themselves.
        where: Path of the setting in the experiment, for messages.
        beside: Other columns to read.

    Raises:
        UserError: The file cannot be read, or is no list of prompts, or there is no prompt.
    """
    if not isinstance(source, str):
        blank = next((i for i, prompt in enumerate(source) if not prompt.strip()), None)
        if blank is not None:
            raise UserError(f"{where}[{blank}]: a prompt must say something, got {source[blank]!r}; delete it")
        if not source:
            raise UserError(f"{where}: the list holds no prompt; give at least one")
        return PromptSet(tuple(source))
    path = BUILTIN_PROMPTS.get(source, Path(source).expanduser())
    try:
        found = _read_file(path, beside)
    except OSError as error:
        remedy = f"give {', '.join(BUILTIN_PROMPTS)}, a list, or {KINDS}"
        raise UserError(f"{where}: prompts cannot be read ({error.strerror}), got {source!r}; {remedy}") from error
    except _NoList as error:
        raise UserError(f"{where}: {error.what}, got {source!r}; {error.remedy}") from error
    if not found.prompts:
        raise UserError(f"{where}: the file holds no prompt, got {source!r}; give at least one")
    return found


def _read_file(path: Path, beside: Sequence[str]) -> PromptSet:
    if path.is_dir():
        raise _NoList("this is a folder", f"name a file in it: {KINDS}; of a dataset, {TO_JSONL}")
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _read_parquet(path, beside)
    content = path.read_bytes()
    for magic, what in MAGIC.items():
        if content.startswith(magic):
            remedy = "save it as UTF-8" if "text" in what else f"name it .parquet if it is one, or {TO_JSONL}"
            raise _NoList(f"this is {what}", remedy)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text, byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise _NoList(what, "save it as UTF-8") from None
    if "\0" in text:
        raise _NoList("this is no text, it holds a NUL", TO_JSONL)
    readers: dict[str, Callable[[str, Sequence[str]], PromptSet]] = {".json": _read_json, ".jsonl": _read_jsonl}
    if kind in DELIMITERS:
        return _read_table(text, DELIMITERS[kind], beside)
    return readers[kind](text, beside) if kind in readers else _read_lines(text)


def _read_lines(text: str) -> PromptSet:
    """Read one prompt a line. Lines end at ``\\n`` alone: Unicode's own breaks may stand in a prompt."""
    if "\n" not in text and "\r" in text.strip():
        raise _NoList("its lines end in carriage returns alone", "save it with line ends of Unix or Windows")
    lines = [line.strip() for line in text.split("\n")]
    _refuse_other_kinds(text, next((line for line in lines if line), ""))
    comments = sum(line.startswith("#") for line in lines)
    notes = (f"{_count(comments, 'line')} with # left out",) if comments else ()
    return PromptSet(tuple(line for line in lines if line and not line.startswith("#")), notes)


def _refuse_other_kinds(text: str, first: str) -> None:
    """Refuse tables and JSON under the name of a text file."""
    if first.startswith(("{", "[")):
        for part, ending in ((first, ".jsonl"), (text, ".json")):
            try:
                if isinstance(json.loads(part), list | dict):
                    raise _NoList("this is JSON, not one prompt a line", f"name the file {ending}")
            except ValueError:
                continue
    for delimiter, ending in ((",", ".csv"), ("\t", ".tsv"), (";", ".csv, and with commas instead of semicolons")):
        cells = [cell.strip('"') for cell in first.split(delimiter)]
        # a line of tags, as in "text, poster", has spaces; a table's head has none
        if all(re.fullmatch(r"\w+", cell) for cell in cells) and any(cell.lower() in COLUMNS for cell in cells):
            raise _NoList(f"its first line is a table's, {first!r}", f"name the file {ending}, or delete that line")


def _read_table(text: str, delimiter: str, beside: Sequence[str]) -> PromptSet:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next((row for row in rows if row), [])
        column = _column(names)
        others = {name: names.index(name) for name in beside if name in names}
        values, more = [], []
        for row in rows:
            if row and len(row) != len(names):  # a comma outside of quotes would cut a prompt short
                what = f"line {rows.line_num} has {_count(len(row), 'cell')} under {_count(len(names), 'column')}"
                raise _NoList(what, "give each row as many, prompts that hold the delimiter in double quotes")
            values += [row[column]] if row else []
            more += [{name: row[i] for name, i in others.items()}] if row else []
    except csv.Error as error:
        remedy = 'put quotes within a quoted cell twice, ""'
        raise _NoList(f"line {rows.line_num} is not that of a table ({error})", remedy) from None
    return _from_column(names[column], values, more)


def _read_parquet(path: Path, beside: Sequence[str]) -> PromptSet:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        name = names[_column(names)]
        others = [other for other in beside if other in names]
        rows = parquet.read_table(path, columns=[name, *others]).to_pylist()
        return _from_column(name, [row[name] for row in rows], [_part(row, others) for row in rows])
    except pa.ArrowInvalid as error:
        raise _NoList(f"not a parquet file ({str(error).splitlines()[0]})", TO_JSONL) from None


def _read_json(text: str, beside: Sequence[str]) -> PromptSet:
    try:
        data = json.loads(text)
    except ValueError as error:
        remedy = "name the file .jsonl if every line is JSON by itself" if "Extra data" in str(error) else "mend it"
        raise _NoList(f"not JSON ({error})", remedy) from None
    if not isinstance(data, list):
        raise _NoList(f"must be a list, this is {_kind(data)}", 'write ["a cat", "a dog"] or [{"prompt": "a cat"}]')
    return _from_items(data, "item", beside)


def _read_jsonl(text: str, beside: Sequence[str]) -> PromptSet:
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except ValueError as error:
                remedy = 'write one string, or one object such as {"prompt": "a cat"}, a line'
                raise _NoList(f"line {number} is not JSON ({error})", remedy) from None
    return _from_items(items, "line", beside)


def _from_items(items: Sequence[Any], unit: str, beside: Sequence[str]) -> PromptSet:
    """Read strings, or objects that each have the column."""
    first = items[0] if items else ""
    if not isinstance(first, str | dict):
        raise _NoList(f"{unit} 1 is {_kind(first)}", 'give strings, or objects such as {"prompt": "a cat"}')
    odd = next((i for i, item in enumerate(items, start=1) if type(item) is not type(first)), None)
    if odd is not None:
        raise _NoList(f"{unit} {odd} is {_kind(items[odd - 1])}, {unit} 1 is {_kind(first)}", "let all be of one kind")
    if isinstance(first, str):
        return _kept(items)
    names = list(dict.fromkeys(name for item in items for name in item))
    name = names[_column(names)]
    lacking = next((i for i, item in enumerate(items, start=1) if name not in item), None)
    if lacking is not None:
        raise _NoList(f"{unit} {lacking} has no {name!r}", "give every one the same columns")
    return _from_column(name, [item[name] for item in items], [_part(item, beside) for item in items])


def _column(names: Sequence[str]) -> int:
    """Return which column holds the prompts."""
    known = {wanted: [i for i, name in enumerate(names) if name.strip().lower() == wanted] for wanted in COLUMNS}
    found = known["prompt"] or [*known["caption"], *known["text"]]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(repr(name[:40]) for name in names[:8]) + (" .." if len(names) > 8 else "")
    what = f"several columns may hold the prompts, {shown}" if found else f"no column holds prompts, it has {shown}"
    raise _NoList(what, f"call the one that does {COLUMNS[0]!r}" + ("" if found else ", in the first line of a table"))


def _from_column(name: str, values: Sequence[Any], beside: Sequence[Mapping[str, Any]]) -> PromptSet:
    odd = next((value for value in values if value is not None and not isinstance(value, str)), None)
    if odd is not None:
        raise _NoList(f"column {name!r} must hold text, it has {str(odd)[:40]!r}", "give each row one prompt")
    return _kept(values, f"column {name!r}", beside=beside)


def _kept(values: Iterable[str | None], *notes: str, beside: Sequence[Mapping[str, Any]] = ()) -> PromptSet:
    stripped = [(value or "").strip() for value in values]
    blank = stripped.count("")
    notes = (*notes, f"{_count(blank, 'empty one')} left out") if blank else notes
    kept = tuple(row for row, prompt in zip(beside, stripped, strict=False) if prompt)
    return PromptSet(tuple(prompt for prompt in stripped if prompt), notes, kept)


def _part(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if name in row}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
