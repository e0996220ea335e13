"""A prompt's embedding mixed with a styled prompt's by a number a step: the network stays, what it is told changes.

Disentanglement in text-to-image models (arXiv:2212.08698): c_t = (1 - lambda_t) c0 + lambda_t c1, with c0 the prompt's
embedding, c1 that of the same prompt with words of style, and one lambda for each sampling step.

B: images. T: sampling steps that the numbers were made for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rltune.diffusion.families.base import FAMILIES, Conditioning, ModelFamily, TextBatch
from rltune.errors import UserError

PLACE = "{prompt}"
"""Where a template has the prompt."""
MIX_FILE = "conditioning.json"
"""What such numbers are exported as."""
ATTACHED = "prompt_mix"
"""Name of the numbers among a network's parts."""

TextAt = Callable[[TextBatch, Tensor], TextBatch]
"""``(text, timestep)`` -> what the network is told there; of a batch with guidance, of its last B rows."""


def styled(template: str, prompt: str) -> str:
    """Return a prompt with words of style; a picture that it comes with is left out."""
    return template.replace(PLACE, str(prompt))


class PromptMix(nn.Module):
    """T numbers, each of its timestep, and the template of the styled prompts. At 0 they change nothing.

    Args:
        template: Has ``{prompt}`` in it.
        timesteps_T: As the network is told them, in any order.
        lambda_T: Of each; 0 if left out.
    """

    timesteps_T: Tensor
    """Float64."""

    def __init__(self, template: str, timesteps_T: Tensor, lambda_T: Tensor | None = None) -> None:
        super().__init__()
        self.template = template
        self.lambda_T = nn.Parameter(torch.zeros(len(timesteps_T)) if lambda_T is None else lambda_T.float().clone())
        self.register_buffer("timesteps_T", timesteps_T.double())
        self.is_off = False
        self.strength = 1.0
        """What every number is multiplied by."""

    @property
    def is_whole(self) -> bool:
        """Whether the styled prompt takes the prompt's place at every step, whatever its length. Never in training."""
        return not self.lambda_T.requires_grad and self.strength == 1.0 and bool((self.lambda_T == 1.0).all())

    def at(self, t: Tensor) -> Tensor:
        """Return the number of a timestep, 0-d: linear between those that there are, the nearest beyond them.

        Differentiable in ``lambda_T``; at the timestep of one of them it is that one.
        """
        knots_T, order_T = self.timesteps_T.sort()
        lambda_T, t = self.lambda_T[order_T], t.to(knots_T)
        above = torch.searchsorted(knots_T, t)
        low, high = (above - 1).clamp(min=0), above.clamp(max=len(knots_T) - 1)
        width = knots_T[high] - knots_T[low]  # 0 beyond the ends
        part = torch.where(width > 0, (t - knots_T[low]) / width.clamp(min=torch.finfo(width.dtype).tiny), 0.0)
        part = part.to(lambda_T.dtype)
        return (1 - part) * lambda_T[low] + part * lambda_T[high]

    def over(
        self, model: ModelFamily, rows: Sequence[Conditioning], others: Sequence[Conditioning], device: torch.device
    ) -> TextAt:
        """Return what the network is told of B images at a timestep.

        Args:
            model: Whose text it is.
            rows: Of each image's prompt.
            others: Of each image's styled prompt.
            device: Where the network runs.

        Raises:
            UserError: The texts of the two are no tensors of the same shape, or have masks that differ.
        """
        for row, other in zip(rows, others, strict=True):
            _check_alike(model, row, other)
        batch = model.collate(others, device)
        floats = {name: batch[name] for name, tensor in others[0].items() if tensor.is_floating_point()}

        def text_at(text: TextBatch, t: Tensor) -> TextBatch:
            return text if self.is_off else {**text, **_mixed(text, floats, self.strength * self.at(t))}

        return text_at


def _mixed(text: TextBatch, others: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    mixed = {}
    for name, other in others.items():
        before, own = text[name][: -len(other)], text[name][-len(other) :]
        mixed[name] = torch.cat([before, (1 - weight) * own + weight * other])
    return mixed


def _check_alike(model: ModelFamily, row: Conditioning, other: Conditioning) -> None:
    for name, tensor in row.items():
        is_alike = tensor.shape == other[name].shape
        if not is_alike or not (tensor.is_floating_point() or torch.equal(tensor, other[name])):
            raise unfit(model)


def unfit(model: ModelFamily) -> UserError:
    """Return the error that says which families' prompts can be mixed."""
    able = [name for name in FAMILIES.names() if getattr(FAMILIES.get(name), "has_fixed_text", False)]
    return UserError(
        f"model.adapter.kind: prompts of {type(model.pipeline).__name__} differ in length, or in a mask, and cannot be "
        f"mixed, got conditioning; take lora, or a model of {', '.join(able)}"
    )


def attach_mix(model: ModelFamily, mix: PromptMix) -> None:
    """Attach numbers to a model without adapters.

    Raises:
        UserError: Its prompts cannot be mixed.
    """
    if not (model.has_fixed_text or mix.is_whole):
        raise unfit(model)
    device = next(model.network.parameters()).device
    model.network.add_module(ATTACHED, mix.to(device))


def attached_mix(network: nn.Module) -> PromptMix | None:
    """Return the numbers of a network, None where it has none."""
    found = network._modules.get(ATTACHED)
    assert found is None or isinstance(found, PromptMix)
    return found


def remove_mix(network: nn.Module) -> None:
    """Take them off again; none is fine too."""
    network._modules.pop(ATTACHED, None)


@contextmanager
def mix_off(network: nn.Module) -> Iterator[None]:
    """Tell the network of prompts as they are inside the block; without numbers too."""
    mix = attached_mix(network)
    if mix is None:
        yield
        return
    was_off, mix.is_off = mix.is_off, True
    try:
        yield
    finally:
        mix.is_off = was_off
