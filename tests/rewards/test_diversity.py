"""Distances within a prompt against plain loops, and DINOv2's preprocessing and features against transformers'."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Model

from rltune.builtin.render import render
from rltune.builtin.scenes import make_scene
from rltune.rewards.base import REWARDS
from rltune.rewards.diversity import dino_preprocess
from rltune.training.evaluation import diversity

IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
PROMPTS = ("a", "b", "a", "c", "b", "a")


def make_pictures(num_pictures: int, height: int = 64, width: int = 64) -> Tensor:
    scenes = render([make_scene(0, i) for i in range(num_pictures)])
    enlarged = torch.nn.functional.interpolate(scenes, size=(height, width), mode="bicubic").clamp(0, 1)
    return (enlarged * 255).round() / 255


def looped(distance: np.ndarray) -> list[float]:
    means = []
    for i, prompt in enumerate(PROMPTS):
        others = [distance[i, j] for j, other in enumerate(PROMPTS) if other == prompt and j != i]
        means.append(float(np.mean(others)) if others else 0.0)
    return means


def test_pixels_are_the_mean_distance_to_the_other_images_of_the_prompt() -> None:
    pictures = make_pictures(6)
    x = pictures.double().numpy()
    distance = np.array([[np.sqrt(np.mean((x[i] - x[j]) ** 2)) for j in range(6)] for i in range(6)])
    scores = REWARDS.build("diversity_pixels", {})(pictures, PROMPTS)
    # float32 means of 12288 numbers; the 1e-8 under the root adds 5e-8 at a distance of 0.1.
    assert scores.tolist() == pytest.approx(looped(distance), abs=2e-6)
    assert scores[3] == 0


def test_pixels_agree_with_the_judge() -> None:
    pictures = make_pictures(8)
    pixels = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    prompts = ["a"] * 4 + ["b"] * 4
    scores = REWARDS.build("diversity_pixels", {})(pictures, prompts).reshape(2, 4).mean(dim=1)
    assert scores.tolist() == pytest.approx(diversity(pixels, 4).tolist(), abs=2e-6)  # as above


def test_white_and_black_are_one_apart() -> None:
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    assert REWARDS.build("diversity_pixels", {})(images, ["a", "a"]).tolist() == [1.0, 1.0]


def test_features_are_the_librarys_and_dino_is_one_minus_their_cosine(dino_folder: Path) -> None:
    pictures = make_pictures(6, 96, 128)
    reward = REWARDS.build("diversity_dino", {"model": str(dino_folder)})
    network = Dinov2Model.from_pretrained(dino_folder).eval()
    with torch.no_grad():
        tokens = network(pixel_values=dino_preprocess(pictures)).last_hidden_state
    assert reward.features is not None
    features = reward.features(pictures, PROMPTS)
    torch.testing.assert_close(features, tokens[:, 0], rtol=1e-5, atol=1e-5)  # the same operations
    x = tokens[:, 0].double().numpy()
    norm = np.linalg.norm(x, axis=1)
    distance = np.array([[1 - x[i] @ x[j] / (norm[i] * norm[j]) for j in range(6)] for i in range(6)])
    assert max(looped(distance)) > 1e-4
    assert reward(pictures, PROMPTS).tolist() == pytest.approx(looped(distance), rel=1e-3, abs=1e-6)  # float32 features


@pytest.mark.parametrize("size", [(256, 256), (300, 420), (512, 512)])
def test_preprocessing_is_the_processors_but_for_its_rounding(size: tuple[int, int]) -> None:
    # Less contrast than the scenes have: bytes clip what bicubic interpolation overshoots, and we do not.
    pictures = ((0.1 + 0.8 * make_pictures(4, *size)) * 255).round() / 255
    # The published preprocessor_config.json of facebook/dinov2-base.
    processor = BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    pil = [Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()) for picture in pictures]
    expected = processor(pil, return_tensors="pt")["pixel_values"]
    error = (dino_preprocess(pictures) - expected).abs() * IMAGENET_STD * 255
    # The processor resizes bytes: half a level of rounding after each of two passes, amplified by the bicubic weights,
    # as in the tests of CLIP's.
    assert error.max() < 1.5
    assert error.mean() < 0.4


@pytest.mark.parametrize("name", ["diversity_pixels", "diversity_dino"])
def test_two_equal_images_have_a_finite_gradient(name: str, dino_folder: Path) -> None:
    options = {"model": str(dino_folder)} if name == "diversity_dino" else {}
    reward = REWARDS.build(name, options)
    images = make_pictures(1).expand(3, -1, -1, -1).clone().requires_grad_()
    score = reward(images, ["a", "a", "a"])
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert gradient.isfinite().all()
    assert (score.detach() <= 1.1e-4).all()  # 1e-4 by the number under the root, float32
    assert (score.detach() >= 0).all()


@pytest.mark.parametrize("name", ["diversity_pixels", "diversity_dino"])
def test_images_alone_of_their_prompt_score_zero_and_have_a_gradient_of_zero(name: str, dino_folder: Path) -> None:
    options = {"model": str(dino_folder)} if name == "diversity_dino" else {}
    images = make_pictures(2).requires_grad_()
    reward = REWARDS.build(name, options)
    assert reward.sees_group
    score = reward(images, ["a", "b"])
    assert score.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert gradient.abs().max() == 0
