"""A run with a secret: it works, and nothing that the run leaves or says has it."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from rltune.orchestration.claiming import Claim, claim_run
from rltune.orchestration.exporting import export_trial
from rltune.orchestration.job import JobSpec, attempt
from rltune.orchestration.results import TrialResult, append_result
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder, TrialSpec
from rltune.training.reporter import FolderReporter
from tests.conftest import EVAL_PROMPTS, TRAIN_PROMPTS
from tests.runs import experiment

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


@pytest.fixture
def address() -> Iterator[str]:
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


@pytest.mark.filterwarnings("default")  # of the trackers that are installed
def test_nothing_that_a_run_leaves_has_its_secret(
    address: str,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SCORER_ADDRESS", address)
    monkeypatch.setenv("SCORER_AUTHORIZATION", f"Bearer {SECRET}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    scorer = {"url_from": "SCORER_ADDRESS", "headers_from": {"Authorization": "SCORER_AUTHORIZATION"}}
    asked = experiment(
        {
            "name": "kept",
            "model": {"base": str(tiny_pipeline), "lora": {"rank": 2}},
            "prompts": {"train": TRAIN_PROMPTS, "eval": EVAL_PROMPTS},
            "sampler": {"steps": 2, "guidance": 2.0},
            "estimator": {"k": 1},
            "rewards": {"brightness": {}, "scorer": {"reward": "http", "weight": 0, "options": scorer}},
            "optim": {"steps": 2, "batch": 2},
            "evaluate": {"every": 2, "prompts": 2, "images_per_prompt": 1},
            "track": TRACKERS,
        }
    )
    folder = RunFolder(tmp_path / "runs" / "kept")
    folder.path.mkdir(parents=True)
    claim = claim_run(folder, asked, precision="fp32")
    with caplog.at_level("DEBUG"):
        base, trained = run_trial(claim, BASE_TRIAL), run_trial(claim, "001")
        monkeypatch.setattr(Scorer, "is_broken", True)
        run_trial(claim, "002")
    failure = folder.failure_file("002").read_text()
    assert "SCORER_ADDRESS: got status 500" in failure
    assert "***" in failure
    checkpoint = trained.latest()
    assert checkpoint is not None
    relative = str(checkpoint.relative_to(folder.path))
    result = TrialResult("001", "ok", {}, {}, metrics=trained.reports[-1], checkpoint=relative)
    append_result(folder.results_file, TrialResult(BASE_TRIAL, "ok", {}, {}, metrics=base.reports[-1]))
    append_result(folder.results_file, result)
    append_result(folder.results_file, TrialResult("002", "failed", {}, {}, reason=f"it said {SECRET}"))
    card = json.loads((export_trial(result, folder, asked).folder / "rltune.json").read_text())
    assert card["experiment"]["rewards"]["scorer"]["options"] == scorer  # the names are there

    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"resolved.json", "config.json", "events.jsonl", "results.jsonl", "rltune.json"} <= {f.name for f in files}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    out, err = capfd.readouterr()
    assert SECRET not in caplog.text + out + err
