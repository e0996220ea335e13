"""What an estimator is: it turns a reward into gradient of the adapters, and gets one round of training to do it in.

B: images of one micro-batch. C, H, W: latent channels, rows, columns. D: width of text embeddings.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, get_args, get_origin, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from rltune.diffusion.chain import StepNoise
from rltune.diffusion.sampler import Chain, Sampler
from rltune.registry import Registry, Within, options_of
from rltune.rewards.mixture import Mixture, MixtureScore


@dataclass(frozen=True)
class Drawn:
    """What every image of a batch is trained at, where an adapter is to serve many mixes of the rewards."""

    weights: Mapping[str, Tensor]
    """Reward -> its weight in each image's loss, ``(B,)``; together 1."""
    strengths_BM: Tensor
    """Of the adapter's M parts."""


@dataclass(frozen=True)
class Batch:
    """What one worker trains on in one micro-batch."""

    prompts: tuple[str, ...]
    x_BCHW: Tensor
    """Latents x_T on the worker's device."""
    noise: StepNoise | None = None
    extra_noise: StepNoise | None = None
    """Copy number -> noise_BCHW, for estimators that add noise of their own."""
    drawn: Drawn | None = None
    """None: every image at the weights of the experiment."""


@dataclass(frozen=True)
class Regularisers:
    """What keeps a model honest, whichever estimator trains it; 0 is off."""

    drift: float = 0.0
    """Weight of the mean squared distance of the network's output from the base model's, over the trained steps."""
    flatness_weights: float = 0.0
    """rho_w of RSA-FT (arXiv:2603.21175): length of the step uphill in the loss at which the gradient is taken."""
    flatness_image: float = 0.0
    """rho of RSA-FT: L2 length, an image in [0, 1], of the step against the reward before it is scored."""
    attention: float = 0.0
    """Weight of the loss on maps of cross-attention (``diffusion/regulation.py``), the mean over the trained steps."""


class Peers(Protocol):
    """The workers of a run, seen from one of them."""

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the workers."""
        ...

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the items of every worker, in the order of ranks, on every worker."""
        ...


class Timer(Protocol):
    """Takes the time of the parts of a round."""

    def measure(self, part: str) -> AbstractContextManager[None]:
        """Add the time of the block to ``part``."""
        ...


class Update(Protocol):
    """The optimiser's step: gradients are summed over workers, clipped, applied and cleared."""

    def __call__(self, *, may_vanish: bool = False) -> None:
        """Update; ``may_vanish`` allows a gradient that is exactly zero, which changes nothing then.

        Raises:
            NonFiniteError: The gradient is not finite, or exactly zero without leave.
        """
        ...


@dataclass
class Tally:
    """What this worker's share of a round was: scores summed over images, and what it cost."""

    names: tuple[str, ...]
    totals: Tensor = field(init=False)
    num_queries: int = 0
    """Images that the reward scored."""
    num_calls: int = 0
    """Passes of one image through the guided network: forward, forward again, and backward count one each."""
    num_active: int = 0
    """Steps of a trajectory that carried gradient: K."""
    is_noting: bool = True
    """Whether scores are noted: not those of a second look at the same images."""

    def __post_init__(self) -> None:
        self.totals = torch.zeros(len(self.names), dtype=torch.float64)

    def add(self, score: MixtureScore) -> None:
        """Add the scores of one batch of the round's own images, if scores are noted."""
        if not self.is_noting:
            return
        scores = {"reward": score.total_B, **score.raw}
        scores |= {f"{name}_z": values_B for name, values_B in score.standardised.items()}
        self.totals += torch.stack([scores[name].detach().double().sum().cpu() for name in self.names])


@dataclass(frozen=True)
class Round:
    """One round of training: images to draw, a reward to raise, an optimiser to step."""

    sampler: Sampler
    mixture: Mixture
    batches: tuple[Batch, ...]
    """This worker's images."""
    num_images: int
    """Images of the round over all workers: the losses are means over them."""
    rng: np.random.Generator
    """A function of (seed, round) alone, so that every worker draws the same."""
    parameters: Sequence[nn.Parameter]
    peers: Peers
    timer: Timer
    update: Update
    tally: Tally
    regularisers: Regularisers = Regularisers()
    is_serial: bool = False
    """Backpropagate the active steps one at a time."""
    state: "EstimatorState | None" = None
    first_image: int = 0
    """Number, within the round, of the first of this worker's images."""

    def open(self, batch: Batch) -> Chain:
        """Return the chain of a batch as it stands after the base model's steps."""
        self.tally.num_calls += len(batch.prompts) * self.sampler.num_base_steps
        strengths_BM = None if batch.drawn is None else batch.drawn.strengths_BM
        return self.sampler.open(batch.prompts, batch.x_BCHW, batch.noise, strengths_BM)

    def score(self, images_B3HW: Tensor, batch: Batch) -> MixtureScore:
        """Return what the mixture says of a batch's images, at the weights that they were drawn with."""
        if batch.drawn is None:
            return self.mixture(images_B3HW, batch.prompts)
        return self.mixture(images_B3HW, batch.prompts, batch.drawn.weights)

    def penalties_B(self, chain: Chain, step: int, x_BCHW: Tensor, f_BCHW: Tensor) -> list[tuple[float, Tensor]]:
        """Return the weight and the value, ``(B,)``, of each regulariser that is on; right after the network's call.

        The network is not called again between that call at ``step``, with gradient, and this.
        """
        penalties = []
        if self.regularisers.attention > 0:  # before drift, which calls the network
            assert chain.attended is not None
            penalties.append((self.regularisers.attention, chain.attended.loss_B()))
        if self.regularisers.drift > 0:
            penalties.append((self.regularisers.drift, self.drift_B(chain, step, x_BCHW, f_BCHW)))
        return penalties

    def drift_B(self, chain: Chain, step: int, x_BCHW: Tensor, f_BCHW: Tensor) -> Tensor:
        """Return the mean squared distance of a network output from the base model's at the same input, ``(B,)``.

        The base model's output counts as a constant, also where the input depends on the adapters.
        """
        self.tally.num_calls += len(x_BCHW)
        return (f_BCHW - chain.predict_base(step, x_BCHW.detach())).square().flatten(1).mean(1)


class Estimator(Protocol):
    """Turns a reward into gradient. A frozen dataclass of its own settings; every name in a paper's own terms.

    A setting's type, default and text under ``Attributes:`` are what an experiment file knows of it, and so are the
    bounds of ``Annotated[float, Within(0, 1)]``, which ``check_settings`` checks.
    """

    needs_gradient: bool
    """Whether the reward must be differentiable. If not, sampling must be stochastic: eta > 0."""
    has_serial_mode: bool
    """Whether the inputs of its active steps are detached, so that they can be backpropagated one at a time."""

    def check(self, num_steps: int) -> None:
        """Check the settings against the steps that adapters have a part in; builds and runs nothing.

        Raises:
            ValueError: A setting is out of its range; the message names it and says what is right.
        """
        ...

    def train(self, round: Round) -> None:
        """Estimate the gradient of the mean reward from the round's images and update the adapters, once or more."""
        ...


@runtime_checkable
class Truncated(Protocol):
    """An estimator that trains the last K steps of a chain by the image that they end in."""

    def deepest(self, num_steps: int) -> int:
        """Return the greatest K that it may draw for a chain of so many steps."""
        ...


class EstimatorState(Protocol):
    """What an estimator learns besides the adapters; it is saved in checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts of them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        ...


@dataclass(frozen=True)
class Setting:
    """Where an estimator's state will live."""

    latent_shape: tuple[int, int, int]
    text_width: int
    device: torch.device
    seed: int


@runtime_checkable
class Stateful(Protocol):
    """An estimator that learns something besides the adapters."""

    def make_state(self, setting: Setting) -> EstimatorState:
        """Return the state at the start of a run."""
        ...


ESTIMATORS: Registry[Estimator] = Registry("estimator", "rltune.estimators")
"""Built from what an experiment's ``estimator`` section gives."""


def check_settings(estimator: object) -> None:
    """Check every setting against the bounds that stand in its type, ``Annotated[float, Within(0, 1)]``.

    Raises:
        ValueError: One is out of its range.
    """
    for option in options_of(type(estimator)):
        value = getattr(estimator, option.name)
        for kind in (option.type, *get_args(option.type)):  # the type itself, or one of several
            number, *notes = get_args(kind) if get_origin(kind) is Annotated else (None,)
            for bounds in notes:
                if isinstance(bounds, Within) and value is not None:
                    check = check_count if number is int else check_range
                    check(option.name, value, bounds.low, bounds.high)


def check_count(name: str, value: int, low: float, high: float) -> None:
    """Check a setting that counts something.

    Raises:
        ValueError: It is not a whole number in [low, high].
    """
    if not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    check_range(name, value, low, high)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Check a setting.

    Raises:
        ValueError: It is not in [low, high].
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
