"""Trust in a reward: the distance by linear algebra of its own, and the references it is measured from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rltune.errors import UserError
from rltune.rewards.base import REWARDS
from rltune.rewards.references import read_image, reference_features
from rltune.rewards.trust import RIDGE, fit_trust, read_features

CPU = torch.device("cpu")


def make_features(num: int = 200, width: int = 6) -> torch.Tensor:
    spread = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5, 0.1]))[:width, :width]
    return torch.randn(num, width, generator=torch.Generator().manual_seed(0)) @ spread


def test_the_distance_is_mahalanobis_in_units_of_the_references() -> None:
    features = make_features()
    z = features.double().numpy()
    moment = z.T @ z / len(z)
    moment += RIDGE * np.trace(moment) / 6 * np.eye(6)
    own = np.sqrt(np.einsum("ni,ni->n", z, np.linalg.solve(moment, z.T).T))
    trust = fit_trust(features)
    # float32 products with an inverse of condition 400
    np.testing.assert_allclose(trust.distance(features).numpy(), own / np.sqrt((own**2).mean()), rtol=1e-4)
    assert trust.distance(features).square().mean().item() == pytest.approx(1, rel=1e-4)
    assert trust.distance(3 * features[:1]).item() == pytest.approx(3 * trust.distance(features[:1]).item(), rel=1e-4)


def test_the_weight_is_prefpaints_curve_between_one_and_the_ceiling() -> None:
    trust = fit_trust(make_features(), slope=0.5, offset=1.0, ceiling=2.0)
    direction = make_features(1)
    unit = direction / trust.distance(direction)
    weights = trust(torch.cat([0 * unit, unit, 1.5 * unit, 1.9 * unit, 50 * unit]))
    expected = [2.0, np.exp(0.5), np.exp(0.25), np.exp(0.05), 1.0]
    assert weights.tolist() == pytest.approx(expected, rel=1e-4)


def test_trust_passes_no_gradient() -> None:
    features = make_features(3).requires_grad_()
    assert not fit_trust(make_features())(features).requires_grad


def test_fewer_references_than_features_leave_no_direction_free() -> None:
    trust = fit_trust(make_features(3))
    assert trust.distance(torch.eye(6)).isfinite().all()
    assert (trust.distance(torch.eye(6)) > 0).all()


@pytest.mark.parametrize("features", [torch.zeros(0, 4), torch.full((2, 2), torch.nan), torch.zeros(3)])
def test_features_that_are_none_are_refused(features: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="features must be"):
        fit_trust(features)


@pytest.mark.slow
def test_features_come_from_a_file_a_folder_or_the_built_in_world(clip_folder: Path, tmp_path: Path) -> None:
    reward = REWARDS.build("alignment", {"model": str(clip_folder)})
    kept = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    save_file({"features": kept}, tmp_path / "kept.safetensors")
    assert torch.equal(reference_features(reward, str(tmp_path / "kept.safetensors"), CPU), kept)
    save_file({"features": make_features()}, tmp_path / "kept.safetensors")
    with pytest.raises(UserError, match=r"kept\.safetensors' holds features 6 wide, the reward's are 16"):
        reference_features(reward, str(tmp_path / "kept.safetensors"), CPU)

    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    for name, image in zip(("b.png", "a.PNG"), pixels, strict=True):
        Image.fromarray(image).save(folder / name, "png")
    Image.fromarray(pixels[0, :, :, 0]).save(folder / "grey.jpg")
    (folder / "a.txt").write_text("a cat\n")
    (folder / "notes.md").write_text("no image")
    features = reference_features(reward, str(folder), CPU)
    assert features.shape == (3, 16)
    expected = reward.features(torch.from_numpy(pixels[1] / 255).permute(2, 0, 1)[None], [""])  # type: ignore[attr-defined]
    torch.testing.assert_close(features[:1], expected)

    scenes = reference_features(reward, "builtin", CPU)
    assert scenes.shape == (512, 16)
    assert scenes.std(dim=0).max() > 0


def test_what_is_no_reference_is_named(clip_folder: Path, tmp_path: Path) -> None:
    reward = REWARDS.build("alignment", {"model": str(clip_folder)})
    with pytest.raises(UserError, match=r"'/no/such' is neither 'builtin' nor a safetensors file nor a folder"):
        reference_features(reward, "/no/such", CPU)
    save_file({"other": make_features()}, tmp_path / "x.safetensors")
    save_file({"features": torch.zeros(3)}, tmp_path / "y.safetensors")
    (tmp_path / "z.safetensors").write_bytes(b"no")
    for name in ("x", "y", "z"):
        with pytest.raises(UserError, match=rf"{name}\.safetensors"):
            read_features(tmp_path / f"{name}.safetensors")
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"broken\.png: is not an image"):
        read_image(tmp_path / "broken.png")


def test_a_transparent_or_grey_image_is_read_as_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (5, 7), 0).save(tmp_path / f"{mode}.png")
        assert read_image(tmp_path / f"{mode}.png").shape == (3, 7, 5)
