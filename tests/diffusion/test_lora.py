import copy
import re
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from rltune.diffusion.lora import (
    MergedLora,
    adapters_off,
    add_lora,
    fold_scale,
    load_lora_state,
    lora_parameters,
    lora_state,
    unfit_targets,
    weight_decay_groups,
)
from tests.tiny import tiny_unet

INPUTS = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(3))
TEXT = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))


def output(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(*INPUTS, encoder_hidden_states=TEXT).sample


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny_unet().requires_grad_(False)


def randomise(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_parameters(network):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def test_a_fresh_adapter_changes_nothing_and_alone_requires_gradient(network: torch.nn.Module) -> None:
    before = output(network)
    add_lora(network, rank=3, alpha=3, targets="attention", seed=0)
    assert torch.equal(output(network), before)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    shapes = {tuple(parameter.shape) for parameter in lora_parameters(network)}
    assert {min(shape) for shape in shapes} == {3}


@pytest.mark.slow
def test_initial_values_follow_the_seed_and_leave_the_global_state_alone(network: torch.nn.Module) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(42)
        other = copy.deepcopy(network)
        add_lora(other, rank=4, alpha=4, targets="attention", seed=seed)
        states.append(lora_state(other))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(42)))
    name = next(name for name in states[0] if ".lora_A." in name)
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_targets_all_reaches_convolutions_and_feed_forward(network: torch.nn.Module) -> None:
    add_lora(network, rank=2, alpha=2, targets="all", seed=0)
    names = " ".join(lora_state(network))
    assert "conv1" in names
    assert "ff.net" in names
    assert "to_q" in names


@pytest.mark.slow
def test_folding_the_scale_equals_training_with_it(network: torch.nn.Module) -> None:
    plain = copy.deepcopy(network)
    add_lora(network, rank=4, alpha=10, targets="attention", seed=0)
    randomise(network)
    add_lora(plain, rank=4, alpha=4, targets="attention", seed=0)
    load_lora_state(plain, fold_scale(lora_state(network), scale=10 / 4))
    assert (output(network) - output(copy_without(network))).abs().max() > 1e-2
    torch.testing.assert_close(output(plain), output(network), rtol=1e-5, atol=1e-6)


def copy_without(network: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(network)
    for parameter in lora_parameters(other):
        parameter.data = torch.zeros_like(parameter)
    return other


@pytest.mark.slow
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_dora_and_rslora_are_what_their_papers_say(network: torch.nn.Module, targets: str, use_rslora: bool) -> None:
    """W' = m (W + s B A) / |W + s B A|, row by row, written into a network that has no adapters."""
    plain = copy.deepcopy(network)
    add_lora(network, rank=4, alpha=3, targets=targets, seed=0, use_rslora=use_rslora, use_dora=True)
    assert torch.equal(output(network), output(plain))
    randomise(network)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(output(network), output(plain), rtol=0.1, atol=0.1)
    scale = 3 / 2 if use_rslora else 3 / 4
    state = lora_state(network)
    for name in {name.partition(".lora_")[0] for name in state}:
        weight = plain.get_submodule(name).weight
        a, b = (state[f"{name}.lora_{part}.weight"].flatten(1) for part in "AB")
        changed = weight.data.flatten(1) + scale * b @ a
        magnitude = state[f"{name}.lora_magnitude_vector"].view(-1, 1)
        weight.data = (magnitude * changed / changed.square().sum(1, keepdim=True).sqrt()).reshape(weight.shape)
    torch.testing.assert_close(output(network), output(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_decay_leaves_dora_s_magnitudes_alone(network: torch.nn.Module) -> None:
    add_lora(network, rank=2, alpha=2, targets="attention", seed=0)
    (group,) = weight_decay_groups(network, 0.1)
    assert group["weight_decay"] == 0.1
    assert all(one is other for one, other in zip(group["params"], lora_parameters(network), strict=True))
    other = tiny_unet().requires_grad_(False)
    add_lora(other, rank=2, alpha=2, targets="attention", seed=0, use_dora=True)
    before = lora_state(other)
    optimizer = torch.optim.AdamW(weight_decay_groups(other, 0.1), lr=0.1)
    for parameter in lora_parameters(other):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in lora_state(other).items():
        expected = before[name] if "magnitude" in name else before[name] * (1 - 0.1 * 0.1)
        torch.testing.assert_close(value, expected)


@pytest.mark.slow
def test_a_dora_of_a_base_model_in_half_precision_starts_as_that_base_model(network: torch.nn.Module) -> None:
    """Norms that were rounded as the weights are would change it by one part in 256."""
    network.bfloat16()
    weights = {name: weight.float() for name, weight in network.state_dict().items() if weight.ndim > 1}
    exact = {name: weight.flatten(1).norm(dim=1) for name, weight in weights.items()}
    add_lora(network, rank=2, alpha=2, targets="all", seed=0, use_dora=True)
    for name, value in lora_state(network).items():
        layer, _, part = name.partition(".lora_")
        if part == "magnitude_vector":
            torch.testing.assert_close(value.flatten(), exact[f"{layer}.weight"])


def test_a_state_of_another_adapter_is_refused(network: torch.nn.Module) -> None:
    add_lora(network, rank=2, alpha=2, targets="attention", seed=0)
    state = lora_state(network)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="adapter keys differ"):
        load_lora_state(network, state)


def lora_layers(network: torch.nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, LoraLayer)]


@pytest.mark.slow
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_off_is_the_base_model_to_the_bit(network: torch.nn.Module, use_dora: bool) -> None:
    base = output(network)
    add_lora(network, rank=3, alpha=7, targets="all", seed=0, use_dora=use_dora)
    randomise(network)
    tuned = output(network)
    assert not torch.allclose(tuned, base)
    with adapters_off(network):
        assert torch.equal(output(network), base)
        with adapters_off(network):
            assert torch.equal(output(network), base)
        assert torch.equal(output(network), base)
    assert torch.equal(output(network), tuned)
    with pytest.raises(KeyError), adapters_off(network):
        raise KeyError
    assert torch.equal(output(network), tuned)


def test_adapters_that_were_off_inside_train_as_before(network: torch.nn.Module) -> None:
    add_lora(network, rank=2, alpha=2, targets="attention", seed=0)
    randomise(network)
    trainable = [parameter.requires_grad for parameter in network.parameters()]
    with adapters_off(network):
        output(network)
    assert [parameter.requires_grad for parameter in network.parameters()] == trainable
    network(*INPUTS, encoder_hidden_states=TEXT).sample.sum().backward()
    assert all(
        parameter.grad is not None and float(parameter.grad.norm()) > 0 for parameter in lora_parameters(network)
    )


def test_a_network_without_adapters_may_have_them_off(network: torch.nn.Module) -> None:
    with adapters_off(network):
        assert output(network).shape == (1, 4, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize(("rank", "alpha", "targets"), [(1, 1.0, "attention"), (3, 7.0, "all")])
def test_merged_weights_give_the_adapters_output(
    network: torch.nn.Module, rank: int, alpha: float, targets: str, dtype: torch.dtype, options: dict[str, bool]
) -> None:
    """In float64 to its rounding, so that it is the same function; in float32 to that."""
    add_lora(network, rank=rank, alpha=alpha, targets=targets, seed=0, **options)
    randomise(network)
    network.to(dtype)
    x, t = INPUTS[0].to(dtype), INPUTS[1]

    def out() -> torch.Tensor:
        with torch.no_grad():
            return network(x, t, encoder_hidden_states=TEXT.to(dtype)).sample

    expected = out()
    with adapters_off(network):
        base = out()
    folded = MergedLora(network)
    assert len(folded._layers) == len(lora_layers(network))  # none is left to peft
    with folded.swapped_in():
        merged = out()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(merged, expected, rtol=tolerance, atol=tolerance)
    assert float((expected - base).abs().max()) > 1e-2


@pytest.mark.slow
def test_merging_leaves_the_weights_as_they_were(network: torch.nn.Module) -> None:
    """The same storage with the same bits, whether the block ends well or not; adapters train on."""
    add_lora(network, rank=3, alpha=7, targets="all", seed=0)
    randomise(network)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in network.named_parameters()}
    expected = output(network)
    merged = MergedLora(network)
    assert any(isinstance(layer.get_base_layer(), torch.nn.Conv2d) for layer in lora_layers(network))
    with merged.swapped_in():
        for layer in lora_layers(network):
            assert not torch.equal(layer.get_base_layer().weight, before[name_of(network, layer)][1])
        output(network)
    with pytest.raises(KeyError), merged.swapped_in():
        raise KeyError
    for name, parameter in network.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)
    assert torch.equal(output(network), expected)
    network(*INPUTS, encoder_hidden_states=TEXT).sample.sum().backward()
    assert all(
        parameter.grad is not None and float(parameter.grad.norm()) > 0 for parameter in lora_parameters(network)
    )


def name_of(network: torch.nn.Module, layer: Any) -> str:
    weight = layer.get_base_layer().weight
    return next(name for name, parameter in network.named_parameters() if parameter is weight)


def test_merged_weights_are_those_of_the_moment(network: torch.nn.Module) -> None:
    add_lora(network, rank=2, alpha=2, targets="attention", seed=0)
    randomise(network)
    before, merged = output(network), MergedLora(network)
    with torch.no_grad():
        for parameter in lora_parameters(network):
            parameter.mul_(2)
    with merged.swapped_in():
        torch.testing.assert_close(output(network), before, rtol=1e-4, atol=1e-4)
    after = output(network)
    assert not torch.allclose(after, before, atol=1e-2)
    with MergedLora(network).swapped_in():
        torch.testing.assert_close(output(network), after, rtol=1e-4, atol=1e-4)


def test_running_merged_between_forward_and_backward_changes_no_gradient(network: torch.nn.Module) -> None:
    """A step without gradient after one that has it: autograd holds the network's own weights."""
    add_lora(network, rank=2, alpha=2, targets="all", seed=0)
    randomise(network)
    gradients = []
    for is_merged in (False, True):
        x = INPUTS[0].clone().requires_grad_()
        loss = network(x, INPUTS[1], encoder_hidden_states=TEXT).sample.square().sum()
        if is_merged:
            with MergedLora(network).swapped_in():
                output(network)
        gradients.append(torch.autograd.grad(loss, [x, *lora_parameters(network)]))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("targets", "faults"),
    [
        ("attention", []),
        (["to_q", "attn1.to_out.0", "mid_block.attentions.0.proj_in", "conv_in"], []),
        (["to_q", "to_qq", "o_q"], [r"no layer is called so, got 'to_qq'; did you mean 'to_q'\?", r"got 'o_q'"]),
        (["attn1", "norm1"], ["an adapter cannot go to a Attention, got 'attn1'", "LayerNorm|GroupNorm, got 'norm1'"]),
    ],
)
def test_a_target_that_no_adapter_can_go_to_is_named(
    network: torch.nn.Module, targets: str | list[str], faults: list[str]
) -> None:
    found = unfit_targets(network, targets)
    assert len(found) == len(faults)
    assert all(re.search(expected, fault) for expected, fault in zip(faults, found, strict=True)), found
    if faults:
        with pytest.raises(ValueError, match=faults[0]):
            add_lora(network, rank=2, alpha=2, targets=targets, seed=0)
        assert not lora_parameters(network)
