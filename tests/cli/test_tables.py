import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import RenderableType

from rltune.cli.front_table import front_view, gain_view
from rltune.cli.tables import (
    format_duration,
    format_value,
    progress_line,
    short_labels,
    status_view,
)
from rltune.cli.terminal import PlainConsole
from rltune.runs.confirmations import Measured
from rltune.runs.fronts import front_as_csv, read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.status import read_status
from tests.run_folders import VALUES, experiment, result, write_rows, write_run

WIDTHS = pytest.mark.parametrize("width", [60, 100])


def render(view: RenderableType, width: int) -> list[str]:
    console = PlainConsole(record=True, width=width, file=io.StringIO())
    console.print(view)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(len(line) for line in lines) <= width
    return lines


def words(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    results = [
        result(BASE_TRIAL, 0.5, 0.0),
        result("001", 0.7125, 0.25),
        result("002", reason="step 3: brightness is nan for 'a [red] dog'"),
        result("003", 0.9, 0.1, constraints={"diversity.min": 0.1}),
    ]
    folder = write_run(tmp_path / "mix", experiment(), results, started=["004"])
    write_rows(folder, "004", [{"step": 5, "eval/brightness": 0.44, "eval/drift": 0.125}, {"step": 6}])
    return folder


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["optim.lr", "model.lora.rank"], ["lr", "rank"]),
        (["optim.steps", "sampler.steps", "optim.lr"], ["optim.steps", "sampler.steps", "lr"]),
        (["rewards.brightness.weight", "rewards.drift.weight"], ["w brightnes", "w drift"]),
        (["rewards.alignment_a.weight", "rewards.alignment_b.weight"], ["alignment_a.weight", "alignment_b.weight"]),
        (["optim.weight", "rewards.x.weight"], ["weight", "w x"]),
        (["seed"], ["seed"]),
        ([], []),
    ],
)
def test_a_label_is_as_short_as_it_is_clear(paths: list[str], labels: list[str]) -> None:
    assert short_labels(paths) == labels


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (250, "4 min 10 s"),
        (3599.6, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_values_are_short() -> None:
    shown = [format_value(value) for value in (0.00123456, 1.0, 4, "all", True)]
    assert shown == ["0.00123", "1", "4", "all", "True"]


@WIDTHS
def test_the_trial_table_has_every_number(folder: RunFolder, width: int) -> None:
    lines = render(status_view(read_status(folder, experiment()), ["brightness", "drift"]), width)
    text = words(lines)
    assert text.startswith("mix: 3 of 4 trials | front 2 | hypervolume ")
    assert "not running; the same command resumes it" in text
    assert "0.50 s/step" in text
    for number in ("0.500", "0.713", "(+0.213)", "0.250", "(+0.250)", "0.900", "(+0.400)", "0.440", "(-0.060)"):
        assert number in text, number
    for state in ("done", "failed", "interrupted"):
        assert state in text
    assert "6/10" in text
    assert "trial 002 failed: step 3: brightness is nan for 'a [red] dog'" in text
    assert "! breaks a constraint, so it is not on the front" in text


def test_a_member_that_breaks_a_constraint_is_not_counted_to_the_front(folder: RunFolder) -> None:
    status = read_status(folder, experiment())
    assert status.front is not None
    first, *others = status.front.members
    front = replace(status.front, members=(replace(first, constraints={"faithful.min": 4.5}), *others))
    assert f"| front {len(others)} |" in progress_line(replace(status, front=front))


def test_a_row_shows_its_mark_and_knobs(folder: RunFolder) -> None:
    lines = render(status_view(read_status(folder, experiment()), ["brightness", "drift"]), 120)
    header = next(line.split() for line in lines if "state" in line)
    assert header[:5] == ["trial", "state", "step", "brightness", "drift"]
    assert " ".join(header[5:]) == "rank w brightnes w smoothnes lr"
    rows = {name: next(line.split() for line in lines if re.match(rf"[*! ] *{name} ", line)) for name in ("001", "003")}
    assert " ".join(rows["001"]) == "* 001 done 0/10 0.713 (+0.213) 0.250 (+0.250) 4 0.25 0.75 0.001"
    assert rows["003"][0] == "!"


def test_a_base_model_that_breaks_a_bound_is_marked(tmp_path: Path) -> None:
    base = result(BASE_TRIAL, 0.5, 0.0, constraints={"brightness.min": 0.2})
    folder = write_run(tmp_path / "mix", experiment(), [base])
    lines = render(status_view(read_status(folder, experiment()), ["brightness", "drift"]), 120)
    assert any(line.split()[:3] == ["!", BASE_TRIAL, "base"] for line in lines)
    assert "! breaks a constraint" in words(lines)


def test_a_knob_that_a_trial_does_not_have_is_blank(tmp_path: Path) -> None:
    optim = {"steps": 10, "batch": 4, "lr": {"log_float": [1e-4, 1e-2], "when": {"model.lora.rank": 4}}}
    asked = experiment(optim=optim)
    without = {path: value for path, value in {**VALUES, "model.lora.rank": 8}.items() if path != "optim.lr"}
    results = [result(BASE_TRIAL, 0.5), result("001", 0.7), result("002", 0.6, -0.5, values=without)]
    folder = write_run(tmp_path / "mix", asked, results)
    folder.write_trial(TrialSpec("002", without, {}))
    front = read_front(folder, asked)
    assert front is not None
    for view in (status_view(read_status(folder, asked), ["brightness"]), front_view(front)):
        rows = {
            name: next(line.rstrip() for line in render(view, 160) if f" {name} " in line) for name in ("001", "002")
        }
        assert rows["001"].split()[-4:] == ["4", "0.25", "0.75", "0.001"]
        assert rows["002"].split()[-3:] == ["8", "0.25", "0.75"]
    assert front_as_csv(front).splitlines()[2].split(",")[-5:] == ["16", "8", "", "0.25", "0.75"]  # of 16 prompts


def test_an_active_run_says_so(folder: RunFolder) -> None:
    with folder.lock():
        text = words(render(status_view(read_status(folder, experiment()), ["brightness"]), 120))
    assert "not running" not in text
    assert "running" in text
    assert " left" in text


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    results = [result(BASE_TRIAL, 0.5), *(result(f"00{n}", 0.6) for n in (1, 2, 3, 4))]
    folder = write_run(tmp_path / "mix", experiment(), results)
    assert "| ended" in words(render(status_view(read_status(folder, experiment()), ["brightness"]), 100))


@WIDTHS
def test_the_front_has_every_number(folder: RunFolder, width: int) -> None:
    front = read_front(folder, experiment())
    assert front is not None
    lines = render(front_view(front), width)
    text = words(lines)
    assert any(line.startswith("knee") and "001" in line for line in lines)
    # Student's t of 16 prompts, 15 degrees of freedom: 2.131 standard errors, 0.005 and 0.015
    for number in (
        "0.713",
        "0.713 +0.213\N{PLUS-MINUS SIGN}0.011",
        "0.250",
        "+0.250\N{PLUS-MINUS SIGN}0.032",
        "0.500",
        "000 base",
    ):
        assert number in text, number
    # reference: one spread of 0.1 worse than the base; above it base (1, 1), trial (3.125, -1.5), which adds nothing
    assert "Hypervolume 1, in standard deviations" in text
    assert "from the reference point brightness 0.400, drift 0.100 (" in text
    assert "003" not in text


@pytest.mark.long
def test_knobs_that_do_not_fit_are_named_and_no_digit_is_cut(folder: RunFolder) -> None:
    view = status_view(read_status(folder, experiment()), ["brightness", "drift"])
    for width in range(60, 110):
        text = words(render(view, width))
        assert "\u2026" not in text, width  # rich's mark of a cut
        hidden = re.search(r"not shown, a wider terminal has room for them: ([\w ,]+?) trial 002", text)
        table = text.split("not shown")[0]
        names = hidden.group(1).split(", ") if hidden else []
        assert names == ["rank", "w brightnes", "w smoothnes", "lr"][4 - len(names) :]
        assert all(name not in table for name in names), width
    assert not names


@pytest.mark.long
def test_settings_of_a_front_are_shown_whole_at_any_width(folder: RunFolder) -> None:
    front = read_front(folder, experiment())
    assert front is not None
    (member,) = (member for member in front.members if member.trial == "001")
    shown = {"rank", "w brightnes", "w smoothnes", "lr"}
    for width in range(44, 130):
        lines = render(front_view(front), width)
        tables = "\n".join(lines).split("Beside each value")[0]
        assert all(name in tables for name in shown), width
        assert "\u2026" not in tables, width
        assert all(format_value(value) in tables for value in member.values.values()), width
        assert "not shown" not in words(lines)
    narrow = render(front_view(front), 80)
    heading = next(number for number, line in enumerate(narrow) if line.split()[:2] == ["trial", "rank"])
    assert narrow[heading - 1] == ""
    assert [line.split()[0] for line in narrow[heading + 1 : heading + 3]] == ["001", "Beside"][:2]
    wide = render(front_view(front), 200)
    assert sum("rank" in line for line in wide) == 1


def test_gains_are_shown_with_paired_intervals() -> None:
    lines = render(gain_view(Measured(result("001", 0.7, 0.01), 4, None, False)), 80)
    # 3 degrees of freedom: 3.182 standard errors, 0.005 and 0.015
    assert lines[1].split() == ["brightness", "0.500", "0.700", "+0.200", "\N{PLUS-MINUS SIGN}", "0.016"]
    assert lines[2].split() == ["drift", "0.000", "0.010", "+0.010", "\N{PLUS-MINUS SIGN}", "0.048"]
    assert "95 % interval over the 4 prompts" in words(lines)


def test_a_single_prompt_has_no_interval_and_is_never_clear(tmp_path: Path) -> None:
    lines = render(gain_view(Measured(result("001", 0.8, 0.01), 1, None, False)), 80)
    assert lines[1].split() == ["brightness", "0.500", "0.800", "+0.300"]
    assert "no interval" in words(lines)
    console = PlainConsole(record=True, width=80, file=io.StringIO(), force_terminal=True)
    console.print(gain_view(Measured(result("001", 0.8, 0.01), 1, None, False)))
    assert "\x1b[1m" not in console.export_text(styles=True)
    asked = experiment(evaluate={"prompts": 1})
    front = read_front(write_run(tmp_path / "mix", asked, [result(BASE_TRIAL, 0.5), result("001", 0.8)]), asked)
    assert front is not None
    text = words(render(front_view(front), 100))
    assert "\N{PLUS-MINUS SIGN}" not in text
    assert "interval" not in text
