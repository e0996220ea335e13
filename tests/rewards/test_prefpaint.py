"""PrefPaint's reward against its published classes, and what trust makes of its features."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rltune.canvas import Canvas
from rltune.errors import UserError
from rltune.rewards.base import REWARDS
from rltune.rewards.preprocess import CLIP_MEAN, CLIP_STD
from rltune.rewards.trust import fit_trust
from tests.rewards.prefpaint_layout import WIDTH, Published
from tests.tiny_inpaint import Noise, canvases

SIZE = 64
PROMPTS = ["a cat", "a dog", "a fox"]


def build(path: Path, **options: str) -> object:
    return REWARDS.build("prefpaint", {"weights": str(path), **options})


def pictures() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def given(prompts: list[str]) -> Tensor:
    """What is given of each, black elsewhere, by hand."""
    rows = []
    for prompt in prompts:
        assert isinstance(prompt, Canvas)
        image, mask = prompt.read(SIZE, SIZE)
        row = torch.from_numpy(image.copy()).permute(2, 0, 1) / 255
        row[:, torch.from_numpy(mask.copy())] = 0
        rows.append(row)
    return torch.stack(rows)


def seen(images: Tensor) -> Tensor:
    return (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def test_it_is_the_published_score_of_the_image_and_of_what_was_given(prefpaint_file: Path) -> None:
    reward, prompts, published = (
        REWARDS.build("prefpaint", {"weights": str(prefpaint_file)}),
        canvases(PROMPTS),
        Published(),
    )
    with torch.no_grad():
        scores, features = published(seen(pictures()), seen(given(prompts)))
    assert float(scores.std()) > 0.05
    torch.testing.assert_close(reward(pictures(), prompts), scores, rtol=1e-4, atol=1e-5)
    assert reward.features is not None
    torch.testing.assert_close(reward.features(pictures(), prompts), features, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_the_published_ones_in_the_image_alone(prefpaint_file: Path) -> None:
    reward, prompts = REWARDS.build("prefpaint", {"weights": str(prefpaint_file)}), canvases(PROMPTS)
    ours, theirs = pictures().requires_grad_(), pictures().requires_grad_()
    (slope,) = torch.autograd.grad(reward(ours, prompts).sum(), ours)
    (expected,) = torch.autograd.grad(Published()(seen(theirs), seen(given(prompts)))[0].sum(), theirs)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-6)
    assert bool(slope.flatten(1).any(1).all())


def test_another_picture_behind_the_same_words_gives_another_score(prefpaint_file: Path) -> None:
    reward = REWARDS.build("prefpaint", {"weights": str(prefpaint_file)})
    images = pictures()[:1]
    scores = [float(reward(images, [Canvas("a cat", Noise(seed))])) for seed in (0, 1, 0)]
    assert scores[0] == scores[2] != scores[1]
    assert float(reward(images, ["a cat"])) == float(reward(images, ["a dog"]))  # nothing is given: black


def test_trust_is_measured_by_the_last_features(prefpaint_file: Path, tmp_path: Path) -> None:
    reward, prompts = REWARDS.build("prefpaint", {"weights": str(prefpaint_file)}), canvases(PROMPTS)
    assert reward.features is not None
    features = reward.features(pictures(), prompts)
    assert features.shape == (3, 16)
    weights = fit_trust(features)(features)
    assert bool(((weights >= 1) & (weights <= 2.21)).all())


def test_a_head_on_another_clip_model_is_taken_if_it_is_as_wide(prefpaint_file: Path, clip_folder: Path) -> None:
    with pytest.raises(UserError, match=rf"the head reads {2 * WIDTH} features, CLIP model .* gives 32; give the one"):
        build(prefpaint_file, clip=str(clip_folder))


def test_files_of_another_layout_are_refused(tmp_path: Path, prefpaint_file: Path) -> None:
    (tmp_path / "none.pt").write_bytes(b"0" * 64)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    state = {name: value.clone() for name, value in torch.load(prefpaint_file, weights_only=True).items()}
    short = {name: value for name, value in state.items() if "linear2" not in name}
    save_file(short, tmp_path / "short.safetensors")
    save_file({name: value for name, value in state.items() if "clip_model" not in name}, tmp_path / "bare.safetensors")
    for name in ("none.pt", "other.pt", "short.safetensors"):
        with pytest.raises(UserError, match=rf"reward 'prefpaint': .*{name} is not a state dict of PrefPaint's reward"):
            build(tmp_path / name)
    with pytest.raises(UserError, match=r"bare\.safetensors is not a checkpoint of ViT-B-32"):
        build(tmp_path / "bare.safetensors")
