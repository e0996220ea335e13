"""The detector against transformers' own processor and forward pass."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer, Owlv2ForObjectDetection, Owlv2ImageProcessor

from rltune.builtin.render import render
from rltune.builtin.scenes import make_scene
from rltune.errors import UserError
from rltune.rewards import owlv2
from rltune.rewards.frozen import checkpoint_blocks
from rltune.rewards.owlv2 import OWLV2_FILES, Owlv2, load_owlv2, query_text

STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
PHRASES = ("red apple", "cat")


@pytest.fixture
def detector(owlv2_folder: Path) -> Owlv2:
    return load_owlv2("object_count", str(owlv2_folder), PHRASES)


def make_pictures(height: int, width: int) -> Tensor:
    scenes = render([make_scene(0, i) for i in range(4)])
    enlarged = torch.nn.functional.interpolate(scenes, size=(height, width), mode="bilinear")
    return (enlarged * 255).round() / 255


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


# Smaller than the detector's 64 px, larger, wide, high, and made smaller by much.
@pytest.mark.parametrize("size", [(64, 64), (48, 40), (96, 96), (65, 100), (160, 96), (300, 40)])
def test_preprocessing_is_the_processors(detector: Owlv2, size: tuple[int, int]) -> None:
    pictures = make_pictures(*size)
    processor = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    expected = processor([to_pil(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    actual = detector.preprocess(pictures)
    assert actual.shape == (4, 3, 64, 64)
    error = (actual - expected).abs() * STD * 255
    assert error.max() < 1e-3  # float32 rounding of 255 levels after a few operations; measured 7e-5


def test_logits_and_boxes_are_those_of_the_librarys_forward(detector: Owlv2, owlv2_folder: Path) -> None:
    network = Owlv2ForObjectDetection.from_pretrained(owlv2_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(owlv2_folder)
    pixels = detector.preprocess(make_pictures(64, 64))
    texts = ["a photo of a red apple", "a photo of a cat"]
    # The library wants each image's phrases anew, padded to one length.
    queries = tokenizer(texts * 4, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = network(pixel_values=pixels, **queries)
    logits, boxes = detector.detect(make_pictures(64, 64))
    assert logits.shape == (4, 64, 2)
    # Sums in another order, in float32, of logits of a few.
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(detector.logits(make_pictures(64, 64)), logits, rtol=0, atol=0)
    x, y, width, height = expected.pred_boxes.unbind(dim=-1)
    corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1)
    torch.testing.assert_close(boxes, corners, rtol=1e-5, atol=1e-5)


def test_logits_need_no_boxes(detector: Owlv2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector._network, "box_predictor", None)
    assert detector.logits(make_pictures(64, 64)).shape == (4, 64, 2)


def test_recomputed_activations_change_no_gradient(detector: Owlv2) -> None:
    images = make_pictures(64, 64).requires_grad_()
    (kept,) = torch.autograd.grad(detector.logits(images).sum(), images)
    layers = detector._network.owlv2.vision_model.encoder.layers
    checkpoint_blocks(layers)
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    layers[0].self_attn.register_forward_pre_hook(count)
    (recomputed,) = torch.autograd.grad(detector.logits(images).sum(), images)
    assert num_calls == 2
    torch.testing.assert_close(recomputed, kept, rtol=1e-6, atol=1e-7)  # the same operations


def test_a_large_detector_recomputes(owlv2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(owlv2, "is_large", lambda network: True)
    monkeypatch.setattr(owlv2, "checkpoint_blocks", lambda blocks: seen.append(len(blocks)))
    load_owlv2("object_count", str(owlv2_folder), PHRASES)
    assert seen == [2]


def test_the_detector_is_frozen(detector: Owlv2) -> None:
    assert not detector._network.training
    assert {(p.requires_grad, p.dtype) for p in detector._network.parameters()} == {(False, torch.float32)}


def test_everything_moves(detector: Owlv2) -> None:
    detector.to(torch.device("meta"))
    assert detector._query_QD.device.type == "meta"
    assert {p.device.type for p in detector._network.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("red apple", "a photo of a red apple"),
        ("The  red apple", "a photo of The red apple"),
        ("an apple", "a photo of an apple"),
        ("a photo of two cats", "a photo of two cats"),
        ("a photograph", "a photo of a photograph"),
        ("A Photo of cats", "A Photo of cats"),
        ("anthill", "a photo of a anthill"),
    ],
)
def test_a_phrase_is_asked_for_as_published(phrase: str, text: str) -> None:
    assert query_text(phrase) == text


def test_a_phrase_that_the_model_cannot_read_whole_is_refused(owlv2_folder: Path) -> None:
    # The tiny tokenizer knows letters alone: begin, "aphotoofa", and end are 11 of 40 tokens.
    load_owlv2("object_count", str(owlv2_folder), ["b" * 29])
    with pytest.raises(UserError, match=r"reward 'object_count': of must be at most 40 tokens .*, got 41"):
        load_owlv2("object_count", str(owlv2_folder), ["cat", "b" * 30])


def test_the_published_files() -> None:
    assert {file.file for file in OWLV2_FILES} == {"model.safetensors", "config.json", "vocab.json", "merges.txt"}
    assert {file.repo for file in OWLV2_FILES} == {"google/owlv2-base-patch16-ensemble"}
