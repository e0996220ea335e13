import pytest

from rltune.estimators.draft import DRaFT, DRaFTLV
from tests.toys import line_toy, make_round, make_table

T = 6


@pytest.mark.parametrize("k", [1, 4, T])
def test_the_network_runs_with_gradient_at_the_last_k_steps(k: int) -> None:
    toy, estimator = line_toy(), DRaFT(k)
    estimator.train(make_round(toy, estimator, num_steps=T, num_images=1, num_kept=T))
    assert [call.t for call in toy.calls] == make_table(T).timesteps_T.tolist()
    assert [call.has_grad for call in toy.calls] == [False] * (T - k) + [True] * k


@pytest.mark.parametrize("num_base_steps", [0, 2])
@pytest.mark.parametrize("n", [0, 2])
def test_copies_run_the_last_step_again(n: int, num_base_steps: int) -> None:
    toy, estimator = line_toy(), DRaFTLV(n)
    round = make_round(toy, estimator, num_steps=T, num_images=1, num_kept=T, num_base_steps=num_base_steps)
    estimator.train(round)
    timesteps = make_table(T).timesteps_T.tolist()
    assert [call.t for call in toy.calls] == [*timesteps, *[timesteps[-1]] * n]
    assert [call.has_grad for call in toy.calls] == [False] * (T - 1) + [True] * (1 + n)


@pytest.mark.parametrize("k", [0, T + 1])
def test_k_beyond_the_chain_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in \[1, {T}\], got {k}"):
        DRaFT(k).check(T)


@pytest.mark.parametrize("n", [-1, 65])
def test_too_many_copies_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n must be in \[0, 64\], got {n}"):
        DRaFTLV(n).check(T)
