"""The command line as a user meets it: exit codes, one message, nothing left behind."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from rltune import __version__
from rltune.errors import RunError
from rltune.runs.layout import BASE_TRIAL
from rltune.training import tracking
from tests.cli.conftest import Call
from tests.config.test_schema import EXPERIMENTS
from tests.run_folders import experiment, result, write_rows, write_run

HELP = """
import sys, typer.main
from rltune.cli.main import app, main

def commands(command, path):
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, [*path, name])

for path in commands(typer.main.get_command(app), []):
    sys.argv = ["rltune", *path, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (path, end.code)
    else:
        raise AssertionError(path)
    print("helped:", " ".join(path))
print("imported:", sorted({"torch", "ray", "diffusers", "optuna", "numpy"} & set(sys.modules)))
"""


@pytest.mark.long
def test_help_of_every_command_imports_nothing_heavy() -> None:
    finished = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    helped = {line.removeprefix("helped: ") for line in lines if line.startswith("helped: ")}
    assert {
        "sweep",
        "train",
        "status",
        "front",
        "export",
        "sample",
        "evaluate",
        "soup",
        "doctor",
        "rewards",
        "estimators",
        "schema",
    } <= helped
    assert {"builtin train", "builtin scenes", "models", "models fetch"} <= helped
    assert "imported: []" in lines


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"rltune {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["train", "x.yaml", "--bogus"], "No such option: --bogus"),
        (["train"], "Missing argument"),
        (["sample", "--steps", "0"], "--steps"),
        (["sample", "--seed", "one"], "--seed"),
        (["sweep", "x.yaml", "--set"], "--set"),
    ],
)
def test_a_usage_error_is_one_message_and_exit_code_2(call: Call, arguments: list[str], message: str) -> None:
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("Error") == 1
    assert "Traceback" not in err


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("command", ["sweep", "train"])
@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["x.yaml: the file is empty"]),
        (
            "rewards: {brightness: {}}\noptim: {lr: -1, stepz: 3}\nevaluate: {judges: [fid]}\n",
            [
                "x.yaml: 3 faults",
                "x.yaml:2 optim.lr: must be a number from 0 to 1, got -1",
                "x.yaml:2 optim.stepz: unknown key, got 'stepz'",
                "x.yaml:3 evaluate.judges[0]: unknown judge, got 'fid'",
            ],
        ),
        ("rewards: {brightness: {}\n", ["x.yaml:2: not valid YAML", "check indentation"]),
    ],
    ids=["empty", "three faults", "not YAML"],
)
def test_a_malformed_file_is_answered_with_all_its_faults(
    call: Call, tmp_path: Path, command: str, text: str, faults: list[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    code, out, err = call(command, path, "--storage", tmp_path / "runs")
    assert (code, out) == (2, "")
    assert err.startswith("error ")
    assert all(fault in err for fault in faults), err
    assert "Traceback" not in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.yaml"]


FIXED = "rewards: {brightness: {}}\n"
SEARCHED = "rewards: {brightness: {}}\noptim: {lr: {float: [0.1, 0.2]}, batch: {choice: [4, 8]}}\n"


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("sweep", FIXED, "every value is fixed, there is nothing to search; run: rltune train "),
        ("train", SEARCHED, "x.yaml: optim.lr, optim.batch are distributions; fix each with --set, or run"),
        ("sweep", None, "x.yaml: no such file; check the path"),
        ("train", "rewards: {brightnes: {}}\n", "unknown reward, got 'brightnes'; did you mean 'brightness'?"),
        ("train", "rewards: {brightness: {options: {gain: 2}}}\n", "has no such option, got 'gain'; it takes none"),
        ("train", FIXED + "estimator: {options: {kk: 2}}\n", "has no such option, got 'kk'; did you mean 'k'?"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    call: Call, tmp_path: Path, command: str, text: str | None, message: str
) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    code, _, err = call(command, path, "--storage", tmp_path / "runs")
    assert code == 2
    assert message in flat(err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["été", "..", "a/b", "", ".hidden", "x" * 101, "a\n"])
@pytest.mark.parametrize("command", ["sweep", "train"])
def test_a_name_on_the_command_line_is_held_to_the_files_rule(
    call: Call, tmp_path: Path, command: str, name: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(FIXED)
    code, _, err = call(command, path, "--storage", tmp_path / "runs" / "mine", "--name", name)
    assert code == 2
    assert (
        f"error --name: must be 1 to 100 letters, digits, '.', '_' or '-', a letter or digit first, got {name!r}" in err
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.yaml"]


@pytest.mark.long
def test_a_name_on_the_command_line_is_the_runs(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(FIXED)
    code, _, err = call("train", path, "--storage", tmp_path, "--name", "123", "--dry-run")
    assert code == 0
    assert "experiment  123" in err


def test_a_tilde_that_the_shell_left_alone_is_the_users_home(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: dict[str, Path] = {}

    def keep(path: Path, *_: object, storage: Path, **__: object) -> None:
        seen.update(path=path, storage=storage)

    monkeypatch.setattr("rltune.cli.sweep.run_experiment", keep)
    assert call("train", "~/x.yaml", "--storage=~/runs")[0] == 0
    assert seen == {"path": tmp_path / "x.yaml", "storage": tmp_path / "runs"}
    drawn: list[object] = []
    monkeypatch.setattr("rltune.cli.sample.sample_grid", lambda *given, **named: drawn.extend([*given, named["base"]]))
    assert call("sample", "~/a", "~/b", "--output=~/x.png", "--base=~/m")[0] == 0
    assert drawn == [[tmp_path / "a", tmp_path / "b"], [], tmp_path / "x.png", str(tmp_path / "m")]


LR = "optim: {lr: {float: [0.1, 0.2]}}\n"
UNFAITHFUL = (
    "alignprop backpropagates rewards, and 'faithful' has no gradient; give it weight 0 to watch it only, or take"
)


UNTRAINABLE = [
    ("rewards: {brightness: {}, faithful: {}}\n", UNFAITHFUL + " an estimator that needs none: dag, ddpo, dpok"),
    ("rewards: {faithful_exact: {}}\nestimator: {name: draft}\n", "draft backpropagates rewards, and 'faithful_ex"),
    (FIXED + "estimator: {name: dpok}\n", "sampler.eta: dpok learns from the noise of sampling, got eta 0"),
    (
        FIXED + "estimator: {checkpoint: serial}\n",
        "which alignprop has not, got 'serial'; take auto or always, or one",
    ),
    (FIXED + "estimator: {name: draft_lv, options: {n: two}}\n", "n: must be a whole number from 0 to 64, got 'two'"),
    (
        FIXED + "estimator: {name: draft_lv, options: {n: 65}}\n",
        "estimator.options.n: must be a whole number from 0 to 64, got 65; the default is 2",
    ),
    (FIXED + "estimator: {name: drtune, k: 20}\nsampler: {steps: 12}\n", "estimator.k: K must not exceed the 12"),
    (
        FIXED + "estimator: {name: drtune, options: {k: 20}}\nsampler: {steps: 12}\n",
        "drtune: k must be in [1, 8], got",
    ),
    (
        FIXED + "estimator: {name: drtune, k: 8}\nsampler: {steps: 12, base_steps: 2}\n",
        "estimator: drtune: k must be in [1, 7], got 8",
    ),
    (FIXED + "estimator: {draw: fixed}\n", "estimator: alignprop: draw: fixed needs k, got none"),
    (FIXED + "estimator: {name: full, k: 3}\n", "estimator.k: full has no such setting, got 3; delete it, or"),
    (FIXED + "estimator: {name: draft, draw: uniform}\n", "estimator.draw: draft has no such setting, got"),
]
"""What is refused, and what is said."""


@pytest.mark.parametrize(
    ("text", "message", "command", "flags"),
    [
        *((text, message, "train", []) for text, message in UNTRAINABLE),
        # one door for all: what it lets through does not depend on who asks
        *(
            (UNTRAINABLE[0][0] + more, UNTRAINABLE[0][1], command, flags)
            for command, more, flags in (("train", "", ["--dry-run"]), ("sweep", LR, []), ("sweep", LR, ["--dry-run"]))
        ),
    ],
)
def test_a_method_that_cannot_train_this_is_refused_before_anything_starts(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    message: str,
    command: str,
    flags: list[str],
) -> None:
    from rltune.orchestration import campaign

    def start(*_: object) -> None:
        raise AssertionError("a cluster was wanted")

    monkeypatch.setattr(campaign, "connect", start)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    code, out, err = call(command, path, "--storage", tmp_path / "runs", *flags)
    assert (code, out) == (2, "")
    assert message in flat(err)
    assert "Traceback" not in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("estimator: {name: {choice: [alignprop, draft]}, draw: uniform}", "name.choice[1]: draft has no such setting"),
        ("estimator: {name: drtune, k: {int: [1, 12]}}\nsampler: {steps: 12}", "drtune: k must be in [1, 8], got 12"),
        ("estimator: {name: draft_lv, options: {n: {choice: [2, 65]}}}", "n.choice[1]: must be a whole number from 0"),
        (
            "estimator: {name: drtune, k: 8}\nsampler: {steps: 12, base_steps: {int: [0, 2]}}",
            "estimator: drtune: k must be in [1, 7], got 8",
        ),
    ],
)
def test_every_end_of_a_sweep_is_tried_on_its_estimator(call: Call, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(FIXED + text)
    code, _, err = call("sweep", path, "--storage", tmp_path / "runs", "--dry-run")
    assert code == 2
    assert message in flat(err)


@pytest.mark.parametrize("command", ["status", "front", "export"])
def test_a_folder_that_is_no_run_is_said_so(call: Call, tmp_path: Path, command: str) -> None:
    code, out, err = call(command, tmp_path)
    assert (code, out) == (2, "")
    assert f"{tmp_path}: not a run folder, it has no experiment.yaml" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_status_says_where_the_time_went(call: Call, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [result(BASE_TRIAL, 0.5)], started=["001"])
    code, _, error = call("status", folder.path, "--usage")
    assert code == 2
    assert "nothing is known of its time, got no events.jsonl" in error
    write_rows(folder, "001", [{"step": 1, "step_s": 30.0}])
    rows = [
        {"time": 1000, "event": "driver_started", "trials_at_once": 2, "workers": 1},
        {"time": 1060, "event": "driver_ended"},
    ]
    folder.events_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, output, _ = call("status", folder.path, "--usage")
    assert code == 0
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert any("utilisation 25%" in line for line in lines)  # 30 s of two slots for a minute
    assert "25.0% 30 s training steps" in lines
    assert any(line.startswith("Of 2 min 00 s: slots") for line in lines)
    assert "utilisation 25%" in " ".join(call("status", folder.path)[1].split())


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_said_before_anything_starts(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    path = tmp_path / "mix.yaml"
    path.write_text("rewards: {brightness: {}}\ntrack: [wandb]\n")
    code, _, error = call("train", path, "--storage", tmp_path / "runs")
    assert code == 2
    assert 'track: wandb is not installed; pip install "rltune[track]"' in " ".join(error.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RunError("'a [red] dog': it died"), 1, "error 'a [red] dog': it died\n"),
    ],
)
def test_what_ends_a_run_decides_the_exit_code(
    call: Call, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, message: str
) -> None:
    from rltune.cli import sweep as running

    def stop(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(running, "run_experiment", stop)
    assert call("sweep", "x.yaml") == (code, "", message)


def test_options_reach_the_run(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from rltune.cli import sweep as running

    seen = []
    monkeypatch.setattr(running, "run_experiment", lambda *args, **options: seen.append((args, options)))
    assert call("train", "x.yaml", "--set", "optim.lr=1e-3", "--set", "seed=2", "--name", "n", "--dry-run")[0] == 0
    assert call("sweep", "x.yaml", "--address", "host:6379", "--storage", "/s")[0] == 0
    assert seen == [
        (
            (Path("x.yaml"), ["optim.lr=1e-3", "seed=2"]),
            {"address": None, "name": "n", "storage": Path("runs"), "dry_run": True, "is_sweep": False},
        ),
        (
            (Path("x.yaml"), []),
            {"address": "host:6379", "name": None, "storage": Path("/s"), "dry_run": False, "is_sweep": True},
        ),
    ]


@pytest.mark.long
def test_the_printed_schema_accepts_the_shipped_experiments(call: Call) -> None:
    from rltune.config.yamlfile import read_yaml

    code, out, err = call("schema")
    assert (code, err) == (0, "")
    validator = jsonschema.Draft202012Validator(json.loads(out))
    validator.check_schema(validator.schema)
    assert EXPERIMENTS
    for path in EXPERIMENTS:
        validator.validate(read_yaml(path.read_text())[0])
    for wrong in (
        {"optim": {"lr": "fast"}},
        {"estimator": {"name": "ddpo", "options": {"clip": 2}}},
        {"rewards": {"mine": {"reward": "compressibility", "options": {"chroma": "4:2:2"}}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(wrong)


def test_rewards_lists_each_with_what_it_says(call: Call) -> None:
    from rltune.rewards.base import REWARDS

    code, out, _ = call("rewards")
    assert code == 0
    for name in ("aesthetic", "alignment", "brightness", "compressibility", "smoothness"):
        assert name in REWARDS.names()
        assert any(line.startswith(name) and len(line.split()) > 3 for line in out.splitlines()), name


def test_estimators_lists_each_with_its_needs_and_options(call: Call) -> None:
    from rltune.estimators.base import ESTIMATORS

    code, out, _ = call("estimators")
    assert code == 0
    for name in ESTIMATORS.names():
        assert any(line.startswith(f"{name} ") for line in out.splitlines()), name
    text = flat(out)
    for shown in ("have a gradient", "be a number", "k: 1", "n: 2", "2310.03739", "2305.13301"):
        assert shown in text


LOGGING = """
import logging, sys
from rltune.cli.main import main
sys.argv = ["rltune", "front", "nowhere"]
try:
    main()
except SystemExit:
    logging.getLogger("anyone").warning("with %s", "hush-hush")
"""


@pytest.mark.long
def test_what_is_logged_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hush-hush")
    finished = subprocess.run([sys.executable, "-c", LOGGING], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stderr.startswith("error nowhere: ")
    assert finished.stderr.endswith("\nWARNING anyone: with ***\n")


def test_the_handlers_of_others_are_left_alone(call: Call) -> None:
    """A filter more a call would stay on the test runner's own, and on a notebook's, and cost every record."""
    before = {handler: list(handler.filters) for handler in logging.getLogger().handlers}
    assert before
    call("schema")
    assert {handler: handler.filters for handler in logging.getLogger().handlers} == before


FOLDER = "must be a local or a shared folder, got the address"
RUN = "s3://bucket/runs/mix"
FETCH = f"; 'rltune fetch {RUN}' brings the run to this machine"
NOWHERE = "no run can lie there; write one of s3://, gs://"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "x.yaml", "--storage", "memory://runs"), NOWHERE),
        (("sweep", "x.yaml", "--storage=memory://runs", "--dry-run", "--set", "optim.lr.float=[0.1,0.2]"), NOWHERE),
        (("status", "memory://runs/mix"), NOWHERE),
        (("evaluate", "memory://runs/mix"), NOWHERE),
        (("front", "file:///shared/runs/mix"), "file:///shared/runs/mix: write the folder itself, /shared/runs/mix"),
        (("compare", "runs/mix", RUN), f"RUNS: {FOLDER} '{RUN}'{FETCH}"),
        (("soup", RUN), f"soup: {FOLDER} '{RUN}'{FETCH}"),
        (("sample", f"{RUN}/exports/001"), f"LORAS: {FOLDER} '{RUN}/exports/001'{FETCH}"),
        (("report", "runs/mix", "--figures", "gs://bucket"), f"--figures: {FOLDER} 'gs://bucket'"),
    ],
)
def test_an_address_becomes_no_folder(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(FIXED)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in flat(err)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.yaml"]
