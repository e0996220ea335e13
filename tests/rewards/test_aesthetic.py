"""The aesthetic heads against the formulas of their layouts, and the refusal of wrong files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rltune.assets import BUILTIN_AESTHETIC_HEAD, BUILTIN_CLIP_DIR
from rltune.errors import RunError, UserError
from rltune.rewards import aesthetic
from rltune.rewards.aesthetic import load_builtin_head, load_laion_head, read_laion_head
from rltune.rewards.base import REWARDS
from rltune.rewards.clip_loading import load_clip

LAION_FILE = Path(__file__).parents[3] / "shared" / "data" / aesthetic.LAION_HEAD.file
LAION_LAYERS = (0, 2, 4, 6, 7)
needs_laion_file = pytest.mark.skipif(not LAION_FILE.is_file(), reason="LAION's head is not there")


def product_of_maps(state: dict[str, torch.Tensor], x_BD: np.ndarray) -> np.ndarray:
    """LAION's head in float64 by hand: with no activation it is one affine map."""
    for i in LAION_LAYERS:
        x_BD = x_BD @ state[f"layers.{i}.weight"].double().numpy().T + state[f"layers.{i}.bias"].double().numpy()
    return x_BD


def random_laion_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for k, i in enumerate(LAION_LAYERS):
        shape = aesthetic.LAION_WIDTHS[k + 1], aesthetic.LAION_WIDTHS[k]
        state[f"layers.{i}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        state[f"layers.{i}.bias"] = torch.randn(shape[0], generator=generator)
    return state


def test_the_builtin_score_is_offset_plus_scale_times_the_perceptron(clip_folder: Path, head_file: Path) -> None:
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    state = {key: value.double().numpy() for key, value in load_file(head_file).items()}
    x_BD = load_clip(str(clip_folder)).image_features(images).double().numpy()
    for i in (0, 2):
        x_BD = x_BD @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
        x_BD = x_BD / (1 + np.exp(-x_BD))  # SiLU
    expected = 5.5 + 2.0 * (x_BD @ state["layers.4.weight"].T + state["layers.4.bias"])[:, 0]
    reward = REWARDS.build("aesthetic", {"clip": str(clip_folder), "head": str(head_file)})
    assert reward(images, ["", ""]).tolist() == pytest.approx(expected.tolist(), rel=1e-6)  # float32 of 5.5


@pytest.mark.parametrize(
    ("key", "value"),
    [("in", "15"), ("hidden", "[12]"), ("hidden", "12, 8"), ("activation", "gelu"), ("scale", "big"), ("offset", None)],
)
def test_a_head_of_another_layout_is_refused(head_file: Path, tmp_path: Path, key: str, value: str | None) -> None:
    with safe_open(head_file, framework="pt") as file:
        header = file.metadata()
    header = {name: old for name, old in (header | {key: value}).items() if old is not None}
    save_file(load_file(head_file), tmp_path / "head.safetensors", metadata=header)
    with pytest.raises(UserError, match=r"head\.safetensors is not a head"):
        load_builtin_head(tmp_path / "head.safetensors")


def test_a_head_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "head").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="is not a head"):
        load_builtin_head(tmp_path / "head")
    with pytest.raises(RunError, match="nothing is missing"):
        load_builtin_head(tmp_path / "nothing")


def test_laions_head_is_a_product_of_matrices(tmp_path: Path) -> None:
    state = random_laion_state()
    torch.save(state, tmp_path / "head.pth")
    x_BD = torch.nn.functional.normalize(torch.randn(4, 768, generator=torch.Generator().manual_seed(1)))
    actual = read_laion_head(tmp_path / "head.pth")(x_BD).detach().numpy()
    # float32 sums of up to 1024 terms of size 1/sqrt(1024)
    np.testing.assert_allclose(actual, product_of_maps(state, x_BD.double().numpy()), atol=1e-5)


def test_a_head_that_was_fetched_must_be_the_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_folder: Path
) -> None:
    monkeypatch.setenv("RLTUNE_CACHE", str(tmp_path))
    torch.save(random_laion_state(), tmp_path / aesthetic.LAION_HEAD.file)
    with pytest.raises(UserError, match=f"its sha256 is .* should be {aesthetic.LAION_HEAD.sha256}"):
        REWARDS.build("laion_aesthetic", {"clip": str(clip_folder)})


def test_a_head_that_was_given_may_be_another_of_the_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(random_laion_state(), tmp_path / "head.pth")
    load_laion_head(tmp_path / "head.pth", is_given=True)
    assert "not the published head" in caplog.text


def test_a_missing_head_says_what_to_fetch_and_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunError) as caught:
        REWARDS.build("laion_aesthetic", {})
    for part in (aesthetic.LAION_HEAD.file, "4 MB", "Apache-2.0", "rltune models fetch laion_aesthetic", "'head'"):
        assert part in str(caught.value)
    with pytest.raises(RunError, match=r"there is no file .*nothing\.pth; head must be sac"):
        REWARDS.build("laion_aesthetic", {"head": str(tmp_path / "nothing.pth")})


def test_a_head_of_another_clip_models_width_is_refused(clip_folder: Path, laion_head_file: Path) -> None:
    with pytest.raises(UserError, match=r"it reads 768 features, and CLIP model .* gives 16"):
        REWARDS.build("laion_aesthetic", {"head": str(laion_head_file), "clip": str(clip_folder)})


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not a state dict")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("other.pth", "text.pth", "list.pth"):
        with pytest.raises(UserError, match="is not a state dict of LAION's head"):
            read_laion_head(tmp_path / name)


@needs_laion_file
def test_the_published_head_loads_and_scores_as_the_formula_says() -> None:
    state = torch.load(LAION_FILE, map_location="cpu", weights_only=True)
    x_BD = torch.nn.functional.normalize(torch.randn(4, 768, generator=torch.Generator().manual_seed(1)))
    actual = load_laion_head(LAION_FILE, is_given=False)(x_BD).detach().numpy()
    np.testing.assert_allclose(actual, product_of_maps(state, x_BD.double().numpy()), rtol=1e-4, atol=1e-4)


def test_the_shipped_head_loads_and_fits_the_shipped_model() -> None:
    reward = REWARDS.build("aesthetic", {})
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert reward(images, ["", ""]).isfinite().all()
    with safe_open(BUILTIN_AESTHETIC_HEAD, framework="pt") as file:
        config = json.loads((BUILTIN_CLIP_DIR / "open_clip_config.json").read_text())
        assert int(file.metadata()["in"]) == config["model_cfg"]["embed_dim"]
