"""Small models in float64 whose calls are counted, a reward whose slope is known, and rounds of training on them.

B: images. C, H, W: latent channels, rows, columns. L, D: text tokens and width.
"""

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import Conditioning, TextBatch, linear_guidance, stack
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.sampler import Sampler
from rltune.diffusion.table import ChainTable, read_ddim_table
from rltune.estimators.base import Batch, Estimator, EstimatorState, Regularisers, Round, Setting, Stateful, Tally
from rltune.rewards.mixture import MixtureScore
from tests.tiny import SD15_SCHEDULE, byte_tokenizer, tiny_unet

PROMPTS = ("a cat", "two red birds", "a dog", "one fox")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Call:
    """One run of the network."""

    t: int
    num_rows: int
    has_grad: bool


class Toy:
    """A model family around a small network; notes every call."""

    pipeline: Any = None
    lora_prefix = "unet"
    size_px = (2, 2)
    is_guidance_linear = True
    collate = staticmethod(stack)
    guide = staticmethod(linear_guidance)

    def __init__(self, network: nn.Module, latent_shape: tuple[int, int, int], text_shape: tuple[int, int]) -> None:
        self.network, self.latent_shape, self.text_shape = network, latent_shape, text_shape
        self.calls: list[Call] = []
        self.num_rows_back = 0

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        return [{"text": text_LD} for text_LD in self.texts(prompts)]

    def encode_negative(self, prompt: str) -> None:
        """As any other."""

    def pooled_text(self, text: TextBatch) -> Tensor:
        return text["text"].float().mean(1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        rows = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
        texts = [torch.randn(self.text_shape, generator=row, dtype=torch.float64) for row in rows]
        return (1 + 0.5 * torch.stack(texts)).to(self.latent_dtype)

    def predict(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        self.calls.append(Call(int(t), len(x_BCHW), torch.is_grad_enabled()))
        f_BCHW = self.run(x_BCHW, t, text["text"])
        if f_BCHW.requires_grad:
            f_BCHW.register_hook(self._note_backward)
        return f_BCHW

    def run(self, x_BCHW: Tensor, t: Tensor, text_BLD: Tensor) -> Tensor:
        if hasattr(self.network, "config"):  # a diffusers model
            return self.network(x_BCHW, t, encoder_hidden_states=text_BLD).sample
        dtype = next(self.network.parameters()).dtype
        return self.network(x_BCHW.to(dtype), t, text_BLD.to(dtype)).to(x_BCHW.dtype)

    def decode(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW[:, :3].sigmoid()

    @property
    def latent_dtype(self) -> torch.dtype:
        """The network's, but float32 around a network in bfloat16, as in a run."""
        dtype = next(self.network.parameters()).dtype
        return torch.float32 if dtype == torch.bfloat16 else dtype

    @property
    def num_rows(self) -> int:
        """Rows that went through the network, forward and backward."""
        return sum(call.num_rows for call in self.calls) + self.num_rows_back

    @property
    def parameters(self) -> list[nn.Parameter]:
        return lora_parameters(self.network)

    def _note_backward(self, slope_BCHW: Tensor) -> None:
        self.num_rows_back += len(slope_BCHW)


class Adaptable(nn.Module):
    """Takes adapters as a diffusers model does."""

    def add_adapter(self, config: LoraConfig, adapter_name: str) -> None:
        inject_adapter_in_model(config, self, adapter_name=adapter_name)


class Line(Adaptable):
    """f(x, t) = w m x, m the mean of the prompt's embedding: x_0 is a polynomial in w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(1, 1, bias=False)

    def forward(self, x_BCHW: Tensor, t: Tensor, text_BLD: Tensor) -> Tensor:
        return self.w(x_BCHW.unsqueeze(-1)).squeeze(-1) * text_BLD.mean((1, 2)).view(-1, 1, 1, 1)


class Perceptron(Adaptable):
    """One hidden layer on latent, timestep and mean text embedding."""

    def __init__(self, latent_shape: tuple[int, int, int], text_width: int) -> None:
        super().__init__()
        width = int(np.prod(latent_shape))
        self.inner = nn.Linear(width + 1 + text_width, 12)
        self.outer = nn.Linear(12, width)

    def forward(self, x_BCHW: Tensor, t: Tensor, text_BLD: Tensor) -> Tensor:
        t_B1 = (t / 1000).to(x_BCHW.dtype).expand(len(x_BCHW), 1)
        inputs = torch.cat([x_BCHW.flatten(1), t_B1, text_BLD.mean(1)], dim=1)
        return self.outer(self.inner(inputs).tanh()).view_as(x_BCHW)


def fill(network: nn.Module, scale: float) -> None:
    """Give adapters values none of which is zero, so that both factors get gradient."""
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_parameters(network):
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * scale


def line_toy(w: float = 0.25, *, alpha: float = 2.0) -> Toy:
    network = Line().requires_grad_(False)
    network.w.weight.fill_(w)
    add_lora(network, rank=1, alpha=alpha, targets=["w"], seed=0)
    toy = Toy(network.double(), (3, 2, 2), (2, 4))
    fill(network, 0.6)
    toy.decode = lambda x_BCHW: x_BCHW  # type: ignore[method-assign]
    return toy


def perceptron_toy(dtype: torch.dtype = torch.float64) -> Toy:
    torch.manual_seed(3)
    network = Perceptron((3, 2, 2), 4).requires_grad_(False)
    add_lora(network, rank=2, alpha=3, targets=["inner", "outer"], seed=0)
    fill(network, 0.3)
    network.to(dtype)
    if dtype == torch.bfloat16:  # frozen weights alone are; adapters stay in float32, and keep their values
        for parameter, twin in zip(lora_parameters(network), perceptron_toy(torch.float32).parameters, strict=True):
            parameter.data = twin.data
    return Toy(network, (3, 2, 2), (2, 4))


def unet_toy() -> Toy:
    torch.manual_seed(1)
    network = tiny_unet(is_deep=False).requires_grad_(False)
    add_lora(network, rank=2, alpha=2, targets="attention", seed=0)
    network.double()
    fill(network, 0.1)
    return Toy(network, (4, 4, 4), (6, 32))


def reading_toy() -> Toy:
    """The same network with a tokenizer, so that its text has words; as many tokens as that reads."""
    toy = Toy(unet_toy().network, (4, 4, 4), (16, 32))
    toy.pipeline = SimpleNamespace(tokenizer=byte_tokenizer())
    return toy


def slope_of(images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """dr/dx of the toy reward where x is 0, which depends on pixel and prompt."""
    num_pixels = images_B3HW[0].numel()
    slope = torch.linspace(-1, 2, num_pixels, dtype=images_B3HW.dtype).view(images_B3HW.shape[1:])
    factors = torch.tensor([1 + 0.1 * len(prompt) for prompt in prompts], dtype=images_B3HW.dtype)
    return factors.view(-1, 1, 1, 1) * slope / num_pixels


def toy_reward(images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """r = sum_p (c_p x_p - x_p^2 / 40), ``(B,)``."""
    return (slope_of(images_B3HW, prompts) * images_B3HW - images_B3HW.square() / 40).flatten(1).sum(1)


class ToyMixture:
    """Scores in the images' own float64, where a real mixture scores in float32; counts the images."""

    rewards = {"toy": None}  # noqa: RUF012

    def __init__(self) -> None:
        self.num_scored = 0

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> MixtureScore:
        self.num_scored += len(prompts)
        reward_B = toy_reward(images_B3HW, prompts)
        return MixtureScore(total_B=reward_B, raw={"toy": reward_B}, standardised={"toy": reward_B})


class Alone:
    """The only worker."""

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Leave the gradients as they are."""

    def gather(self, items: list[Any]) -> list[Any]:
        return items


class Exchange:
    """Where the workers of a run, a thread each, hand things to one another."""

    def __init__(self, count: int) -> None:
        self.barrier = Barrier(count)
        self.slots: list[Any] = [None] * count

    def swap(self, rank: int, item: Any) -> list[Any]:
        self.slots[rank] = item
        self.barrier.wait(timeout=30)
        items = list(self.slots)
        self.barrier.wait(timeout=30)
        return items


@dataclass
class Peer:
    """One of several workers; a collective that the others do not join breaks the barrier."""

    rank: int
    exchange: Exchange

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        mine = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for parameter, parts in zip(parameters, zip(*self.exchange.swap(self.rank, mine), strict=True), strict=True):
            parameter.grad = torch.stack(parts).sum(0)

    def gather(self, items: list[Any]) -> list[Any]:
        return [item for part in self.exchange.swap(self.rank, items) for item in part]


class NoTimer:
    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        yield


@dataclass
class Recorder:
    """Keeps the summed gradient of every update, and takes a plain step of ``lr`` along it."""

    parameters: Sequence[nn.Parameter]
    peers: Any
    lr: float = 0.0
    gradients: list[Tensor] = field(default_factory=list)
    may_vanish: list[bool] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, *, may_vanish: bool = False) -> None:
        self.peers.sum_gradients(self.parameters)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        self.gradients.append(torch.cat([part.flatten() for part in parts]))
        self.may_vanish.append(may_vanish)
        for parameter, part in zip(self.parameters, parts, strict=True):
            if self.lr > 0:
                parameter.sub_(part, alpha=self.lr)
            parameter.grad = None


def make_scheduler(**settings: Any) -> DDIMScheduler:
    return DDIMScheduler(**{**SD15_SCHEDULE, "clip_sample": False, **settings})


def double_scheduler(num_steps: int, **settings: Any) -> DDIMScheduler:
    """Return diffusers' own sampler in float64, to step with."""
    scheduler = make_scheduler(**settings)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(num_steps)
    return scheduler


def make_table(num_steps: int, eta: float = 0.0, **settings: Any) -> ChainTable:
    return read_ddim_table(make_scheduler(**settings), num_steps=num_steps, eta=eta)


def make_sampler(toy: Toy, table: ChainTable, *, guidance: float = 1.0, **settings: Any) -> Sampler:
    return Sampler(toy, PromptEmbeddings(toy), table, guidance, **settings)  # type: ignore[arg-type]


def draw(toy: Toy, images: Sequence[int], kind: int, index: int = 0) -> Tensor:
    """Return standard normal noise, a function of image, kind (0 latent, 1 step, 2 extra) and index alone."""
    keys = [[image, kind, index] for image in images]
    rows = [np.random.default_rng(key).standard_normal(toy.latent_shape) for key in keys]
    return torch.from_numpy(np.stack(rows)).to(toy.latent_dtype)


def make_batch(toy: Toy, first: int, count: int, eta: float = 0.0) -> Batch:
    images = range(first, first + count)
    return Batch(
        prompts=tuple(PROMPTS[image % len(PROMPTS)] for image in images),
        x_BCHW=draw(toy, images, 0),
        noise=(lambda k: draw(toy, images, 1, k)) if eta > 0 else None,
        extra_noise=lambda number: draw(toy, images, 2, number),
    )


def make_state(toy: Toy, estimator: Estimator) -> EstimatorState | None:
    if not isinstance(estimator, Stateful):
        return None
    return estimator.make_state(Setting(toy.latent_shape, toy.text_shape[1], CPU, seed=0))


def make_round(
    toy: Toy,
    estimator: Estimator,
    *,
    num_steps: int = 4,
    eta: float | None = None,
    guidance: float = 1.0,
    num_images: int = 4,
    micro_batch: int | None = None,
    rank: int = 0,
    num_workers: int = 1,
    peers: Any = None,
    seed: int = 0,
    lr: float = 0.0,
    regularisers: Regularisers | None = None,
    is_serial: bool = False,
    state: EstimatorState | None = None,
    mixture: Any = None,
    schedule: dict[str, Any] | None = None,
    **sampler: Any,
) -> Round:
    """Return one round on a toy; eta, if not given, is what the estimator needs."""
    eta = (0.0 if estimator.needs_gradient else 1.0) if eta is None else eta
    table = make_table(num_steps, eta, **(schedule or {}))
    share = num_images // num_workers
    size = micro_batch or share
    starts = range(rank * share, (rank + 1) * share, size)
    peers = peers or Alone()
    return Round(
        sampler=make_sampler(toy, table, guidance=guidance, **sampler),
        mixture=ToyMixture() if mixture is None else mixture,
        batches=tuple(make_batch(toy, first, min(size, (rank + 1) * share - first), eta) for first in starts),
        num_images=num_images,
        rng=np.random.default_rng(seed),
        parameters=toy.parameters,
        peers=peers,
        timer=NoTimer(),
        update=Recorder(toy.parameters, peers, lr),
        tally=Tally(("reward", "toy", "toy_z") if mixture is None else ("reward",)),
        regularisers=regularisers or Regularisers(),
        is_serial=is_serial,
        state=make_state(toy, estimator) if state is None else state,
        first_image=rank * share,
    )


def gradients_of(estimator: Estimator, round: Round) -> list[Tensor]:
    """Train on a round and return the gradient of every update."""
    estimator.train(round)
    assert isinstance(round.update, Recorder)
    return round.update.gradients


def on_workers(count: int, toy: Toy, estimator: Estimator, **settings: Any) -> list[tuple[Toy, Round]]:
    """Train on one round with several workers, each with a model of its own, and return those and their rounds."""
    exchange = Exchange(count)
    toys, states = zip(*[(copy.deepcopy(toy), make_state(toy, estimator)) for _ in range(count)], strict=True)

    def work(rank: int) -> tuple[Toy, Round]:
        own = toys[rank]
        place = {"rank": rank, "num_workers": count, "peers": Peer(rank, exchange), "state": states[rank]}
        try:
            round = make_round(own, estimator, **place, **settings)
            estimator.train(round)
        except BaseException:
            exchange.barrier.abort()
            raise
        return own, round

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(work, rank) for rank in range(count)]]


def flat_gradient(loss: Tensor, parameters: Sequence[nn.Parameter], *, retain_graph: bool = False) -> Tensor:
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True, retain_graph=retain_graph)
    return torch.cat([part.flatten() for part in parts])


Denoise = Callable[[Tensor, Tensor], Tensor]


def guided(toy: Toy, prompts: Sequence[str], guidance: float) -> Denoise:
    """Classifier-free guidance by two runs of the bare network."""
    text_BLD, negative_BLD = toy.texts(prompts), toy.texts([""] * len(prompts))

    def denoise(x_BCHW: Tensor, t: Tensor) -> Tensor:
        if guidance == 1:
            return toy.run(x_BCHW, t, text_BLD)
        f_text, f_negative = toy.run(x_BCHW, t, text_BLD), toy.run(x_BCHW, t, negative_BLD)
        return guidance * f_text + (1 - guidance) * f_negative

    return denoise


class ByHand:
    """The stochastic chain as a policy, written with diffusers' step and torch's normal distribution."""

    def __init__(
        self,
        toy: Toy,
        *,
        num_steps: int = 4,
        num_images: int = 4,
        eta: float = 1.0,
        guidance: float = 1.0,
        **schedule: Any,
    ) -> None:
        self.toy, self.eta, self.num_images, self.num_steps = toy, eta, num_images, num_steps
        self.scheduler = double_scheduler(num_steps, **schedule)
        self.prompts = make_batch(toy, 0, num_images).prompts
        self.denoise = guided(toy, self.prompts, guidance)
        stride = 1000 // num_steps
        levels = [self.scheduler.alphas_cumprod[t] for t in self.scheduler.timesteps]
        after = int(self.scheduler.timesteps[-1]) - stride
        assert after < 0
        self.alpha_bar = [*levels, self.scheduler.final_alpha_cumprod]
        self.states, self.outputs, self.cleans = [draw(toy, range(num_images), 0)], [], []
        for k in range(num_steps):
            f = self.predict(k).detach()
            noise = draw(toy, range(num_images), 1, k)
            self.outputs.append(f)
            self.cleans.append(self._step(k, f, noise).pred_original_sample)
            self.states.append(self._step(k, f, noise).prev_sample)

    def predict(self, k: int) -> Tensor:
        return self.denoise(self.states[k], self.scheduler.timesteps[k])

    def std(self, k: int) -> float:
        """DDIM (arXiv:2010.02502), Eq. 16."""
        now, then = self.alpha_bar[k], self.alpha_bar[k + 1]
        return self.eta * float(((1 - then) / (1 - now) * (1 - now / then)).sqrt())

    def log_prob(self, k: int) -> Tensor:
        """Of the step taken under the present policy, the mean over elements, ``(B,)``."""
        mean = self._step(k, self.predict(k), torch.zeros(())).prev_sample
        return torch.distributions.Normal(mean, self.std(k)).log_prob(self.states[k + 1]).mean((1, 2, 3))

    def log_prob_back(self, k: int) -> Tensor:
        """Of the forward process from step k + 1's state back to step k's."""
        ratio = self.alpha_bar[k] / self.alpha_bar[k + 1]
        forward = torch.distributions.Normal(ratio.sqrt() * self.states[k + 1], (1 - ratio).sqrt())
        return forward.log_prob(self.states[k]).mean((1, 2, 3))

    def reward(self, x: Tensor) -> Tensor:
        return toy_reward(self.toy.decode(x), self.prompts)

    def _step(self, k: int, f: Tensor, noise: Tensor) -> Any:
        extra = {"variance_noise": noise} if self.eta > 0 else {}
        return self.scheduler.step(f, self.scheduler.timesteps[k], self.states[k], eta=self.eta, **extra)
