"""What a run leaves, from its first start to an export: without its secrets, and of use wherever it lies."""

import base64
import io
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from rltune.cli.export import export_pick
from rltune.cli.sample import sample_grid
from rltune.config.load import Experiment
from rltune.errors import UserError
from rltune.export.trials import export_trials
from rltune.orchestration.claiming import Claim, claim_run
from rltune.orchestration.job import attempt
from rltune.orchestration.job_spec import JobSpec
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.record import (
    read_record,
    read_run,
    read_trial_versions,
    record_trial,
    standing_where_started,
)
from rltune.runs.results import TrialResult, append_result
from rltune.training.reporter import FolderReporter
from tests.run_folders import experiment
from tests.tiny import EVAL_PROMPTS, TRAIN_PROMPTS

SECRET = "hush-5f2b9c1d"
TRACKERS = [name for name in ("tensorboard", "wandb", "mlflow") if find_spec(name)]


class Scorer(BaseHTTPRequestHandler):
    """Lets in who has the secret, and then tells everybody what it was."""

    is_broken = False

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_let_in = self.headers["Authorization"] == f"Bearer {SECRET}" and f"pass={SECRET}" in self.path
        status = 200 if is_let_in and not self.is_broken else 500
        scores = [len(base64.b64decode(image)) / 1000 for image in asked["images"]]
        body = json.dumps({"scores": scores} if status == 200 else {"seen": self.path, **dict(self.headers)}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Left:
    """A run of three trials, of which the last failed."""

    folder: RunFolder
    asked: Experiment
    result: TrialResult
    log: str


@contextmanager
def served() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score?pass={SECRET}"
    server.shutdown()
    server.server_close()


def run_trial(claim: Claim, trial: str) -> FolderReporter:
    claim.folder.write_trial(TrialSpec(trial, {}, {}))
    config = claim.config_of(claim.experiment.shared)
    spec = JobSpec(
        trial,
        str(claim.folder.path),
        config.model_dump(mode="json"),
        num_gpus_per_worker=0,
        work_dir=str(Path.cwd()),
        is_loopback=True,
        base_key=claim.key_of(config),
    )
    reporter = FolderReporter(claim.folder.checkpoints_dir(trial) / spec.train_name)
    attempt(spec, reporter, rank=0, count=1)
    return reporter


OPTIONS = {"url_from": "SCORER_ADDRESS", "headers_from": {"Authorization": "SCORER_AUTHORIZATION"}}


@pytest.fixture(scope="module")
def left(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    """A run that was started in a folder where its base model and its prompts lie."""
    start = tmp_path_factory.mktemp("start")
    shutil.copytree(tiny_pipeline, start / "models" / "tiny")
    for name, prompts in (("train", TRAIN_PROMPTS), ("eval", EVAL_PROMPTS)):
        (start / f"{name}.txt").write_text("\n".join(prompts))
    raw = {
        "name": "kept",
        "model": {"base": "models/tiny", "lora": {"rank": 2}},
        "prompts": {"train": "train.txt", "eval": "eval.txt"},
        "sampler": {"steps": 2, "guidance": 2.0},
        "estimator": {"k": 1},
        "rewards": {"brightness": {}, "scorer": {"reward": "http", "weight": 0, "options": OPTIONS}},
        "optim": {"steps": 2, "batch": 2},
        "evaluate": {"every": 2, "prompts": 2, "images_per_prompt": 1},
        "track": TRACKERS,
    }
    folder, log = RunFolder(start / "runs" / "kept"), io.StringIO()
    folder.path.mkdir(parents=True)
    handler = logging.StreamHandler(log)
    with pytest.MonkeyPatch.context() as patch, served() as address:
        patch.chdir(start)
        patch.setenv("SCORER_ADDRESS", address)
        patch.setenv("SCORER_AUTHORIZATION", f"Bearer {SECRET}")
        patch.setenv("WANDB_MODE", "offline")
        level = logging.getLogger().level
        logging.getLogger().setLevel(logging.DEBUG)  # not the attribute: loggers remember what they are enabled for
        logging.getLogger().addHandler(handler)
        asked = experiment(raw)
        claim = claim_run(folder, asked, precision="fp32")
        base, trained = run_trial(claim, BASE_TRIAL), run_trial(claim, "001")
        patch.setattr(Scorer, "is_broken", True)
        run_trial(claim, "002")
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)
        checkpoint = trained.latest()
        assert checkpoint is not None
        relative = str(checkpoint.relative_to(folder.path))
        result = TrialResult("001", "ok", {}, {}, metrics=trained.reports[-1], checkpoint=relative)
        append_result(folder.results_file, TrialResult(BASE_TRIAL, "ok", {}, {}, metrics=base.reports[-1]))
        append_result(folder.results_file, result)
        append_result(folder.results_file, TrialResult("002", "failed", {}, {}, reason=f"it said {SECRET}"))
        export_trials([result], folder, asked, on_export=lambda exported: None)
        yield Left(folder, asked, result, log.getvalue())


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # of the trackers that are installed
def test_nothing_that_a_run_leaves_has_its_secret(left: Left) -> None:
    folder = left.folder
    failure = folder.failure_file("002").read_text()
    assert "SCORER_ADDRESS: got status 500" in failure
    assert "***" in failure
    card = json.loads((folder.exports_dir / "001" / "rltune.json").read_text())
    assert card["experiment"]["rewards"]["scorer"]["options"] == OPTIONS  # the names are there
    files = [file for file in folder.path.rglob("*") if file.is_file()]
    assert {"resolved.json", "config.json", "events.jsonl", "results.jsonl", "rltune.json"} <= {f.name for f in files}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert "POST /score?pass=*** " in left.log
    assert SECRET not in left.log


@pytest.mark.long
def test_a_trial_says_what_it_was_trained_with(left: Left) -> None:
    told = json.loads(left.folder.config_file("001").read_text())
    record = read_record(left.folder)
    assert record is not None
    assert (told["schema"], told["base_key"]) == (1, record.base_key)
    assert told["config"]["optim"]["lr"] == 1e-3  # which the experiment leaves to its default
    assert told["config"]["resources"]["precision"] == "fp32"
    (by,) = told["versions"]
    assert {**by, "since": ""} == {"since": "", **record.versions}
    record_trial(left.folder, "001", told["config"], told["base_key"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rltune.__version__", "9.9")
        record_trial(left.folder, "001", told["config"], told["base_key"])
    again = read_trial_versions(left.folder, "001")
    assert [row["rltune"] for row in again] == [record.versions["rltune"], "9.9"]


@pytest.mark.long
def test_a_run_is_of_use_wherever_it_lies(left: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(left.folder.path, moved)
    work_dir = left.folder.path.parents[1]
    for name in ("train", "eval"):
        (work_dir / f"{name}.txt").unlink()
    shutil.rmtree(moved / "exports")
    monkeypatch.chdir(tmp_path)
    folder, asked = read_run(moved)
    assert read_front(folder, asked) is not None
    export_pick(moved, "001")
    card = json.loads((moved / "exports" / "001" / "rltune.json").read_text())
    assert (card["base_model"], card["prompts"]) == ("models/tiny", EVAL_PROMPTS[:2])
    sample_grid(
        [moved / "exports" / "001"],
        [],
        tmp_path / "grid.png",
        base=None,
        num_steps=None,
        guidance=None,
        num_images=1,
        seed=0,
    )
    with monkeypatch.context() as there:  # a resume goes on with its own prompts
        there.setenv("SCORER_ADDRESS", "http://127.0.0.1:9/")
        there.setenv("SCORER_AUTHORIZATION", "Bearer another")
        with standing_where_started(folder):
            claim_run(folder, asked, precision="fp32")
    with pytest.raises(UserError, match=r"model\.base: 'models/tiny' is not there any more, it was .*start.*tiny"):
        claim_run(folder, asked, precision="fp32")  # from here
