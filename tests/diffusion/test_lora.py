import copy

import pytest
import torch

from rltune.diffusion.lora import add_lora, fold_scale, load_lora_state, lora_parameters, lora_state
from tests.conftest import tiny_unet

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


def test_a_state_of_another_adapter_is_refused(network: torch.nn.Module) -> None:
    add_lora(network, rank=2, alpha=2, targets="attention", seed=0)
    state = lora_state(network)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="adapter keys differ"):
        load_lora_state(network, state)
