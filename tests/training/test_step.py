"""The optimiser's step on gradients that are written by hand, and the moving average against its formula."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from rltune.errors import NonFiniteError
from rltune.training.step import MovingAverage, Updater


class Peers:
    """``count`` workers that all have this one's gradient."""

    def __init__(self, count: int = 1) -> None:
        self._count = count

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad *= self._count

    def gather(self, items: list[Any]) -> list[Any]:
        return items * self._count


def make_parameters(*gradients: list[float] | None) -> list[nn.Parameter]:
    """Parameters of value 1 with these gradients."""
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        parameters.append(parameter)
    return parameters


def values_of(parameters: Sequence[nn.Parameter]) -> list[list[float]]:
    return [parameter.tolist() for parameter in parameters]


def test_an_update_follows_the_gradient_of_all_workers_and_clears_it() -> None:
    parameters = make_parameters([0.25, 0.0], [0.0, -0.5])
    update = Updater(parameters, torch.optim.SGD(parameters, lr=1.0), Peers(2), max_grad_norm=10.0)
    update()
    assert values_of(parameters) == [[0.5, 1.0], [1.0, 2.0]]
    assert update.norms == [pytest.approx(1.25**0.5)]  # of (0.5, 0, 0, -1)
    assert all(parameter.grad is None for parameter in parameters)


def test_a_long_gradient_is_scaled_down_as_a_whole_and_its_length_kept() -> None:
    parameters = make_parameters([3.0, 0.0], [0.0, 4.0])
    update = Updater(parameters, torch.optim.SGD(parameters, lr=1.0), Peers(2), max_grad_norm=0.5)
    update()
    assert update.norms == [10.0]
    # 1e-6 is added to the norm that is divided by
    assert values_of(parameters) == [pytest.approx([0.7, 1.0], rel=1e-6), pytest.approx([1.0, 0.6], rel=1e-6)]
    for parameter in parameters:
        parameter.grad = torch.full((2,), 0.1)
    update()
    assert update.norms[1] == pytest.approx(0.4)  # four elements of 2 * 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("may_vanish", [False, True])
def test_a_gradient_that_is_not_finite_raises_and_updates_nothing(bad: float, may_vanish: bool) -> None:
    parameters = make_parameters([bad, 1.0], [1.0, 1.0])
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    update = Updater(parameters, optimizer, Peers(), max_grad_norm=1.0, may_vanish=may_vanish)
    with pytest.raises(NonFiniteError, match=f"the gradient of the mixed reward is {abs(bad)}; lower optim.lr"):
        update(may_vanish=may_vanish)
    assert values_of(parameters) == [[1.0, 1.0], [1.0, 1.0]]
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in parameters)


def test_a_gradient_of_exactly_zero_raises_without_leave() -> None:
    parameters = make_parameters([0.0, 0.0], None)
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    update = Updater(parameters, optimizer, Peers(), max_grad_norm=1.0)
    with pytest.raises(NonFiniteError, match="exactly zero: the reward does not depend on the images; lower"):
        update()
    assert values_of(parameters) == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(("always", "now"), [(True, False), (False, True)])
def test_a_gradient_that_may_vanish_changes_neither_parameters_nor_the_optimisers_state(
    always: bool, now: bool
) -> None:
    parameters = make_parameters([0.5, -0.5], [0.1, 0.2])
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    update = Updater(parameters, optimizer, Peers(), max_grad_norm=1.0, may_vanish=always)
    update(may_vanish=now)
    values, state = values_of(parameters), copy.deepcopy(optimizer.state_dict())
    assert values != [[1.0, 1.0], [1.0, 1.0]]
    for parameter in parameters:
        parameter.grad = torch.zeros(2)
    update(may_vanish=now)
    # momentum and weight decay would have moved on, and the count of steps with them
    assert values_of(parameters) == values
    assert repr(optimizer.state_dict()) == repr(state)
    assert update.norms[1] == 0
    assert all(parameter.grad is None for parameter in parameters)


def test_leave_for_one_update_is_not_leave_for_the_next() -> None:
    parameters = make_parameters([0.0, 0.0])
    update = Updater(parameters, torch.optim.SGD(parameters, lr=1.0), Peers(), max_grad_norm=1.0)
    update(may_vanish=True)
    with pytest.raises(NonFiniteError, match="exactly zero"):
        update()


# ---- moving average

VALUES = (1.0, 3.0, -2.0, 0.5)


def averaged(decay: float, values: Sequence[float]) -> float:
    """The values with weights decay^(n - i)."""
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def follow(parameter: nn.Parameter, average: MovingAverage, values: Sequence[float]) -> None:
    for value in values:
        parameter.data.fill_(value)
        average.update()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_average_weighs_every_round_by_its_age_alone(decay: float, count: int) -> None:
    parameter = nn.Parameter(torch.full((3,), 7.0))  # what it starts from does not count
    average = MovingAverage([parameter], decay)
    follow(parameter, average, VALUES[:count])
    with average:
        # a handful of float32 operations
        assert parameter.tolist() == pytest.approx([averaged(decay, VALUES[:count])] * 3, rel=1e-6)
    assert parameter.tolist() == [VALUES[count - 1]] * 3


def test_parameters_get_their_own_values_back_bit_for_bit_even_after_an_error() -> None:
    parameter = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    average = MovingAverage([parameter], 0.9)
    average.update()
    parameter.data.mul_(1.1)
    own = parameter.detach().clone()
    with average:
        assert not torch.equal(parameter, own)
    assert torch.equal(parameter, own)

    def fail() -> None:
        with average:
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(parameter, own)


def test_an_average_of_nothing_is_the_parameters_themselves() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with MovingAverage([parameter], 0.9):
        assert parameter.tolist() == [1.0, 1.0]


def test_an_average_goes_on_from_its_saved_state() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    whole, half = MovingAverage([first], 0.5), MovingAverage([second], 0.5)
    follow(first, whole, VALUES[:2])
    half.load_state_dict(copy.deepcopy(whole.state_dict()))
    follow(first, whole, VALUES[2:])
    follow(second, half, VALUES[2:])
    with whole, half:
        assert torch.equal(first, second)
        assert second.tolist() == pytest.approx([averaged(0.5, VALUES)] * 2)
