"""What every kind of adapter must do, whatever it changes; a new one joins by its name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.config.model_section import LoraConfig, PromptConfig
from rltune.diffusion.chain import NO_GRADIENT, GradientPlan
from rltune.diffusion.conditioning import attach_mix
from rltune.errors import UserError
from rltune.export.base import Adapter
from rltune.training.adapters.base import ADAPTERS, MixValues, adapter_of
from rltune.training.setup import Run, build_run
from tests.training.runs import Make

PROMPTS = ("a cat", "two red birds")
PRECISIONS = ["fp32", pytest.param("bf16", marks=pytest.mark.long)]
AT_ZERO = ("conditioning", "prompt")
"""Kinds that are no LoRA, and whose first values are the same for every seed."""
SPELLED = {"template": "{prompt}, {where}", "words": {"where": "on a blue branch, in warm light, striped"}}
"""Words of the kind that trains nothing."""
every_kind = pytest.mark.parametrize("kind", ADAPTERS.names())
both_precisions = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture
def begin(make_config: Make) -> Callable[..., Run]:
    """Return a run with an adapter of a kind attached, as it starts."""

    def build(kind: str, precision: str = "fp32", *, seed: int = 3, **sections: Any) -> Run:
        config = make_config(resources={"precision": precision}, **sections)
        update: dict[str, Any] = {"adapter": config.model.adapter.model_copy(update={"kind": kind})}
        update |= {"lora": LoraConfig()} if kind in AT_ZERO else {}
        model = config.model.model_copy(update=update)
        run = build_run(config.model_copy(update={"model": model}))
        run.adapter.start(run.model, seed=seed)
        return run

    return build


def trained(run: Run) -> Run:
    """Give the adapter values none of which is zero; a number that mixes prompts does little to this model.

    Where it has none, it gets words.
    """
    if run.config.model.adapter.kind == "prompt":
        words = run.config.model.model_copy(update={"prompt": PromptConfig.model_validate(SPELLED)})
        spelled = build_run(run.config.model_copy(update={"model": words}))
        spelled.adapter.start(spelled.model, seed=3)
        return spelled
    generator = torch.Generator().manual_seed(5)
    scale = 2.0 if run.config.model.adapter.kind == "conditioning" else 0.2
    for parameter in run.adapter.parameters(run.model.network):
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return run


def drawn(run: Run, plan: GradientPlan = NO_GRADIENT) -> Tensor:
    x_BCHW = torch.randn(len(PROMPTS), *run.latent_shape, generator=torch.Generator().manual_seed(1))
    return run.sampler.latents(PROMPTS, x_BCHW, plan=plan, noise=None)


def assert_near(found: Tensor, expected: Tensor, precision: str) -> None:
    # merged weights add in another order than a layer and its adapter; bfloat16 keeps 8 bits of each sum
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 if precision == "fp32" else 0.2)


@pytest.mark.slow
@every_kind
@both_precisions
def test_it_changes_nothing_at_first_and_depends_on_its_seed_alone(
    begin: Callable[..., Run], kind: str, precision: str
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run = begin(kind, precision)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = begin(kind, precision), begin(kind, precision, seed=4)
    states = [one.adapter.state(one.model.network) for one in (run, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    is_drawn = any(not torch.equal(value, states[2][name]) for name, value in states[0].items())
    assert is_drawn == (kind not in AT_ZERO)
    parameters = run.adapter.parameters(run.model.network)
    assert {parameter.dtype for parameter in parameters} <= {torch.float32}
    grouped = [one for group in run.adapter.groups(run.model.network, 0.1) for one in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, parameters))
    num_steps = run.sampler.num_steps
    with run.sampler.switches.off(run.model.network):
        base = drawn(run, GradientPlan.last(num_steps, num_steps)).detach()
    assert_near(drawn(run), base, precision)


@pytest.mark.slow
@every_kind
@both_precisions
def test_off_is_the_base_model_and_the_prefix_is_the_same_function(
    begin: Callable[..., Run], kind: str, precision: str
) -> None:
    run = begin(kind, precision)
    num_steps = run.sampler.num_steps
    plan = GradientPlan.last(num_steps, num_steps)  # the network as it is trained, no prefix
    with run.sampler.switches.off(run.model.network):
        base = drawn(run, plan).detach()
    run = trained(run)
    with run.sampler.switches.off(run.model.network):
        assert torch.equal(drawn(run, plan), base)
    whole = drawn(run, plan).detach()
    assert float((whole - base).abs().max()) > 0.05
    assert_near(drawn(run), whole, precision)


@pytest.mark.slow
@every_kind
def test_every_parameter_gets_gradient(begin: Callable[..., Run], kind: str) -> None:
    run = trained(begin(kind))
    latents = drawn(run, GradientPlan.last(2, run.sampler.num_steps))
    parameters = run.adapter.parameters(run.model.network)
    if not parameters:  # of words there are none
        assert not latents.requires_grad
        return
    latents.square().sum().backward()
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient is not None and float(gradient.norm()) > 0 for gradient in gradients)


@pytest.mark.slow
@every_kind
@both_precisions
def test_its_state_comes_back_bit_for_bit_and_anothers_is_refused(
    begin: Callable[..., Run], kind: str, precision: str
) -> None:
    run = trained(begin(kind, precision))
    state = run.adapter.state(run.model.network)
    other = begin(kind, precision, seed=4)
    other.adapter.load_state(other.model.network, state)
    assert all(torch.equal(value, state[name]) for name, value in other.adapter.state(other.model.network).items())
    with pytest.raises(ValueError, match="keys differ"):
        other.adapter.load_state(other.model.network, {"odd": torch.zeros(1)})


@pytest.mark.slow
@every_kind
@both_precisions
def test_what_is_exported_is_what_is_restored(
    begin: Callable[..., Run], make_config: Make, kind: str, precision: str
) -> None:
    run = trained(begin(kind, precision))
    state = run.adapter.state(run.model.network)
    fresh = build_run(run.config)
    fresh.adapter.restore(fresh.model, state)
    restored = drawn(fresh)
    exported = run.adapter.exported(run.model, state)
    if isinstance(exported, MixValues):  # no LoRA
        plain = build_run(make_config(resources={"precision": precision}))
        attach_mix(plain.model, exported.mix())
        assert torch.equal(drawn(plain), restored)
        return
    values = Adapter.of(exported, about={})
    plain = begin("lora", precision, model={"lora": {"rank": values.rank}})
    plain.adapter.load_state(plain.model.network, values.folded())
    assert_near(drawn(plain), restored, precision)


def test_an_unknown_kind_is_refused(make_config: Make) -> None:
    config = make_config(model={"base": "builtin", "adapter": {"kind": "lorra"}})
    with pytest.raises(UserError, match=r"model\.adapter\.kind: adapter 'lorra' is unknown; did you mean 'lora'"):
        adapter_of(config)
