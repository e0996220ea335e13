from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.sampler import Sampler
from rltune.estimators.base import Estimator
from rltune.estimators.dag import DAG
from rltune.estimators.ddpo import DDPO
from rltune.estimators.dpok import DPOK
from rltune.estimators.policy import PromptStatistics, clipped_surrogate, draw_steps, gathered, roll_out, split
from rltune.rewards.mixture import MixtureScore
from tests.toys import (
    PROMPTS,
    ByHand,
    ToyMixture,
    fill,
    flat_gradient,
    gradients_of,
    make_round,
    make_state,
    perceptron_toy,
)


def test_rollouts_hold_the_trajectories_of_diffusers_own_sampler() -> None:
    toy = perceptron_toy()
    round = make_round(toy, DDPO(), guidance=2.0, num_images=5, micro_batch=2)
    rollouts, known = roll_out(round), ByHand(toy, num_images=5, guidance=2.0)
    assert [rollout.first_image for rollout in rollouts] == [0, 2, 4]
    for k in range(5):
        states = torch.cat([rollout.states[k] for rollout in rollouts])
        torch.testing.assert_close(states, known.states[k], rtol=1e-11, atol=1e-11)
    for k in range(4):
        outputs = torch.cat([rollout.outputs[k] for rollout in rollouts])
        torch.testing.assert_close(outputs, known.outputs[k], rtol=1e-11, atol=1e-11)
        log_prob_B = torch.cat([rollout.log_prob_B(k, rollout.outputs[k]) for rollout in rollouts])
        torch.testing.assert_close(log_prob_B, known.log_prob(k), rtol=1e-11, atol=1e-11)
    rewards = torch.cat([rollout.reward_B for rollout in rollouts])
    torch.testing.assert_close(rewards, known.reward(known.states[-1]), rtol=1e-11, atol=0)
    assert not any(tensor.requires_grad for rollout in rollouts for tensor in (*rollout.states, *rollout.outputs))
    assert float(round.tally.totals[0]) == pytest.approx(float(rewards.sum()))


def test_states_begin_where_the_base_model_s_steps_end() -> None:
    toy = perceptron_toy()
    (rollout,) = roll_out(make_round(toy, DDPO(), num_steps=6, num_base_steps=2))
    whole = make_round(toy, DDPO(), num_steps=6).sampler.table
    assert len(rollout.states) == 5
    assert rollout.chain.table.timesteps_T.tolist() == whole.timesteps_T[2:].tolist()
    log_prob_B = rollout.log_prob_B(1, rollout.outputs[1])
    expected_B = whole.log_prob(3, rollout.states[1], rollout.outputs[1], rollout.states[2])
    torch.testing.assert_close(log_prob_B, expected_B, rtol=0, atol=0)


@pytest.mark.parametrize(("is_one", "steps"), [(False, (0, 1, 2, 3)), (True, (0, 1, 2))])
def test_a_last_step_without_noise_is_no_action(is_one: bool, steps: tuple[int, ...]) -> None:
    round = make_round(perceptron_toy(), DDPO(), schedule={"set_alpha_to_one": is_one})
    (rollout,) = roll_out(round)
    assert rollout.stochastic_steps == steps


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 1), (0.2, 2), (0.3, 3), (0.31, 4), (1.0, 10)])
def test_a_share_of_the_steps_is_drawn_uniformly(fraction: float, count: int) -> None:
    round = make_round(perceptron_toy(), DDPO(), num_steps=10, num_images=1)
    rollouts = roll_out(round)
    drawn = [draw_steps(round, rollouts, fraction) for _ in range(1000)]
    assert all(len(steps) == len(set(steps)) == count and list(steps) == sorted(steps) for steps in drawn)
    hits = np.bincount(np.concatenate(drawn), minlength=10)
    assert len(hits) == 10
    # steps of one draw exclude one another, which only lowers the statistic
    assert count == 10 or stats.chisquare(hits).pvalue > 1e-4


def test_surrogate_is_ppo_s() -> None:
    """No gain beyond 1 + clip for a good action, none below 1 - clip for a bad one; losses are never cut."""
    advantage_B = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    ratio_B = torch.tensor([0.5, 1.05, 1.5, 0.5, 1.05, 1.5], requires_grad=True)
    loss_B = clipped_surrogate(advantage_B, ratio_B, 0.1)
    torch.testing.assert_close(loss_B, torch.tensor([-1.0, -2.1, -2.2, 1.8, 2.1, 3.0]))
    loss_B.sum().backward()
    assert ratio_B.grad is not None
    assert ratio_B.grad.tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]


def test_advantages_compare_a_prompt_with_itself_once_it_is_known() -> None:
    statistics = PromptStatistics(size=4, min_count=3)
    # a: 2 rewards, b: 1: both are compared with the round, mean 2, variance 14 / 3 - 4 = 2 / 3
    first = statistics.advantages(["a", "a", "b"], [1.0, 2.0, 3.0])
    unit = (2 / 3) ** 0.5 + 1e-6
    assert first == pytest.approx([-1 / unit, 0, 1 / unit], rel=1e-12)
    # a: 1, 2, 5, 8, mean 4, variance 94 / 4 - 16 = 7.5; b: 3, 0 is with the round 5, 0, 8, variance 89 / 3 - (13 / 3)^2
    second = statistics.advantages(["a", "b", "a"], [5.0, 0.0, 8.0])
    own, whole = 7.5**0.5 + 1e-6, (89 / 3 - (13 / 3) ** 2) ** 0.5 + 1e-6
    assert second == pytest.approx([1 / own, -13 / 3 / whole, 4 / own], rel=1e-12)
    # only the last 4 are kept: a: 5, 8, 3, 4, mean 5, variance 114 / 4 - 25 = 3.5
    third = statistics.advantages(["a", "a"], [3.0, 4.0])
    assert third == pytest.approx([-2 / (3.5**0.5 + 1e-6), -1 / (3.5**0.5 + 1e-6)], rel=1e-12)


def test_a_prompt_is_known_from_its_min_count_th_reward_on() -> None:
    """a: 1, 3, mean 2, deviation 1; b with the round, mean 4, variance 74 / 3 - 16 = 26 / 3."""
    advantages = PromptStatistics(size=4, min_count=2).advantages(["a", "a", "b"], [1.0, 3.0, 8.0])
    assert advantages == pytest.approx([-1 / (1 + 1e-6), 1 / (1 + 1e-6), 4 / ((26 / 3) ** 0.5 + 1e-6)], rel=1e-12)


def test_equal_rewards_are_no_advantage() -> None:
    assert PromptStatistics(4, 2).advantages(["a", "a", "b"], [0.3, 0.3, 0.3]) == [0, 0, 0]


def test_statistics_go_on_from_a_checkpoint() -> None:
    kept, resumed = PromptStatistics(3, 2), PromptStatistics(3, 2)
    kept.advantages(["a", "a", "b"], [1.0, 2.0, 3.0])
    state = kept.state_dict()
    resumed.load_state_dict(state)
    kept.advantages(["a"], [9.0])
    assert state == {"a": [1.0, 2.0], "b": [3.0]}  # a copy
    assert resumed.state_dict() == state
    again = PromptStatistics(3, 2)
    again.load_state_dict(kept.state_dict())
    assert again.advantages(["a", "b"], [4.0, 5.0]) == kept.advantages(["a", "b"], [4.0, 5.0])


def test_values_of_the_round_come_back_to_their_images() -> None:
    toy = perceptron_toy()
    round = make_round(toy, DDPO(), num_images=6, num_workers=2, rank=1, micro_batch=2)
    rollouts = roll_out(round)
    prompts, rewards = gathered(round, rollouts)
    known = ByHand(toy, num_images=6)
    assert prompts == list(known.prompts[3:])
    assert rewards == pytest.approx(known.reward(known.states[-1])[3:].tolist(), rel=1e-11)
    assert [part.tolist() for part in split(round, rollouts, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])] == [[3.0, 4.0], [5.0]]


def test_state_is_none_of_an_estimator_that_learns_nothing_else() -> None:
    assert isinstance(make_state(perceptron_toy(), DDPO(buffer=20)), PromptStatistics)


class Trusting(ToyMixture):
    """The toy reward, trusted by ``trust_B``, and its total multiplied by it as backpropagation has it."""

    def __init__(self, trust_B: Tensor | None) -> None:
        super().__init__()
        self.trust_B = trust_B

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> MixtureScore:
        score = super().__call__(images_B3HW, prompts)
        if self.trust_B is None:
            return score
        return replace(score, total_B=self.trust_B * score.total_B, plain_B=score.total_B, trust_B=self.trust_B)


POLICIES: list[Estimator] = [DDPO(), DPOK(kl_weight=0.0), DAG(output_weight=0.0)]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", POLICIES, ids=["ddpo", "dpok", "dag"])
def test_trust_weighs_an_image_s_part_of_the_gradient(estimator: Estimator) -> None:
    """As PrefPaint weighs its loss. What images are compared by is the reward without it, so that no sign turns."""

    def gradient(trust: Sequence[float] | None) -> Tensor:
        toy = perceptron_toy()
        trust_B = None if trust is None else torch.tensor(trust, dtype=torch.float64)
        round = replace(make_round(toy, estimator, eta=1.0), mixture=Trusting(trust_B))
        first = gradients_of(estimator, round)[0]
        # the reward that is reported is the one images are compared by
        assert float(round.tally.totals[0]) == float(round.tally.totals[1])
        return first

    plain = gradient(None)
    alone = [gradient([float(i == j) for j in range(4)]) for i in range(4)]
    trust = [2.21, 1.0, 1.6, 1.3]
    # value network, flow and advantages are float32
    close = {"rtol": 1e-6, "atol": 1e-6 * float(plain.norm())}
    torch.testing.assert_close(sum(alone), plain, **close)
    expected = sum(weight * part for weight, part in zip(trust, alone, strict=True))
    assert float((expected - plain).norm()) > 0.1 * float(plain.norm())
    torch.testing.assert_close(gradient(trust), expected, **close)


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "use_bf16_prefix", "is_right"),
    [
        pytest.param(torch.float32, False, True, id="float32"),
        pytest.param(torch.bfloat16, False, True, id="bfloat16", marks=pytest.mark.long),
        pytest.param(torch.float32, True, False, id="bfloat16 prefix", marks=pytest.mark.long),
    ],
)
def test_a_step_is_scored_in_the_arithmetic_that_drew_it(
    dtype: torch.dtype, use_bf16_prefix: bool, is_right: bool
) -> None:
    """On the built-in model: what a step is taken to have drawn is the noise it drew, by which its score is known.

    d log p = b / s <noise, df>. Float32 samples with merged adapters and bfloat16 without; scoring has them unmerged.
    The bfloat16 prefix is what an experiment is refused with.
    """
    model = load_model("builtin", dtype=dtype)
    add_lora(model.network, rank=4, alpha=4, targets="attention", seed=0)
    fill(model.network, 0.05)
    table = model.read_table(num_steps=4, eta=1.0, shape=model.latent_shape(*model.size_px))
    noise = torch.randn(5, 4, *model.latent_shape(*model.size_px), generator=torch.Generator().manual_seed(0))
    advantage_B = torch.tensor([1.0, -1.0, 0.5, -0.5])
    sampler = Sampler(model, PromptEmbeddings(model), table, 3.0, use_bf16_prefix=use_bf16_prefix)
    chain = sampler.open(PROMPTS, noise[4], lambda k: noise[k])
    states: list[Tensor] = []
    last_BCHW = chain.run(observe=lambda k, x, f: states.append(x))
    furthest, terms, known = 0.0, [], []
    for step, (x_BCHW, next_BCHW) in enumerate(zip(states, [*states[1:], last_BCHW], strict=True)):
        a, b, s = (float(column[step]) for column in (table.a_T, table.b_T, table.s_T))
        f_BCHW = chain.predict(step, x_BCHW)
        drawn_BCHW = (next_BCHW - a * x_BCHW - b * f_BCHW.detach()) / s
        furthest = max(furthest, float((drawn_BCHW - noise[step]).abs().max()))
        terms.append((advantage_B * table.log_prob(step, x_BCHW, f_BCHW, next_BCHW)).sum())
        known.append((advantage_B * b / s * (noise[step] * f_BCHW).flatten(1).mean(1)).sum())
    gradient, expected = (
        flat_gradient(torch.stack(parts).sum(), lora_parameters(model.network), retain_graph=True)
        for parts in (terms, known)
    )
    cosine = float(torch.cosine_similarity(gradient.double(), expected.double(), dim=0))
    if is_right:
        assert furthest < 1e-3  # rounding of float32 over s, which is 0.01 at the last step; of merging besides
        assert cosine > 0.999  # in bfloat16 the backward pass rounds to 8 bits
    else:
        assert furthest > 1
        assert cosine < 0.9
