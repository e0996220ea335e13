"""The Python of the pages compiles; what a reader is told to run is run."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

import rltune
from rltune.assets import BUILTIN_DIR
from rltune.cli.main import app
from rltune.cli.rewards import check_reward
from rltune.config.experiment import RunConfig
from rltune.config.load import load_experiment
from rltune.diffusion.chain import NO_GRADIENT
from rltune.diffusion.conditioning import attach_mix
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, lora_parameters, lora_state
from rltune.export.base import Adapter
from rltune.export.conditioning import ConditioningFile, Mixed, script
from rltune.export.diffusers import Diffusers
from rltune.orchestration import campaign
from rltune.orchestration.known import known_names
from rltune.rewards.base import RewardRegistry
from rltune.runs.layout import RunFolder
from rltune.training.adapters.base import MixValues
from rltune.training.evaluation import to_uint8
from rltune.training.rewards import build_reward
from rltune.training.sampling import make_sampler
from tests import run_folders
from tests.docs.pages import PAGES, README, ROOT, Page, commands_of, page_named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_python_compiles(page: Page) -> None:
    for block in page.blocks("python"):
        ast.parse(block)


def block_with(page: Page, language: str, words: str) -> str:
    (code,) = (code for code in page.blocks(language) if words in code)
    return code


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's folder, from whose modules Python imports; what was imported from it goes with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in sys.modules.keys() - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_the_pages_own_reward_is_one(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_named("own-reward")
    (reader / "my_rewards.py").write_text(block_with(page, "python", "def redness"))
    (reader / "red.yaml").write_text(block_with(page, "yaml", "# red.yaml"))
    check_reward("my_rewards:redness", images=[], prompts=[], options=["strength=2.0"], device="cpu")
    assert "ok" in capsys.readouterr().out
    config = load_experiment(reader / "red.yaml", [], known_names()).shared
    reward = build_reward("red", config.rewards["red"])
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    assert reward(red, [""]).tolist() == [2.0]


def test_the_page_s_class_is_one(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (reader / "taste.py").write_text(block_with(page_named("own-reward"), "python", "# taste.py"))
    check_reward("taste:Taste", images=[], prompts=[], options=["channels=2"], device="cpu")
    assert "0 to 1" in capsys.readouterr().out


def test_the_page_s_package_registers_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = RewardRegistry()
    monkeypatch.setattr("rltune.rewards.base.REWARDS", registry)
    exec(block_with(page_named("own-reward"), "python", "# my_package/sharpness.py"), {"__name__": "my_package"})
    stripes = torch.zeros(1, 3, 4, 5)
    stripes[..., ::2] = 1.0
    assert registry.build("sharpness", {})(stripes, [""]).tolist() == [1.0]


def test_the_lora_is_used_alike_in_the_readme_and_on_its_page() -> None:
    assert block_with(README, "python", "load_lora_weights") in page_named("loras").blocks("python")


@pytest.mark.long
def test_the_readmes_lora_is_drawn_in_a_process_of_its_own_from_another_folder(tmp_path: Path) -> None:
    code = block_with(README, "python", "load_lora_weights")
    model = load_model("builtin")
    add_lora(model.network, rank=2, alpha=8, targets="attention", seed=0)
    for parameter in lora_parameters(model.network):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    state = lora_state(model.network)
    folder = code.split('load_lora_weights("')[1].split('"')[0]
    picture = code.split('save("')[1].split('"')[0]

    def drawn(code: str) -> list[tuple[int, int]]:
        seeded = f"import torch\ntorch.manual_seed(0)\n{code}"
        subprocess.run([sys.executable, "-c", seeded], check=True, timeout=300, cwd=tmp_path)
        with Image.open(tmp_path / picture) as image:
            assert image.size == (64, 64)
            return image.convert("RGB").getextrema()

    Diffusers().write(model, Adapter(state, 2, 8, "attention"), tmp_path / folder)
    with_lora = drawn(code)
    assert all(low < high for low, high in with_lora)  # not one flat colour
    without = drawn("\n".join(line for line in code.splitlines() if "load_lora_weights" not in line))
    assert with_lora != without


@pytest.mark.long
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_the_pages_numbers_are_applied_as_rltune_applies_them(
    guidance: float, reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script of the page, as it stands, from the noise that rltune draws from."""
    code = block_with(page_named("loras"), "python", "callback_on_step_end")
    file = Path(code.split('open("')[1].split('"')[0])
    assert code.rstrip() == script("builtin", str(file))
    sampling = {"steps": 12, "guidance": guidance, "eta": 0.0, "negative": "muted" if guidance > 1 else ""}
    config = RunConfig.model_validate({"rewards": {"brightness": {}}, "sampler": sampling})
    model = load_model("builtin")
    sampler = make_sampler(config, model)
    timesteps_T = sampler.table.timesteps_T.double()
    lambda_T = torch.linspace(-0.5, 2.0, 12)
    values = MixValues({"lambda_T": lambda_T, "timesteps_T": timesteps_T}, "{prompt}, glossy, dark corners")
    ConditioningFile().write(model, Mixed(values, config), reader / file.parent)
    x_BCHW = torch.randn(1, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(3))
    prompt = code.split('prompt = "')[1].split('"')[0]

    def drawn() -> Any:
        with torch.no_grad():
            return to_uint8(sampler.decode(sampler.latents([prompt], x_BCHW, plan=NO_GRADIENT, noise=None)))[0] * 1.0

    base = drawn()
    attach_mix(model, values.mix())
    expected = drawn()
    monkeypatch.setattr(StableDiffusionPipeline, "prepare_latents", lambda *_: x_BCHW)
    exec(code, {})
    with Image.open("circle.png") as image:
        found = np.asarray(image.convert("RGB")) * 1.0
    assert np.abs(found - expected).max() <= 1  # rounding to bytes of float32 sums
    assert np.abs(base - expected).max() > 5


def test_the_model_cards_scene_is_as_shown() -> None:
    (code,) = Page(BUILTIN_DIR / "MODEL_CARD.md").blocks("python")
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(image := names["image"], torch.Tensor)
    assert image.shape == (3, 64, 64)
    assert 0 <= image.min() < image.max() <= 1


@pytest.fixture
def mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """``runs/mix``, as a sweep leaves it."""
    weights = {"rewards.aesthetic.weight": 0.25, "rewards.alignment.weight": 0.75}
    monkeypatch.setattr(run_folders, "VALUES", {"model.lora.rank": 4, "optim.lr": 1e-3, **weights})
    rewards = {name: {"weight": {"simplex": True}} for name in ("aesthetic", "alignment")}
    asked = run_folders.experiment(rewards=rewards, objectives=["aesthetic"])
    ended = [run_folders.result("000", 0.5), run_folders.result("001", 0.8)]
    for row in ended:
        row.metrics.update({"eval/aesthetic": row.metrics["eval/brightness"], "gain/aesthetic": 0.3})
    folder = run_folders.write_run(tmp_path / "runs" / "mix", asked, ended, spread={"aesthetic": 0.1})
    run_folders.write_rows(folder, "001", [{"step": 1, "train/reward": 0.1}])
    return folder


@pytest.mark.slow
def test_the_page_about_python_runs(
    mix: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every block after the other, but for the training itself."""
    asked: list[Any] = []

    def run_campaign(found: Any, *, display: Any, **_: Any) -> SimpleNamespace:
        asked.append(found)
        shown: AbstractContextManager[None] = display(mix, rltune.open_run(mix.path).experiment)
        with shown:
            pass
        return SimpleNamespace(folder=mix)

    monkeypatch.setattr(campaign, "run_campaign", run_campaign)
    monkeypatch.setattr(campaign, "find_address", lambda address: None)
    (mix.path.parent.parent / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(mix.path.parent.parent)
    names: dict[str, Any] = {}
    for block in page_named("python").blocks("python"):
        if "to_pandas" in block and importlib.util.find_spec("pandas") is None:
            continue
        exec(block, names)
    assert names["experiment"].num_trials == asked[0].num_trials == 4
    assert list(names["experiment"].shared.rewards) == ["aesthetic", "alignment", "compressibility"]
    assert names["rewards"] == [(1, 0.1)]
    printed = capsys.readouterr().out
    assert "4 trials, " in printed
    assert "False 10\n" in printed
    assert "rewards.aesthetik | " in printed
    assert "1 of 4: " in printed
    assert "001 ok 4 0.3\n" in printed
    assert "knee: 001 hypervolume: " in printed


def test_what_the_page_says_of_a_run_is_there(mix: RunFolder) -> None:
    text = page_named("python").text
    run = rltune.open_run(mix.path)
    shown = {name for name in dir(run) if not name.startswith("_") and name != "to_pandas"}
    assert {name for name in shown if f"`run.{name}`" not in text} == set()
    for key in ("trial", "state", "reason", "duration_s", "is_feasible", "model.lora.rank", "eval/aesthetic"):
        assert key in run.trials[1]
    assert run.front is not None
    assert {"members", "knee", "best", "hypervolume", "reference_point", "units"} <= run.front.keys()
    calls = {name for name in rltune.__all__ if name[0].islower()}
    assert {name for name in calls if f"`rltune.{name}(" not in text} == set()


@pytest.mark.long
def test_the_noise_is_optimised_as_the_page_says(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(block_with(page_named("rewards"), "python", "optimise_noise"), names)
    assert names["found"].objective_SB.shape == (4, 1)
    (words,) = [words for words in commands_of(page_named("rewards")) if "--optimise" in words]
    runner = CliRunner()
    result = runner.invoke(app, [*words[1:], "--steps", "2", "--optimise-steps", "1", "--images", "1"])
    assert result.exit_code == 0, result.output
    assert (reader / "samples.png").is_file()
