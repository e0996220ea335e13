"""A basis of LoRAs in training: what is drawn, what is lost by a kill or two workers, what it is in files."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.diffusion.chain import NO_GRADIENT, GradientPlan
from rltune.diffusion.quantise import LIBRARIES
from rltune.errors import UserError
from rltune.rewards.mixture import Calibration, Mixture
from rltune.rewards.scalarise import Chebyshev, WeightedSum
from rltune.training.adapters.basis import Basis
from rltune.training.setup import Run, build_run
from tests import tiny_families
from tests.tiny_families import PIPELINES, shared_out
from tests.training.runs import Make, adapters, metrics, train, train_in_processes

CPU = torch.device("cpu")
BASIS = {"adapter": {"kind": "basis"}}
RESULTS = ("train/reward", "train/brightness", "train/smoothness", "grad_norm", "queries", "calls")


def made(**basis: Any) -> Basis:
    rewards = {"brightness": {"weight": 3.0}, "smoothness": {"weight": 1.0}, "saturation": {"weight": 0.0}}
    return Basis(RunConfig.model_validate({"model": {**BASIS, "basis": basis}, "rewards": rewards}))


def test_every_image_has_weights_of_its_number_alone() -> None:
    basis = made(least_strength=0.25)
    together = basis.drawn(7, range(6), CPU)
    apart = [basis.drawn(7, [number], CPU) for number in range(6)]
    assert list(together.weights) == ["brightness", "smoothness"]
    for name, weights_B in together.weights.items():
        assert torch.equal(weights_B, torch.cat([one.weights[name] for one in apart]))
    assert torch.equal(together.strengths_BM, torch.cat([one.strengths_BM for one in apart]))
    assert not torch.equal(together.strengths_BM, basis.drawn(8, range(6), CPU).strengths_BM)


def test_weights_are_on_the_simplex_with_corners_and_centre_mixed_in() -> None:
    num = 2000
    drawn = made(corners=0.3, centre=0.2, least_strength=0.25).drawn(0, range(num), CPU)
    first_B, second_B = drawn.weights.values()
    torch.testing.assert_close(first_B + second_B, torch.ones(num))
    strength_B = drawn.strengths_BM.sum(dim=1)
    torch.testing.assert_close(drawn.strengths_BM[:, 0], first_B * strength_B)
    assert 0.25 <= float(strength_B.min()) < 0.27
    assert 0.98 < float(strength_B.max()) <= 1
    shares = [float((first_B == weight).float().mean()) for weight in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.15, 0.2, 0.15], abs=4 * np.sqrt(0.2 * 0.8 / num))  # four standard errors
    # of the others, a Beta(0.6, 0.6): its variance is 1 / (4 (2 * 0.6 + 1))
    rest = first_B[(first_B != 0) & (first_B != 0.5) & (first_B != 1)]
    assert float(rest.var()) == pytest.approx(1 / 8.8, rel=0.1)
    whole = made().drawn(0, range(50), CPU)
    torch.testing.assert_close(whole.strengths_BM.sum(dim=1), torch.ones(50))


@pytest.mark.parametrize("scalarise", [WeightedSum(), Chebyshev(ideal=2.0)])
def test_a_mixture_at_weights_of_every_image_is_one_mixture_an_image(scalarise: WeightedSum | Chebyshev) -> None:
    class Channel:
        is_differentiable, sees_group = True, False

        def __init__(self, index: int) -> None:
            self.index = index

        def __call__(self, images_B3HW: torch.Tensor, prompts: Any) -> torch.Tensor:
            return images_B3HW[:, self.index].mean(dim=(1, 2))

    def mixture(weights: dict[str, float]) -> Mixture:
        rewards: Any = {"red": Channel(0), "blue": Channel(2)}
        units = {"red": Calibration(0.2, 0.3), "blue": Calibration(0.1, 0.5)}
        return Mixture(rewards, weights, units, scalarise=scalarise)

    images, prompts = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)), list("abcd")
    red_B = torch.tensor([0.1, 0.5, 0.9, 0.6])
    together = mixture({"red": 1, "blue": 1})(images, prompts, {"red": red_B, "blue": 1 - red_B}).total_B
    for i, red in enumerate(red_B.tolist()):
        alone = mixture({"red": red, "blue": 1 - red})(images[i : i + 1], prompts[i : i + 1]).total_B
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "estimator",
    [{"name": "alignprop"}, *(pytest.param({"name": name}, marks=pytest.mark.long) for name in ("draft_lv", "drtune"))],
)
def test_a_killed_basis_goes_on_bitwise(
    make_config: Make, tmp_path: Path, base_dir: Path, precision: str, estimator: dict[str, Any]
) -> None:
    alone = {"k": None, "draw": None, **estimator}
    sections = {"resources": {"precision": precision}, "mixture": {"method": "chebyshev"}}
    config = make_config(model=BASIS, estimator=alone, **sections)
    whole = train(config, tmp_path / "whole", base_dir=base_dir)
    half = tmp_path / "half"
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000002"
    torch.manual_seed(99)
    resumed = train(config, half, base_dir=base_dir, resume_from=checkpoint)
    assert resumed.reports[-1] == whole.reports[-1]
    first, second = adapters(tmp_path / "whole", 4), adapters(half, 4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {len(tensor) for name, tensor in first.items() if ".lora_A." in name} == {4}  # two of rank 2


@pytest.mark.long
def test_two_workers_train_what_one_trains(make_config: Make, tmp_path: Path) -> None:
    config = make_config(model=BASIS, optim={"steps": 2}, evaluate={"every": 2})
    train(config, tmp_path / "alone" / "run", base_dir=tmp_path / "alone" / "base")
    train_in_processes({"run": config}, tmp_path / "two", 2)
    alone, two = (adapters(tmp_path / at / "run", 2) for at in ("alone", "two"))
    for name, tensor in alone.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)  # sums in another order, through AdamW
    for one, other in zip(metrics(tmp_path / "alone" / "run"), metrics(tmp_path / "two" / "run"), strict=True):
        assert {name: other[name] for name in RESULTS} == pytest.approx({name: one[name] for name in RESULTS}, rel=1e-4)


def begun(config: RunConfig) -> Run:
    """A run with a basis none of whose values is zero."""
    run = build_run(config)
    assert isinstance(run.adapter, Basis)
    run.adapter.start(run.model, seed=0)
    generator = torch.Generator().manual_seed(5)
    for parameter in run.adapter.parameters(run.model.network):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", shared_out(PIPELINES, PIPELINES.keys() - {"stable_diffusion", "flux", "z_image"}))
def test_in_every_family_a_batch_of_mixes_is_a_loop_over_images(name: str, make_config: Make, tmp_path: Path) -> None:
    check_mixes(name, make_config, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_so_it_is_where_the_base_is_in_fewer_bits(kind: str, make_config: Make, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[kind], reason=f"{LIBRARIES[kind]}, of the extra quantise, is not installed")
    check_mixes("sdxl", make_config, tmp_path, kind)


def check_mixes(name: str, make_config: Make, tmp_path: Path, quantise: str = "none") -> None:
    tiny_families.made(PIPELINES[name]).save_pretrained(tmp_path / "model")
    model = {**BASIS, "base": str(tmp_path / "model"), "quantise": quantise}
    run = begun(make_config(model=model, sampler={"steps": 2, "eta": 1.0, "height": 32, "width": 32, "guidance": 3.0}))
    prompts, weights_BM = ("a cat", "two red birds on a blue branch"), torch.tensor([[0.0, 1.0], [0.9, 0.1]])
    x_BCHW = torch.randn(2, *run.latent_shape, generator=torch.Generator().manual_seed(1))

    def drawn(images: slice, strengths_BM: Tensor) -> tuple[Tensor, Tensor]:
        chain = run.sampler.open(
            prompts[images], x_BCHW[images], lambda k: torch.ones_like(x_BCHW[images]), strengths_BM
        )
        latents_BCHW = chain.run(GradientPlan.last(1, 2))
        latents_BCHW.square().sum().backward()
        parameters = run.adapter.parameters(run.model.network)
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        for parameter in parameters:
            parameter.grad = None
        return latents_BCHW.detach(), gradient

    together, slope = drawn(slice(0, 2), weights_BM)
    alone = [drawn(slice(i, i + 1), weights_BM[i : i + 1]) for i in range(2)]
    near = 1e-3 * float(together.abs().max())  # of another batch sums are in another order
    torch.testing.assert_close(together, torch.cat([latents for latents, _ in alone]), rtol=0, atol=near)
    whole = alone[0][1] + alone[1][1]
    torch.testing.assert_close(slope, whole, rtol=0, atol=2e-3 * float(whole.abs().max()))
    swapped, _ = drawn(slice(0, 2), weights_BM.flip(1))
    assert float((swapped - together).abs().max()) > 20 * near


def test_an_estimator_that_does_not_backpropagate_is_refused_without_the_command_too(make_config: Make) -> None:
    estimator = {"name": "ddpo", "k": None, "draw": None}
    config = make_config(model=BASIS, estimator=estimator, sampler={"eta": 1.0})
    with pytest.raises(UserError, match=r"^model\.adapter\.kind: a basis weighs .* which ddpo does not take"):
        build_run(config)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_its_loras_at_the_strengths_of_an_image_draw_what_training_saw(make_config: Make, precision: str) -> None:
    """The whole network, with guidance: peft runs the parts beside one another, training ran them as blocks of one."""
    run = begun(make_config(model=BASIS, resources={"precision": precision}))
    prompts, weights_BM = ("a cat", "two red birds"), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    x_BCHW = torch.randn(2, *run.latent_shape, generator=torch.Generator().manual_seed(1))
    seen = run.sampler.open(prompts, x_BCHW, None, weights_BM).run(NO_GRADIENT)
    state = run.adapter.state(run.model.network)
    fresh = build_run(run.config)
    parts = run.adapter.parts(fresh.model, state)
    assert list(parts) == ["brightness", "smoothness"]
    network: Any = fresh.model.network
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of one adapter beside another
    for name, values in parts.items():
        targets = list(values.targets)
        network.add_adapter(
            LoraConfig(r=values.rank, lora_alpha=values.alpha, target_modules=targets), adapter_name=name
        )
        set_peft_model_state_dict(network, dict(values.state), adapter_name=name)
    for i, weights_M in enumerate(weights_BM.tolist()):
        network.set_adapters(list(parts), weights_M)
        alone = fresh.sampler.open(prompts[i : i + 1], x_BCHW[i : i + 1], None).run(NO_GRADIENT)
        # merged in float32; bfloat16 rounds a layer's output to 8 bits, over four steps with guidance
        near = 1e-3 if precision == "fp32" else 0.3
        torch.testing.assert_close(seen[i : i + 1], alone, rtol=0, atol=near)
