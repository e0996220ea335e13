"""Cross-attention of a UNet, edited while images are drawn, or noted for a loss; ``regulation.py`` has the formulas.

Only networks whose images look at the text by layers of their own have such maps: Stable Diffusion 1.x and 2.x, SDXL.

B: images. C, H, W: latent channels, rows, columns. R: rows of a network call, with guidance two an image. N: heads.
P: places. L: tokens. D: width.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from rltune.diffusion.families.base import Conditioning, ModelFamily, TextBatch
from rltune.diffusion.regulation import KEPT, Words, attention_losses, bumps, map_shape, regulate
from rltune.errors import UserError

ABLE = "Stable Diffusion 1.x or 2.x, SDXL or the built-in model"
WORDS = "words"
"""Name, in a ``Conditioning`` or ``TextBatch``, of the tokens that are to be looked at."""
FUNCTION_WORDS = (
    *("a", "an", "the", "this", "that", "these", "those", "and", "or", "but", "as", "is", "are", "be", "it", "its"),
    *("there", "of", "on", "in", "at", "by", "to", "for", "from", "with", "without", "over", "under", "against"),
)
"""Words that say nothing of what is in a picture."""


@dataclass(frozen=True)
class AttentionPlan:
    """What becomes of the cross-attention of some layers."""

    layers: tuple[str, ...]
    """Names of the modules."""
    num_steps: int = 0
    """First steps of a chain at which it is regulated."""
    iterations: int = 20
    """Of the inner optimisation."""
    strength: float = 1.0
    """Factor of the edit."""
    is_noted: bool = False
    """Whether the loss of the maps is noted where gradient flows; that changes no image."""


@dataclass
class _Found:
    """The heights of the bumps at one step."""

    x_BCHW: Tensor
    """The input that they were found at."""
    heights: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> (B, N, G, W), the moving average."""


@dataclass(frozen=True)
class _Call:
    """One run of the network, as its layers need to know it; blocks that backward runs again get the same."""

    plan: AttentionPlan
    words: Words
    size: tuple[int, int]
    """Latent rows and columns."""
    found: _Found | None
    """Where the edit is looked up and put; None at steps without one."""
    before: Mapping[str, Tensor]
    """The heights of the step before."""
    noted: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> its loss, (B,), differentiable."""

    def edit(self, layer: str, logits_BNPL: Tensor) -> Tensor:
        """Return what is added to the logits of a layer, (B, N, P, L); it counts as a constant."""
        assert self.found is not None
        rows, columns = map_shape(logits_BNPL.shape[2], *self.size)
        bumps_PG = bumps(rows, columns, logits_BNPL.device, logits_BNPL.dtype)
        if layer not in self.found.heights:
            w_BNGW = regulate(logits_BNPL, self.words, bumps_PG, self.plan.iterations)
            before_BNGW = self.before.get(layer)
            if before_BNGW is not None:
                w_BNGW = KEPT * before_BNGW + (1 - KEPT) * w_BNGW
            self.found.heights[layer] = w_BNGW
        edit_BNPW = torch.einsum("pg,bngw->bnpw", bumps_PG, self.found.heights[layer])
        return self.plan.strength * self.words.spread(edit_BNPW, logits_BNPL.shape[-1])

    def note(self, layer: str, probs_BNPL: Tensor) -> None:
        """Take the loss of a layer's maps, the mean over its heads."""
        self.noted[layer] = attention_losses(self.words.picked(probs_BNPL, 0.0), self.words).mean(1)


_CALL: ContextVar[_Call | None] = ContextVar("attention", default=None)


class _Watched:
    """A layer's own processor, which does all that is not asked of this one."""

    def __init__(self, layer: str, own: Any) -> None:
        self.layer, self.own = layer, own

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        call = _CALL.get()
        is_noted = call is not None and call.plan.is_noted and torch.is_grad_enabled()
        if call is None or self.layer not in call.plan.layers or (call.found is None and not is_noted):
            plain: Tensor = self.own(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return plain
        assert encoder_hidden_states is not None
        assert attention_mask is None
        logits_RNPL = _logits(attn, hidden_states, encoder_hidden_states)
        first = len(logits_RNPL) - len(call.words.index_BW)  # the rows of negative prompts come before
        if call.found is not None:
            edit_BNPL = call.edit(self.layer, logits_RNPL[first:])
            logits_RNPL = torch.cat([logits_RNPL[:first], logits_RNPL[first:] + edit_BNPL])
        probs_RNPL = logits_RNPL.softmax(-1)
        if is_noted:
            call.note(self.layer, probs_RNPL[first:])
        if call.found is None:
            plain = self.own(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return plain
        value_RNLD = _by_heads(attn, attn.to_v(encoder_hidden_states))
        seen_RPD = (probs_RNPL.to(value_RNLD.dtype) @ value_RNLD).transpose(1, 2).flatten(2)
        output: Tensor = attn.to_out[1](attn.to_out[0](seen_RPD)) / attn.rescale_output_factor
        return output


def _logits(attn: Any, hidden_RPD: Tensor, text_RLD: Tensor) -> Tensor:
    """Return the logits of a layer, (R, N, P, L), in float32 at least."""
    query_RNPD, key_RNLD = (_by_heads(attn, part) for part in (attn.to_q(hidden_RPD), attn.to_k(text_RLD)))
    dtype = torch.promote_types(query_RNPD.dtype, torch.float32)
    with torch.autocast(query_RNPD.device.type, enabled=False):
        logits_RNPL: Tensor = query_RNPD.to(dtype) @ key_RNLD.to(dtype).transpose(2, 3)
        return logits_RNPL / sqrt(query_RNPD.shape[-1])


def _by_heads(attn: Any, rows_RXD: Tensor) -> Tensor:
    heads_RXND: Tensor = rows_RXD.unflatten(2, (attn.heads, -1))
    return heads_RXND.transpose(1, 2)


class Attended:
    """A model that attends to words as a plan says, for one batch; ``guided_denoiser`` sees a model like any other.

    The edit of a step is found at the first call with its input, and is that of all later ones: of a checkpoint, which
    computes the step again, and of the base model beside it.
    """

    def __init__(self, model: ModelFamily, plan: AttentionPlan, timesteps_T: Tensor) -> None:
        self._model, self._plan = model, plan
        self._steps = {float(t): k for k, t in enumerate(timesteps_T)}
        self._found: dict[int, _Found] = {}
        self._last: _Call | None = None
        self.guide, self.is_guidance_linear = model.guide, model.is_guidance_linear
        watch(model.network, plan.layers)

    def rows(self, rows: Sequence[Conditioning], prompts: Sequence[str]) -> list[Conditioning]:
        """Return what prompts tell the network, marked with their words."""
        tokenizer = self._model.pipeline.tokenizer
        asked = dict.fromkeys(map(str, prompts))
        places = {prompt: torch.tensor(content_tokens(tokenizer, prompt)) for prompt in asked}
        return [{**row, WORDS: places[str(prompt)]} for row, prompt in zip(rows, prompts, strict=True)]

    def collate(self, rows: Sequence[Conditioning], device: torch.device) -> TextBatch:
        """Bring conditionings together, with the words of those that are prompts, which come last."""
        places = [row[WORDS].tolist() for row in rows if WORDS in row]
        bare = [{name: value for name, value in row.items() if name != WORDS} for row in rows]
        batch = self._model.collate(bare, device)
        return {**batch, WORDS: Words.of(places, device)} if places else batch

    def predict(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        """Run the network once, regulated where the plan says so."""
        words = text.get(WORDS)
        if words is None:
            return self._model.predict(x_BCHW, t, text)
        step = self._steps[float(t)]
        found = self._look_up(step, x_BCHW[-len(words.index_BW) :]) if step < self._plan.num_steps else None
        before = self._found[step - 1].heights if step - 1 in self._found else {}
        self._last = _Call(self._plan, words, (x_BCHW.shape[2], x_BCHW.shape[3]), found, before)
        token = _CALL.set(self._last)
        try:
            return self._model.predict(x_BCHW, t, {name: value for name, value in text.items() if name != WORDS})
        finally:
            _CALL.reset(token)

    def loss_B(self) -> Tensor:
        """Return the loss of the last call's maps, (B,), the mean over layers; differentiable.

        Raises:
            ValueError: It was without gradient, or the plan notes none.
        """
        if self._last is None or not self._last.noted:
            raise ValueError("the last call of the network noted no attention")
        return torch.stack([*self._last.noted.values()]).mean(0)

    def _look_up(self, step: int, x_BCHW: Tensor) -> _Found:
        found = self._found.get(step)
        if found is None or found.x_BCHW.shape != x_BCHW.shape or not torch.equal(found.x_BCHW, x_BCHW):
            found = self._found[step] = _Found(x_BCHW.detach())
        return found


def watch(network: nn.Module, layers: Iterable[str]) -> None:
    """Let layers look, from now on, whether they are to be regulated; a network that nobody regulates is as it was."""
    for name in layers:
        layer: Any = network.get_submodule(name)
        if not isinstance(layer.processor, _Watched):
            layer.set_processor(_Watched(name, layer.processor))


def attention_layers(network: nn.Module, wanted: str | Sequence[str], *, where: str, base: str) -> tuple[str, ...]:
    """Return the names of a network's layers of cross-attention.

    Args:
        network: Perhaps with adapters.
        wanted: Beginnings of names; or ``auto``, the innermost of the way down and of the way up, which are the paper's
            ``down_blocks.2`` and ``up_blocks.1`` in Stable Diffusion 1.x and 2.x.
        where: The setting that asks, for messages.
        base: What the user calls the model.

    Raises:
        UserError: The network has none, or none of such a name.
    """
    if not isinstance(network, UNet2DConditionModel):
        raise UserError(
            f"{where}: only UNets look at the text by layers of their own, got {base!r}, whose network is a "
            f"{type(network).__name__}; delete it, or take {ABLE}"
        )
    names = [name for name, _ in network.named_modules() if name.split(".")[-1] == "attn2"]
    blocks = list(dict.fromkeys(".".join(name.split(".")[: 1 if name.startswith("mid") else 2]) for name in names))
    if wanted == "auto":
        down, up = ([block for block in blocks if block.startswith(way)] for way in ("down", "up"))
        wanted = [*down[-1:], *up[:1]]
    elif isinstance(wanted, str):
        wanted = [wanted]
    for part in wanted:
        if not any(f"{name}.".startswith(f"{part}.") for name in names):
            what = f"no cross-attention is called so, got {part!r}; there is {', '.join(blocks)}"
            raise UserError(f"sampler.attention.layers: {what}")
    return tuple(name for name in names if any(f"{name}.".startswith(f"{part}.") for part in wanted))


def content_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Return the places of a prompt's tokens that say what is in the picture.

    Start, end and padding are left out, and words such as ``a`` and ``of``, and punctuation, if others are left.
    """
    ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    inner = [place for place in range(len(ids)) if ids[place] not in tokenizer.all_special_ids]
    words: list[list[int]] = [[]]
    for place in inner:
        words[-1].append(place)
        if tokens[place].endswith("</w>"):
            words.append([])
    spelt = [("".join(tokens[place] for place in word).removesuffix("</w>"), word) for word in words]
    return [place for text, word in spelt if text.isalnum() and text not in FUNCTION_WORDS for place in word] or inner
