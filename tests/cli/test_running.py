from pathlib import Path

import pytest

from rltune.cli import running
from rltune.cli.running import known_names, run_experiment
from rltune.config.load import load_experiment
from rltune.errors import UserError
from rltune.training.setup import NUM_CALIBRATION_IMAGES
from tests.config.test_schema import EXPERIMENTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a cluster was wanted")

    monkeypatch.setattr(running, "find_address", lambda address: None)
    monkeypatch.setattr(running, "connect", refuse)
    monkeypatch.chdir(ROOT)  # prompt files are named from the repository's root
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)


def dry_run(path: Path, storage: Path, *overrides: str, is_sweep: bool) -> None:
    run_experiment(path, overrides, address=None, name=None, storage=storage, dry_run=True, is_sweep=is_sweep)


def plan_of(text: str) -> dict[str, str]:
    """The printed plan, label -> text."""
    return {line[:11].strip(): line[13:] for line in text.splitlines()}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_shipped_experiment_can_be_planned(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(path, tmp_path / "runs", is_sweep=load_experiment(path).is_searched)
    out, err = capsys.readouterr()
    assert out == ""
    assert plan_of(err)["experiment"] == load_experiment(path).shared.name
    assert not (tmp_path / "runs").exists()


def test_the_plan_says_what_will_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "search.trials=5",
        "optim.steps=10",
        "optim.batch=4",
        "evaluate={every: 4, prompts: 3, judges: [diversity, faithful]}",
    ]
    dry_run(ROOT / "experiments" / "mix.yaml", tmp_path, *overrides, is_sweep=True)
    plan = plan_of(capsys.readouterr().err)
    assert plan["method"] == "alignprop on the builtin model, 12 sampling steps, K searched"
    assert plan["searched"].split(", ")[:2] == ["model.lora.rank", "estimator.k"]
    assert plan["trials"] == "the base model and 5 trained, 4 at a time"
    assert plan["a trial"] == "10 steps of 4 images, 3 evaluations of 6; 1 worker(s) with 1 GPU each"
    assert plan["images"] == f"{5 * (40 + 18) + 6 + NUM_CALIBRATION_IMAGES} in all"
    assert plan["objectives"] == "aesthetic, alignment, compressibility"
    assert plan["runs on"] == "a Ray cluster on this machine (loopback only)"


def test_a_fixed_k_and_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (tmp_path / "x.yaml").write_text("rewards: {brightness: {}}\nestimator: {k: 3}\n")
    dry_run(tmp_path / "x.yaml", tmp_path / "runs", is_sweep=False)
    plan = plan_of(capsys.readouterr().err)
    assert plan["method"] == "alignprop on the builtin model, 20 sampling steps, K 3"
    assert plan["searched"] == "nothing"
    assert plan["trials"] == "the base model and 1 trained, 1 at a time"
    assert plan["a trial"].endswith("1 worker(s) with 1 CPU each")


@pytest.mark.parametrize(
    ("section", "method"),
    [
        ("{name: ddpo}", "ddpo on the builtin model, 20 sampling steps"),
        ("{name: {choice: [alignprop, ddpo]}}", "estimator searched on the builtin model, 20 sampling steps"),
    ],
)
def test_the_plan_of_an_estimator_without_k(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: str, method: str
) -> None:
    text = "rewards: {brightness: {}}\nsampler: {eta: 1.0}\noptim: {batch: 4, queries: 10}\nestimator: "
    (tmp_path / "x.yaml").write_text(text + section)
    dry_run(tmp_path / "x.yaml", tmp_path / "runs", is_sweep="choice" in section)
    plan = plan_of(capsys.readouterr().err)
    assert plan["method"] == method
    assert plan["a trial"].startswith("3 steps of 4 images, 1 evaluations of 32")  # 100 rounds, were it not for queries


def test_a_plan_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a trial needs 8 CPUs and 8 GPUs, the cluster has 64 and 4"):
        dry_run(ROOT / "experiments" / "mix.yaml", tmp_path, "resources.workers=8", is_sweep=True)


def test_every_name_that_can_be_written_is_known() -> None:
    known = known_names()
    assert {"alignprop", "dag", "ddpo", "dpok", "draft", "draft_lv", "drtune", "full", "refl"} <= set(known.estimators)
    assert "brightness" in known.rewards
    assert known.judges == ("diversity", "drift")
    assert known.samplers == ("tpe", "random", "nsga2", "gp", "grid")


def test_what_names_need_is_read_without_building_them() -> None:
    known = known_names()
    assert known.policy_estimators == ("dag", "ddpo", "dpok")
    assert known.serial_estimators == ("draft_lv", "drtune", "refl")
    assert set(known.rewards_without_gradient) >= {"faithful", "faithful_exact", "callable", "http", "jpeg_bytes"}
    assert known.group_rewards == ("diversity_dino", "diversity_pixels")
