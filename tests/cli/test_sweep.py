import importlib
import sys
from pathlib import Path

import pytest

from rltune.cli import sweep as running
from rltune.cli.sweep import run_experiment
from rltune.config.load import load_experiment
from rltune.errors import UserError
from rltune.orchestration import campaign, inspection
from rltune.orchestration.cluster import Cluster
from rltune.orchestration.known import known_names
from rltune.orchestration.nodes import Node
from rltune.orchestration.plan import plan
from rltune.rewards.weights import WeightsFile
from rltune.runs.layout import RunFolder
from rltune.training.setup import NUM_CALIBRATION_IMAGES
from tests.config.test_schema import EXPERIMENTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a cluster was wanted")

    monkeypatch.setattr(inspection, "check_hub", lambda repo, file: None)  # what is not here could be fetched
    monkeypatch.setattr(inspection, "is_offline", lambda: False)
    monkeypatch.setattr(campaign, "find_address", lambda address: None)
    monkeypatch.setattr(campaign, "connect", refuse)
    monkeypatch.chdir(ROOT)  # prompt files are named from the repository's root
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)


def dry_run(path: Path, storage: Path, *overrides: str, is_sweep: bool) -> None:
    run_experiment(path, overrides, address=None, name=None, storage=storage, dry_run=True, is_sweep=is_sweep)


def plan_of(text: str) -> dict[str, str]:
    """The printed plan, label -> text."""
    return {line[:11].strip(): line[13:] for line in text.splitlines()}


@pytest.mark.long
@pytest.mark.parametrize(
    "path",
    # those of single models are planned on their pipelines in test_model_experiments too
    [pytest.param(p, marks=pytest.mark.long if p.parent.name == "models" else (), id=p.name) for p in EXPERIMENTS],
)
def test_every_shipped_experiment_can_be_planned(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(path, tmp_path / "runs", is_sweep=load_experiment(path).is_searched)
    out, err = capsys.readouterr()
    assert out == ""
    assert plan_of(err)["experiment"] == load_experiment(path).shared.name
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_plan_says_where_a_setting_is_searched_and_what_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(ROOT / "experiments" / "estimators_searched.yaml", tmp_path, is_sweep=True)
    plan = plan_of(capsys.readouterr().err)
    assert plan["searched"] == (
        "estimator.name; estimator.k where estimator.name is 'alignprop' or 'draft'; "
        "estimator.draw where estimator.name is 'alignprop'; optim.lr"
    )
    assert plan["first"] == "3 point(s) of the file"


@pytest.mark.long
def test_a_run_that_cannot_be_started_from_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search\.warm_start: not a run folder, .* got 'nowhere'"):
        dry_run(ROOT / "experiments" / "mix.yaml", tmp_path, "search.warm_start=nowhere", is_sweep=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
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
    assert plan["rewards"] == "aesthetic searched, alignment searched, compressibility searched"
    assert plan["searched"].split(", ")[:2] == ["model.lora.rank", "estimator.k"]
    assert plan["trials"] == "the base model and 5 trained, 4 at a time"
    assert plan["a trial"] == "10 steps of 4 images, 3 evaluations of 6; 1 worker with 1 CPU and 1 GPU"
    assert plan["images"] == f"{5 * (40 + 18) + 6 + NUM_CALIBRATION_IMAGES} in all"
    assert plan["objectives"] == "aesthetic, alignment, compressibility"
    assert plan["runs on"] == "a Ray cluster on this machine (loopback only)"


@pytest.mark.long
def test_a_fixed_k_and_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    text = "rewards: {light: {reward: brightness, weight: 0.5}}\nestimator: {k: 3}\nmixture: {method: win_rate}\n"
    (tmp_path / "x.yaml").write_text(text)
    dry_run(tmp_path / "x.yaml", tmp_path / "runs", is_sweep=False)
    plan = plan_of(capsys.readouterr().err)
    assert plan["method"] == "alignprop on the builtin model, 20 sampling steps, K 3"
    assert plan["rewards"] == "light (brightness) 0.5; mixture win_rate"
    assert plan["searched"] == "nothing"
    assert plan["trials"] == "the base model and 1 trained, 1 at a time"
    assert plan["a trial"].endswith("; 1 worker with 1 CPU")


@pytest.mark.long
def test_the_plan_says_which_prompts_were_read_and_what_is_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.csv").write_text("id,caption\n1,\n2,[red]\u2028star\n3,a circle\n")
    long = "one red circle and " * 7 + "a green star"  # 31 words, each a token; 30 are read
    text = f"prompts: {{train: {tmp_path}/p.csv, eval: [a star, {long}, a circle]}}\nevaluate: {{prompts: 2}}\n"
    plan = plan_with(tmp_path, capsys, text + "rewards: {brightness: }")
    assert plan["prompts"] == (
        f"2 ({tmp_path}/p.csv; column 'caption'; 1 empty one left out), the first '[red]\\u2028star'"
    )
    assert plan["held out"] == "3 (written out), 2 used, the first 'a star'"
    assert plan["cut"] == (
        "1 of 5 prompts is longer than the text encoder reads: of 'one red circle and one red c .. "
        " red circle and a green star' it does not see 'star'"
    )


@pytest.mark.slow
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
    assert plan["a trial"].startswith("3 steps of 4 images, 1 evaluation of 32")  # 100 rounds, were it not for queries


OWN = """
def redness(images, prompts, *, blue=0.0):
    return images[:, 0].mean(dim=(1, 2)) - blue * images[:, 2].mean(dim=(1, 2))

def lengths(images, prompts):
    return images.new_tensor([len(prompt) for prompt in prompts])
lengths.is_differentiable = False
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module in the current folder, forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.modules", dict(sys.modules))
    (tmp_path / "rewards_of_a_plan.py").write_text(OWN)
    importlib.invalidate_caches()
    return "rewards_of_a_plan"


def write(folder: Path, text: str) -> Path:
    (folder / "x.yaml").write_text(text)
    return folder / "x.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "rewards: {mine: {reward: 'OWN:redness', options: {blue: 0.5}}, watched: {reward: 'OWN:lengths', weight: 0}}",
        "rewards: {mine: {reward: 'OWN:lengths'}}\nestimator: {name: ddpo}\nsampler: {eta: 1.0}\n"
        "prompts: {images_per_prompt: 2}\noptim: {batch: 64}",
        "rewards: {mine: {reward: 'OWN:redness', relative: {positive: a, negative: b, k: {float: [0, 1]}}}}\n"
        "mixture: {method: {choice: [sum, chebyshev, win_rate]}}",
    ],
)
def test_a_users_reward_can_be_planned(tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = write(tmp_path, text.replace("OWN", own))
    dry_run(path, tmp_path / "runs", is_sweep="choice" in text)
    assert plan_of(capsys.readouterr().err)["objectives"].startswith("mine")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewards: {mine: {reward: 'OWN:lengths'}}", r"\n  rewards\.mine: OWN:lengths says that it has no gradient"),
        (
            "rewards: {mine: {reward: 'OWN:green'}}",
            r"\n  reward 'mine': reward 'OWN:green': module 'OWN' .* has no 'green'",
        ),
        (
            "rewards: {mine: {reward: 'OTHER:green'}}",
            r"\n  reward 'mine': reward 'OTHER:green': there is no module 'OTHER'",
        ),
        ("rewards: {mine: {reward: 'OWN.py'}}", r"rewards\.mine\.reward: unknown reward, got 'OWN\.py'"),
        (
            "rewards: {mine: {reward: 'OWN:redness', options: {green: 1}}}",
            r"\n  reward 'mine': OWN:redness\(.*\) cannot be called with the options \{'green': 1\}",
        ),
        # what the first of several values would let pass
        (
            "rewards: {mine: {reward: {choice: ['OWN:redness', 'OWN:lengths']}}}",
            r"\n  rewards\.mine: OWN:lengths says that it has no gradient",
        ),
        (
            "rewards: {brightness: , mine: {reward: 'OWN:lengths', weight: {choice: [0, 1]}}}",
            r"\n  rewards\.mine: OWN:lengths says that it has no gradient",
        ),
        (
            "rewards: {brightness: {weight: {float: [1, 2]}}, mine: {reward: 'OWN:lengths', weight: {float: [0, 1]}}}\n"
            "estimator: {name: {choice: [ddpo, alignprop]}, options: {}}\nsampler: {eta: 1.0}\noptim: {batch: 64}",
            r"\n  rewards\.mine: OWN:lengths says that it has no gradient",
        ),
    ],
)
def test_a_users_reward_that_cannot_serve_is_refused_before_anything_starts(
    tmp_path: Path, own: str, text: str, message: str
) -> None:
    path = write(tmp_path, text.replace("OWN", own))
    with pytest.raises(UserError, match=message.replace("OWN", own)):
        dry_run(path, tmp_path / "runs", is_sweep="choice" in text)


@pytest.mark.long
@pytest.mark.parametrize(("each", "calibration"), [(2, 32), (3, 33)])
def test_the_plan_counts_the_images_that_groups_are_calibrated_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], each: int, calibration: int
) -> None:
    text = f"rewards: {{diversity_pixels: }}\nprompts: {{images_per_prompt: {each}}}\n"
    text += "optim: {batch: 6, steps: 5}\nevaluate: {every: 5, prompts: 4, images_per_prompt: 2}"
    dry_run(write(tmp_path, text), tmp_path / "runs", is_sweep=False)
    assert plan_of(capsys.readouterr().err)["images"] == f"{5 * 6 + 8 + 8 + calibration} in all"


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """Names of published files that are not on this machine; the others are. No weights may be read or fetched."""
    names: set[str] = set()

    def refuse(*_: object) -> None:
        raise AssertionError("weights were wanted")

    monkeypatch.setattr(WeightsFile, "find", lambda file: None if file.file in names else tmp_path / file.file)
    monkeypatch.setattr(WeightsFile, "fetch", refuse)
    monkeypatch.setattr(WeightsFile, "check", refuse)
    return names


def plan_with(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> dict[str, str]:
    (tmp_path / "x.yaml").write_text(text)
    dry_run(tmp_path / "x.yaml", tmp_path / "runs", is_sweep=False)
    return plan_of(capsys.readouterr().err)


PUBLISHED = """
rewards:
  taste: {reward: laion_aesthetic}
  clip_score: {}
  imagereward: {}
evaluate: {judges: [diversity, hpsv2]}
"""


@pytest.mark.slow
def test_the_plan_names_published_weights_that_are_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: set[str]
) -> None:
    assert "weights" not in plan_with(tmp_path, capsys, PUBLISHED)
    missing |= {"open_clip_model.safetensors", "ImageReward.pt", "vocab.txt", "HPS_v2_compressed.pt", "other.bin"}
    plan = plan_with(tmp_path, capsys, PUBLISHED)
    assert plan["weights"] == (
        "not on this machine: open_clip_model.safetensors of timm/vit_large_patch14_clip_224.openai (1.7 GB); "
        "ImageReward.pt of THUDM/ImageReward (1.8 GB); vocab.txt of google-bert/bert-base-uncased (< 1 MB); "
        "HPS_v2_compressed.pt of xswu/HPSv2 (2.0 GB); fetch them with: "
        "rltune models fetch laion_aesthetic clip_score imagereward hpsv2"
    )


@pytest.mark.slow
def test_files_of_one_repository_are_counted_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: set[str]
) -> None:
    missing |= {"model.safetensors", "config.json", "vocab.json"}
    text = "rewards: {object_count: {options: {of: cat, target: 2}}}\nevaluate: {judges: [diversity_dino]}\n"
    assert plan_with(tmp_path, capsys, text)["weights"] == (
        "not on this machine: model.safetensors, config.json, vocab.json of google/owlv2-base-patch16-ensemble "
        "(621 MB); model.safetensors, config.json of facebook/dinov2-base (346 MB); fetch them with: "
        "rltune models fetch object_count diversity_dino"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rewards", "is_told"),
    [
        ("imagereward: {}", True),
        ("imagereward: {options: {weights: mine.pt}}", False),
        ("imagereward: {options: {vocab: mine.txt}}", False),
        ("imagereward: {options: {weights: null}}", True),
        ("laion_aesthetic: {options: {head: mine.pth}}", False),
        ("laion_aesthetic: {options: {clip: builtin}}", False),
        ("clip_score: {options: {model: builtin}}", False),
        ("mine: {reward: imagereward, options: {weights: mine.pt}}, theirs: {reward: imagereward}", True),
        ("brightness: {}", False),
        ("mine: {reward: 'tests.toys:toy_reward', weight: 0}, brightness: {}", False),
    ],
)
def test_a_reward_with_weights_of_the_users_own_is_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: set[str], rewards: str, is_told: bool
) -> None:
    missing |= {"ImageReward.pt", "open_clip_model.safetensors", "sac+logos+ava1-l14-linearMSE.pth"}
    for name in ("mine.pt", "mine.txt", "mine.pth"):
        (tmp_path / name).touch()
    rewards = rewards.replace(": mine.", f": {tmp_path}/mine.")
    plan = plan_with(tmp_path, capsys, f"rewards: {{{rewards}}}\n")
    assert ("weights" in plan) == is_told


@pytest.mark.slow
def test_the_plan_says_what_workers_take_and_where_they_may_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = tuple(Node(16, 2, frozenset({kind})) for kind in ("H100", "H100", "A100"))
    (tmp_path / "x.yaml").write_text(
        "rewards: {brightness: {}}\n"
        "resources: {workers: 4, min_workers: 2, cpus_per_worker: 8, gpus_per_worker: 1, accelerator: H100}\n"
    )
    experiment = load_experiment(tmp_path / "x.yaml")
    found = plan(experiment, nodes, RunFolder(tmp_path / "run"), is_attached=True)
    running.print_plan(found, Cluster("10.0.0.1:6379", False, "", nodes))
    lines = plan_of(capsys.readouterr().err)
    assert lines["a trial"].endswith("; 2 to 4 workers with 8 CPUs and 1 GPU on a node with H100 each")
    assert lines["runs on"] == "10.0.0.1:6379, 2 of 3 nodes"


@pytest.mark.slow
def test_a_plan_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 8 workers with 1 CPU and 1 GPU each, and the cluster has room for 4"):
        dry_run(ROOT / "experiments" / "mix.yaml", tmp_path, "resources.workers=8", is_sweep=True)


def test_every_name_that_can_be_written_is_known() -> None:
    known = known_names()
    assert {"alignprop", "dag", "ddpo", "dpok", "draft", "draft_lv", "drtune", "full", "refl"} <= set(known.estimators)
    assert "brightness" in known.rewards
    assert known.judges == ("diversity", "drift", "domination", "collapse")
    assert (known.executors, known.fixed_size_executors) == (("train", "warm"), ("warm",))
    assert known.samplers == ("surrogate", "tpe", "gp", "nsga2", "nsga3", "random", "quasi_random", "grid")


def test_what_names_need_is_read_without_building_them() -> None:
    known = known_names()
    assert known.policy_estimators == ("dag", "ddpo", "dpok")
    assert known.serial_estimators == ("draft_lv", "drtune", "refl")
    assert set(known.rewards_without_gradient) >= {"faithful", "faithful_exact", "callable", "http", "jpeg_bytes"}
    assert known.group_rewards == ("diversity_dino", "diversity_pixels")

    assert known.rewards_without_gradient == ("callable", "faithful", "faithful_exact", "http", "jpeg_bytes")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("{count: {options: {target: 3}}}", r"rewards\.count\.options: reward 'count': target must be"),
        (
            "{a: {reward: compressibility, options: {quality: 0}}}",
            r"rewards\.a\.options\.quality: must be .* from 1 to 100, got 0",
        ),
        (
            "{compressibility: {options: {quality: {choice: [50, 101]}}}}",
            r"options\.quality\.choice\[1\]: must be .* got 101",
        ),
        ("{brightness: {}, http: {weight: 0}}", r"rewards\.http\.options: reward 'http': url must be given"),
    ],
)
def test_a_wrong_value_of_a_rewards_option_is_found_before_anything_starts(
    tmp_path: Path, rewards: str, message: str
) -> None:
    (tmp_path / "x.yaml").write_text(f"rewards: {rewards}\n")
    with pytest.raises(UserError, match=message):
        dry_run(tmp_path / "x.yaml", tmp_path / "runs", is_sweep="choice" in rewards)
