import copy

import pytest
import torch

from rltune.estimators.base import Setting
from rltune.estimators.heads import StateHead, StateNetwork


def head(seed: int = 0) -> StateHead:
    return StateHead(Setting((4, 8, 8), 6, torch.device("cpu"), seed), lr=0.1)


def states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((5, 4, 8, 8), (5, 6)))
    return x, torch.tensor([1, 201, 401, 601, 801]), text


def test_it_says_0_of_everything_at_first() -> None:
    with torch.no_grad():
        assert torch.equal(head().network(*states()), torch.zeros(5))


def test_it_says_the_same_of_everything_at_first() -> None:
    with torch.no_grad():
        values = head().network(*states())
    assert values.shape == (5,)
    assert values.dtype == torch.float32
    assert len(set(values.tolist())) == 1


def test_it_tells_latents_timesteps_and_prompts_apart() -> None:
    network = head().network
    torch.nn.init.ones_(network.out[-1].weight)
    x, t, text = states()
    with torch.no_grad():
        value = network(x, t, text)
        for other in ((x + 1, t, text), (x, t + 50, text), (x, t, text + 1)):
            assert bool(((network(*other) - value).abs() > 1e-4).all())
        rows = torch.cat([network(x[i : i + 1], t[i : i + 1], text[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(rows, value, rtol=1e-5, atol=1e-6)
    assert network(x.double(), t, text.double()).dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2, 7])
def test_latents_may_be_of_any_size(size: int) -> None:
    network = StateNetwork(3, 4)
    assert network(torch.ones(2, 3, size, size), torch.tensor([1, 2]), torch.ones(2, 4)).shape == (2,)


def test_first_values_follow_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(9)
    first = head(1)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(9)))
    second, other = head(1), head(2)
    weights = [h.network.text.weight for h in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_it_goes_on_from_a_checkpoint() -> None:
    """Weights, Adam's moments and the count: the next update is the same to the bit."""

    def update(h: StateHead) -> None:
        (h.network(*states()) - torch.arange(5)).square().mean().backward()
        h.optimizer.step()
        h.optimizer.zero_grad()
        h.num_rounds += 1

    kept, resumed = head(), head(1)
    update(kept)
    resumed.load_state_dict(copy.deepcopy(kept.state_dict()))
    update(kept)
    update(resumed)
    assert kept.num_rounds == resumed.num_rounds == 2
    for a, b in zip(kept.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)
