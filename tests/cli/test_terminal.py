"""Users' text is printed as it stands, wherever it is printed, and whatever the stream behind it is."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table

from rltune.cli.live import LiveView
from rltune.cli.terminal import PlainConsole, console, errors, marked
from rltune.runs.events import append_event
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.status import read_status
from tests.cli.conftest import Call
from tests.run_folders import SEARCHED, VALUES, experiment, result, write_run

PACKAGE = Path(__file__).parents[2] / "rltune"
HOSTILE = (
    "a [red]dog[/red]",
    "[/x]",
    "[link=http://a.b]c[/link]",
    "\\[d] \\\\[/e]",
    ":smile: :warning:",
    "[@click=f]g",
)
"""What rich's markup would swallow, end at, or make a picture of."""


THINGS = {"reward": "object_count", "options": {"of": {"choice": HOSTILE}}, "weight": {"simplex": True}}
ASKED = experiment(rewards=SEARCHED["rewards"] | {"things": THINGS})


def printed(*things: object, width: int = 200) -> str:
    text = io.StringIO()
    PlainConsole(file=text, width=width).print(*things)
    return text.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_printed_as_it_stands(text: str) -> None:
    table = Table(title=text, caption=text)
    table.add_column(text, footer=text)
    table.add_row(text)
    table.add_row(Group(text))
    assert printed(text) == f"{text}\n"
    assert printed(table).count(text) == 5
    assert printed(marked(text, "red", text)) == f"{text} {text}\n"


@pytest.mark.parametrize("printer", [console, errors], ids=["output", "errors"])
def test_both_consoles_are_plain(printer: PlainConsole) -> None:
    assert isinstance(printer, PlainConsole)
    assert printer.render_str("[red]a[/x] :smile:").plain == "[red]a[/x] :smile:"
    assert not printer.render_str("3.5 /home/x").spans


def test_a_terminal_is_not_obeyed_by_text() -> None:
    screen = io.StringIO()
    shown = PlainConsole(file=screen, width=80, force_terminal=True, color_system="standard")
    shown.print("a\x1b[2Jb\x9b31mc\x07\x7fd", style="red")
    # the style is rich's own, and all that is left of the text's are letters
    assert screen.getvalue() == "\x1b[31ma[2Jb31mcd\x1b[0m\n"


@pytest.fixture
def hostile_run(tmp_path: Path) -> RunFolder:
    values = {**VALUES, "rewards.things.options.of": HOSTILE[1], "rewards.things.weight": 0.0}
    rows = [
        result(BASE_TRIAL, 0.5),
        result("001", 0.7, values=values),
        result("002", reason=f"prompt {HOSTILE[0]!r}: {HOSTILE[3]}"),
        result("003", 0.4, 0.5, reason=f"stopped for {HOSTILE[2]} {HOSTILE[4]}", stopped_at=5),
    ]
    folder = write_run(tmp_path / "[bold]x[", ASKED, rows)
    for trial in ("001", "002", "003"):
        folder.write_trial(TrialSpec(trial, values, {}))
    append_event(folder.trial_events_file("001"), "notice", text=HOSTILE[5])
    return folder


def test_every_view_of_a_run_shows_users_text(
    hostile_run: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 400)
    shown = [call("status", hostile_run.path)[1]]
    shown.append(printed(LiveView(read_status(hostile_run, ASKED), ("brightness", "drift")), width=400))
    for text in shown:
        for expected in (hostile_run.name, repr(HOSTILE[0]), *HOSTILE[1:]):
            assert expected in text
    code, front, _ = call("front", hostile_run.path)
    assert code == 0
    assert HOSTILE[1] in front


@pytest.mark.parametrize("text", HOSTILE)
def test_errors_quote_what_was_given(call: Call, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / text.replace("/", "|")
    for command in ("status", "train"):
        code, out, err = call(command, path)
        assert (code, out) == (2, "")
        assert str(path) in err
    for arguments in ([text], ["rewards", "check", text]):  # the first is answered by typer itself
        code, _, err = call(*arguments)
        assert code == 2
        assert repr(text) in err


READS_MARKUP = {"markup", "panel", "prompt", "spinner", "status", "logging", "traceback", "pretty", "rule", "columns"}
"""Modules of rich that read markup in what they are given, whatever the console says, or whose words do."""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_reads_markup(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                assert name.partition(".")[0] != "rich" or name.split(".")[1] not in READS_MARKUP, node.lineno
        if isinstance(node, ast.Attribute):
            assert node.attr != "from_markup", node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            given = {word.arg: word.value for word in node.keywords}
            if node.func.id in ("TextColumn", "SpinnerColumn"):  # have a switch of their own
                assert isinstance(given.get("markup"), ast.Constant), node.lineno
            if path.name != "terminal.py":
                assert node.func.id != "Console", f"{node.lineno}: print through rltune.cli.terminal"
        if isinstance(node, ast.keyword) and node.arg in ("markup", "emoji"):
            assert isinstance(node.value, ast.Constant), node.lineno
            assert node.value.value is False, node.lineno


PRINTS = """
import sys
from rich.table import Table
from rltune.cli.terminal import console, errors, take_any_text

take_any_text()
table = Table(box=None, pad_edge=False, show_header=False)
table.add_row("+0.990\\u00b10.294", "\\u96ea \\U0001f600", "a\\udcffb")
errors.print("before")
for _ in range(3):
    console.print(table)
sys.stdout.write("\\u96ea\\n")
errors.print("went on to the export of \\u96ea")
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_stream_of_any_encoding_takes_every_character(encoding: str) -> None:
    variables = os.environ | {"PYTHONIOENCODING": encoding}
    finished = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, env=variables, timeout=60)
    assert finished.returncode == 0, finished.stderr
    plus_minus = "+-" if encoding == "ascii" else "\N{PLUS-MINUS SIGN}"
    snow, smile = ("\u96ea", "\U0001f600") if encoding == "utf-8" else (r"\u96ea", r"\U0001f600")
    lines = finished.stdout.decode(encoding).splitlines()
    assert [line.rstrip() for line in lines] == [*[f"+0.990{plus_minus}0.294  {snow} {smile}  a\\udcffb"] * 3, snow]
    assert finished.stderr.decode(encoding) == f"before\nwent on to the export of {snow}\n"


@pytest.mark.parametrize("which", ["stdout", "stderr"])
def test_a_reader_that_goes_away_ends_nothing_but_the_printing(which: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, which: writing}
    finished = subprocess.run([sys.executable, "-c", PRINTS], **streams, timeout=60, check=False)
    os.close(writing)
    assert finished.returncode == 0
    if which == "stdout":
        assert finished.stderr.decode() == "before\nwent on to the export of \u96ea\n"
    else:
        assert finished.stdout.decode().count("0.294") == 3
