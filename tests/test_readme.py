"""What README.md and experiments/README.md name is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from rltune.assets import BUILTIN_DIR
from rltune.cli.main import app
from rltune.cli.rewards import check_reward
from rltune.cli.sweep import known_names
from rltune.config.load import load_experiment
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, lora_parameters, lora_state
from rltune.export.diffusers import write_lora
from rltune.rewards.base import REWARDS
from rltune.rewards.scalarise import SCALARISATIONS
from rltune.training.rewards import build_reward

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md"]
COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback}
GROUPS = {
    str(group.name): {str(command.name) for command in group.typer_instance.registered_commands}
    for group in app.registered_groups
    if group.typer_instance
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_files_and_links_exist(page: Path) -> None:
    text = page.read_text()
    commands = re.findall(r"(?:^|[`/ ])rltune ([a-z]+)(?: ([a-z]+))?(?=[ `\n])", text, flags=re.MULTILINE)
    prose = ("is", "starts", "itself", "with", "and", "runs", "in", "does", "packs", "hands", "has")
    named = {command for command in commands if command[0] not in prose}
    assert named
    assert {command for command, _ in named} <= COMMANDS | GROUPS.keys()
    for group, command in named:
        assert not command or group not in GROUPS or command in GROUPS[group], (group, command)
    for file in re.findall(r"experiments/[\w./-]+\.(?:yaml|txt|md)", text):
        assert (ROOT / file).is_file(), file
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link


def test_every_experiment_is_in_the_index() -> None:
    index = (ROOT / "experiments" / "README.md").read_text()
    for path in (ROOT / "experiments").rglob("*.yaml"):
        assert f"]({path.relative_to(ROOT / 'experiments')})" in index


def test_no_figure_is_left_to_fill_in() -> None:
    for page in PAGES:
        assert "@@" not in page.read_text()


def test_the_readmes_own_reward_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(# my_rewards\.py.*?)```", text, flags=re.DOTALL)
    (experiment,) = re.findall(r"```yaml\n(# red\.yaml.*?)```", text, flags=re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code)
    (tmp_path / "red.yaml").write_text(experiment)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    check_reward("my_rewards:redness", images=[], prompts=[], options=["strength=2.0"], device="cpu")
    assert "ok" in capsys.readouterr().out
    config = load_experiment(tmp_path / "red.yaml", [], known_names()).shared
    reward = build_reward("red", config.rewards["red"])
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    assert reward(red, [""]).tolist() == [2.0]


@pytest.mark.slow
def test_the_readmes_lora_is_drawn_in_a_process_of_its_own_from_another_folder(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?load_lora_weights.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    model = load_model("builtin")
    add_lora(model.network, rank=2, alpha=8, targets="attention", seed=0)
    for parameter in lora_parameters(model.network):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    state = lora_state(model.network)
    (folder,) = re.findall(r'load_lora_weights\("(.*?)"\)', code)
    (picture,) = re.findall(r'save\("(.*?)"\)', code)

    def drawn(code: str) -> list[tuple[int, int]]:
        seeded = f"import torch\ntorch.manual_seed(0)\n{code}"
        subprocess.run([sys.executable, "-c", seeded], check=True, timeout=300, cwd=tmp_path)
        with Image.open(tmp_path / picture) as image:
            assert image.size == (64, 64)
            return image.convert("RGB").getextrema()

    write_lora(model, state, rank=2, alpha=8, targets="attention", folder=tmp_path / folder)
    with_lora = drawn(code)
    assert all(low < high for low, high in with_lora)  # not one flat colour
    without = drawn("\n".join(line for line in code.splitlines() if "load_lora_weights" not in line))
    assert with_lora != without


def test_the_readmes_experiment_and_the_model_cards_scene_are_as_shown(tmp_path: Path) -> None:
    (experiment,) = re.findall(r"```yaml\n(model: .*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "mix.yaml").write_text(experiment)
    assert load_experiment(tmp_path / "mix.yaml", [], known_names()).is_searched
    (code,) = re.findall(r"```python\n(.*?)```", (BUILTIN_DIR / "MODEL_CARD.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(image := names["image"], torch.Tensor)
    assert image.shape == (3, 64, 64)
    assert 0 <= image.min() < image.max() <= 1


def test_every_reward_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in REWARDS.names() if f"`{name}`" not in text] == []
    methods = (f"`{method}`" for method in SCALARISATIONS)
    assert [method for method in methods if method not in text] == []
