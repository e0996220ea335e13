"""Soups of LoRAs against diffusers' own blending, closed forms, and torch's SVD of the whole matrices."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import ADAPTER, remove_lora
from rltune.diffusion.lora_start import Factors, read_lora
from rltune.diffusion.mix import BASE, Mix, image_keys, mixed_denoiser
from rltune.diffusion.soup import Layers, attach, factors_blended, interpolated, reduced
from rltune.errors import UserError
from rltune.export.diffusers import Diffusers
from tests.export.random_lora import RandomLora

KINDS: list[dict[str, Any]] = [
    {"targets": "attention", "rank": 2, "alpha": 8.0},
    {"targets": "all", "rank": 4, "alpha": 1.0, "use_rslora": True},
    {"targets": ("to_q", "linear_1", "conv_in"), "rank": 16, "alpha": 4.0},
]
"""Ranks, alphas, scales and layers all differ."""
WEIGHTS = (0.7, -0.4, 0.25)


@pytest.fixture(scope="module")
def folders(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("loras")
    for i, kind in enumerate(KINDS):
        lora = RandomLora(tiny_pipeline, **kind, size=0.1)
        Diffusers().write(lora.model, lora.adapter, root / str(i))
    return [root / str(i) for i in range(len(KINDS))]


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path) -> ModelFamily:
    return load_model(str(tiny_pipeline))


@pytest.fixture(scope="module")
def loras(model: ModelFamily, folders: list[Path]) -> list[Layers]:
    return [read_lora(model, folder) for folder in folders]


def predicted(model: ModelFamily, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 16, 32, generator=generator)
    network: Any = model.network
    with torch.no_grad():
        output: Tensor = network(x, 500, encoder_hidden_states=text).sample
    return output


@pytest.mark.long
def test_the_exact_soup_is_what_diffusers_blends(model: ModelFamily, folders: list[Path], loras: list[Layers]) -> None:
    """Ranks 2 + 4 + 16, to float32 rounding."""
    base = predicted(model)
    names = [f"a{i}" for i in range(len(folders))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of another adapter beside it
        for name, folder in zip(names, folders, strict=True):
            model.pipeline.load_lora_weights(folder, adapter_name=name)
    model.pipeline.set_adapters(names, list(WEIGHTS))
    expected = predicted(model)
    model.pipeline.unload_lora_weights()
    soup = interpolated(loras, WEIGHTS)
    assert {each.rank for each in soup.values()} == {22}
    attach(model.network, soup, ADAPTER)
    found = predicted(model)
    remove_lora(model.network)
    assert float((expected - base).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(predicted(model), base, rtol=0, atol=0)


def update(each: Factors) -> Tensor:
    return each.b.double().flatten(1) @ each.a.double().flatten(1)


def test_a_weight_of_zero_takes_no_room_and_the_base_model_is_a_member(loras: list[Layers]) -> None:
    only = interpolated([*loras, {}], (0.0, 2.0, 0.0, 5.0))
    assert {each.rank for each in only.values()} == {4}
    for name, each in only.items():
        torch.testing.assert_close(update(each), 2 * update(loras[1][name]))
    assert interpolated([loras[0], {}], (0.0, 1.0)) == {}


def test_the_blend_of_factors_is_its_closed_form(loras: list[Layers]) -> None:
    one = loras[1]
    other = {name: Factors(each.a.flip(0) + 0.1, each.b.flip(1) * 2, None) for name, each in one.items()}
    blend = factors_blended([one, other], (0.75, 0.25))
    assert blend.keys() == one.keys()
    for name, each in blend.items():
        a1, b1, a2, b2 = (f.double().flatten(1) for layer in (one[name], other[name]) for f in (layer.a, layer.b))
        closed = 0.5625 * b1 @ a1 + 0.0625 * b2 @ a2 + 0.1875 * (b1 @ a2 + b2 @ a1)
        torch.testing.assert_close(update(each), closed, rtol=1e-5, atol=1e-6)
        assert (each.a.shape, each.b.shape) == (one[name].a.shape, one[name].b.shape)
    with pytest.raises(UserError, match="needs LoRAs of the same rank and layers; take the method exact"):
        factors_blended(loras, WEIGHTS)


def test_a_smaller_rank_is_the_nearest_there_is(loras: list[Layers]) -> None:
    soup = interpolated(loras, WEIGHTS)
    small, error = reduced(soup, 5)
    assert {each.rank for each in small.values()} == {5}
    lost = whole = 0.0
    for name, each in soup.items():
        u, s, v = torch.linalg.svd(update(each), full_matrices=False)
        torch.testing.assert_close(update(small[name]), (u[:, :5] * s[:5]) @ v[:5], rtol=1e-4, atol=1e-5)
        assert small[name].a.shape[1:] == each.a.shape[1:]
        lost, whole = lost + float(s[5:].square().sum()), whole + float(s.square().sum())
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert 0.01 < error < 0.9
    again, none = reduced(soup, 22)
    assert none == pytest.approx(0, abs=1e-7)
    for name, each in again.items():
        torch.testing.assert_close(update(each), update(soup[name]), rtol=1e-4, atol=1e-5)


class Nested(nn.Module):
    """The name of one layer is the end of another's, as ``proj_out`` is in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"proj": nn.Linear(3, 3, bias=False)})
        self.proj = nn.Linear(3, 3, bias=False)

    def add_adapter(self, config: Any, adapter_name: str) -> None:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner["proj"](x)
        outer: Tensor = self.proj(inner)
        return outer


def test_a_layer_whose_name_ends_like_a_member_s_is_not_changed() -> None:
    network = Nested().requires_grad_(False)
    weight, inner = network.proj.weight.clone(), network.inner["proj"].weight.clone()
    b, a = torch.randn(3, 2), torch.randn(2, 3)
    attach(network, {"proj": Factors(a, b, None)}, "x")
    x = torch.randn(4, 3)
    torch.testing.assert_close(network(x), x @ inner.T @ (weight + b @ a).T, rtol=1e-5, atol=1e-5)


def test_a_dora_is_refused() -> None:
    dora = {"x": Factors(torch.ones(1, 2), torch.ones(2, 1), torch.ones(2))}
    for make in (interpolated, factors_blended):
        with pytest.raises(UserError, match="a DoRA is among them"):
            make([dora], [1.0])


# ---- several adapters in one chain


def denoised(model: ModelFamily, loras: Sequence[Layers], mix: Mix, rows: Sequence[int] = (0, 1, 2)) -> Tensor:
    """One step of three images, or of some of them, whose noise is always the same."""
    for name, layers in zip(mix.adapters, loras, strict=True):
        if name != BASE:
            attach(model.network, layers, name)
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 16, 32, generator=generator)
    x, text = x[list(rows)], text[list(rows)]
    network: Any = model.network
    run = mixed_denoiser(
        lambda x, t: network(x, t, encoder_hidden_states=text).sample, model.network, mix, image_keys(x)
    )
    with torch.no_grad():
        output = run(x, torch.tensor(500))
    remove_lora(model.network)
    return output


@pytest.mark.slow
def test_predictions_are_added_up_and_the_base_model_may_be_one(model: ModelFamily, loras: list[Layers]) -> None:
    singles = [denoised(model, [layers], Mix((name,), (1.0,))) for name, layers in (("a", loras[0]), ("b", loras[2]))]
    base = denoised(model, [{}], Mix((BASE,), (1.0,)))
    torch.testing.assert_close(base[:2], predicted(model, 3)[:2], rtol=0, atol=1e-5)
    found = denoised(model, [loras[0], {}, loras[2]], Mix(("a", BASE, "b"), (0.5, 0.75, -0.25)))
    expected = 0.5 * singles[0] + 0.75 * base - 0.25 * singles[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_drawn_step_is_one_adapter_s_whatever_batch_an_image_is_in(model: ModelFamily, loras: list[Layers]) -> None:
    members, mix = [loras[0], loras[2]], Mix(("a", "b"), (0.5, 0.5), is_drawn=True)
    singles = [denoised(model, [layers], Mix((name,), (1.0,))) for name, layers in zip("ab", members, strict=True)]
    whole = denoised(model, members, mix)
    for row in range(3):
        near = [float((whole[row] - single[row]).abs().max()) for single in singles]
        assert min(near) < 1e-5 < 1e-2 < max(near)
        alone = denoised(model, members, mix, rows=[row])
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-5)
    end = denoised(model, members, Mix(("a", "b"), (0.0, 1.0), is_drawn=True))
    torch.testing.assert_close(end, singles[1], rtol=0, atol=1e-5)


def test_adapters_are_drawn_as_often_as_their_weights_say_and_each_step_anew() -> None:
    keys = image_keys(torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert len(set(keys)) == 4000
    mix = Mix(("a", "b", "c"), (0.2, 0.0, 0.8), is_drawn=True)
    one, other = mix.weights_BM(keys, torch.tensor(500)), mix.weights_BM(keys, torch.tensor(400))
    assert one.sum(dim=1).eq(1).all()
    for drawn in (one, other):
        assert float(drawn[:, 1].sum()) == 0
        assert float(drawn[:, 0].mean()) == pytest.approx(0.2, abs=0.025)  # four standard errors
    both = float((one[:, 0] * other[:, 0]).mean())
    assert both == pytest.approx(0.04, abs=0.0125)  # independent
    torch.testing.assert_close(mix.weights_BM(keys, torch.tensor(500)), one)


@pytest.mark.parametrize("weights", [(0.5, 0.6), (-0.5, 1.5)])
def test_weights_that_are_no_probabilities_are_not_drawn_by(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and sum to 1"):
        Mix(("a", "b"), weights, is_drawn=True)
    Mix(("a", "b"), weights)
