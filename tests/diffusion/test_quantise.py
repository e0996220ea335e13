"""A base model in fewer bits: gradients are those of its rounded weights, and the memory is what was foreseen."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from rltune.diffusion import quantise as module
from rltune.diffusion.families.base import FAMILIES, ModelFamily
from rltune.diffusion.lora import MergedLora, add_lora, lora_parameters, remove_lora
from rltune.diffusion.quantise import Kind, is_quantised, precision_of, quantise, quantised_layers, weight_bytes
from rltune.diffusion.sampler import guided_denoiser
from rltune.errors import UserError
from tests.benchmarks.architectures import architectures
from tests.tiny_families import PIPELINES, lively
from tests.toys import fill

KINDS: tuple[Kind, ...] = get_args(Kind)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    name = module.LIBRARIES[request.param]
    pytest.importorskip(name, reason=f"{name}, of the extra quantise, is not installed")
    return request.param


def family(name: str = "sdxl") -> ModelFamily:
    torch.manual_seed(0)
    pipeline = lively(PIPELINES[name]())
    return FAMILIES.get(type(pipeline).__name__)(pipeline)


def unpacked(layer: Any) -> Tensor:
    """The numbers that a layer's weights stand for, as its library unpacks them."""
    if isinstance(layer.weight.data, Tensor) and layer.weight.dtype == torch.uint8:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.data.dequantize()


def gradients(model: ModelFamily) -> list[Tensor]:
    row = model.encode_prompts(["a red bird"])[0]
    x_BCHW = torch.randn(1, *model.latent_shape(16, 16), generator=torch.Generator().manual_seed(1)).requires_grad_()
    denoise = guided_denoiser(model, [row], row, torch.device("cpu"), guidance_scale=2.0)
    out_BCHW = denoise(x_BCHW, torch.tensor(500.0))
    return [out_BCHW.detach(), *torch.autograd.grad(out_BCHW.square().sum(), [x_BCHW, *adapt(model)])]


def adapt(model: ModelFamily) -> list[nn.Parameter]:
    return lora_parameters(model.network)


def with_adapters(model: ModelFamily) -> ModelFamily:
    add_lora(model.network, rank=2, alpha=2, targets=model.lora_layers("attention"), seed=0)
    fill(model.network, 0.1)
    return model


@pytest.mark.slow
def test_gradients_are_those_of_the_rounded_weights(kind: Kind) -> None:
    """Written into a network of plain numbers, which peft adapts alike."""
    model, plain = family(), family()
    before = {name: layer.weight for name, layer in plain.network.named_modules() if isinstance(layer, nn.Linear)}
    quantise(model.network, kind)
    rounded = 0
    for name, layer in model.network.named_modules():
        if isinstance(layer, nn.Linear) and is_quantised(layer):
            assert not layer.weight.requires_grad
            error = (unpacked(layer) - before[name]).norm() / before[name].norm()
            assert 0 < error < (0.12 if kind == "nf4" else 0.01)
            before[name].data = unpacked(layer)
            rounded += 1
    assert rounded == len(quantised_layers(plain.network, kind)) > 20
    found, expected = gradients(with_adapters(model)), gradients(with_adapters(plain))
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def test_adapters_come_on_and_off_and_are_not_merged(kind: Kind) -> None:
    model = family()
    quantise(model.network, kind)
    kept = {name: layer.weight for name, layer in model.network.named_modules() if isinstance(layer, nn.Linear)}
    with_adapters(model)
    with torch.no_grad(), MergedLora(model.network).swapped_in():
        merged = gradients_free(model)
    with torch.no_grad():
        assert torch.equal(merged, gradients_free(model))
    layer = model.network.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q  # type: ignore[union-attr,index]
    assert precision_of(layer.get_base_layer()) == torch.float32
    remove_lora(model.network)
    assert all(model.network.get_submodule(name).weight is weight for name, weight in kept.items())


def gradients_free(model: ModelFamily) -> Tensor:
    row = model.encode_prompts(["a red bird"])[0]
    x_BCHW = torch.ones(1, *model.latent_shape(16, 16))
    return guided_denoiser(model, [row], row, torch.device("cpu"), guidance_scale=2.0)(x_BCHW, torch.tensor(500.0))


def test_packed_weights_are_as_large_as_foreseen(kind: Kind) -> None:
    layers = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 512, bias=False)).requires_grad_(False)
    size, largest = weight_bytes(layers, kind)
    assert largest == 512 * 512 * 4
    quantise(layers, kind)
    bias = layers[0].bias.nbytes  # type: ignore[union-attr]
    if kind == "nf4":
        states: list[Any] = [layer.weight.quant_state for layer in layers]
        held = sum(layer.weight.nbytes for layer in layers)  # type: ignore[misc]
        held += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    else:
        held = sum(layer.weight.qdata.nbytes + layer.weight.scale.nbytes for layer in layers)  # type: ignore[union-attr]
    assert size == pytest.approx(held + bias, rel=0.01)


def test_linear_layers_of_blocks_are_taken_and_others_left() -> None:
    network = family().network
    names = {f"{type(parent).__name__}.{name}" for parent, name, _ in quantised_layers(network, "nf4")}
    assert {"Attention.to_q", "ResnetBlock2D.time_emb_proj"} <= names
    assert not any(name.startswith("TimestepEmbedding") for name in names)


def test_rows_of_broken_blocks_are_left_which_published_models_hardly_have() -> None:
    """bitsandbytes unpacks them wrongly on some CPUs; a layer that no test has is still one less."""
    layers = nn.Sequential(nn.Linear(64, 8), nn.Linear(96, 64), nn.Linear(16, 64), nn.Linear(320, 2))
    assert [layer.in_features for _, _, layer in quantised_layers(layers, "nf4")] == [64, 320]
    assert len(quantised_layers(layers, "int8")) == 4
    left = {}
    for name, architecture in architectures().items():
        network = architecture.family().network
        left[name] = len(quantised_layers(network, "int8")) - len(quantised_layers(network, "nf4"))
    assert {name: count for name, count in left.items() if count} == {"aura-flow": 1}  # where patches come in


def test_a_network_with_nothing_to_round_is_refused(kind: Kind) -> None:
    network = nn.Sequential(nn.Conv2d(64, 64, 1), *([nn.Linear(96, 64)] if kind == "nf4" else []))
    with pytest.raises(UserError, match=rf"^model\.quantise: {kind} rounds linear layers.*, and the network has none"):
        quantise(network, kind)


@pytest.mark.parametrize("name", KINDS)
def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, name: Kind) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=rf"model.quantise: {name} needs {module.LIBRARIES[name]}, .*rltune\[quantise\]"
    ):
        quantise(nn.Linear(2, 2), name)
