"""Which held-out prompts trials are evaluated on, and which are left to measure the chosen ones again."""

from collections.abc import Iterable
from dataclasses import dataclass

from rltune.canvas import Canvas, as_read
from rltune.config.experiment import RunConfig
from rltune.errors import UserError
from rltune.training.canvases import prompt_set


@dataclass(frozen=True)
class FreshPrompts:
    """What chosen trials are measured on again; the noise is always fresh."""

    prompts: tuple[str, ...]
    num_reused: int
    """Of the prompts, those that trials were chosen by: none, or all where too few others are left."""


def search_prompts(config: RunConfig) -> tuple[str, ...]:
    """Return the held-out prompts that every trial is evaluated on: the first ``evaluate.prompts`` different ones.

    Raises:
        UserError: The held-out prompts cannot be read, or are too few.
    """
    held_out = prompt_set(config, "eval").prompts
    prompts, wanted = distinct(held_out), config.evaluate.prompts
    if len(prompts) < wanted:
        repeats = f", {len(prompts)} of them different" if len(prompts) < len(held_out) else ""
        raise UserError(
            f"evaluate.prompts: {wanted} prompts are wanted, but prompts.eval holds {len(held_out)}{repeats}; "
            "lower it or give more"
        )
    return prompts[:wanted]


def fresh_prompts(config: RunConfig) -> FreshPrompts:
    """Return the prompts on which chosen trials are measured again: those behind the search's.

    ``evaluate.confirm`` of them, or as many as are left if that is enough: half as many as the search had, and two at
    least, without which there is no interval. With fewer a front would be measured far worse than it was chosen, so the
    search's own prompts are drawn again, with other noise: that keeps the luck of the prompts.

    Raises:
        UserError: As ``search_prompts``.
    """
    used = search_prompts(config)
    left = distinct(prompt_set(config, "eval").prompts)[len(used) :]
    wanted = len(used) if config.evaluate.confirm == "auto" else config.evaluate.confirm
    enough = min(wanted, max(2, -(-len(used) // 2)))
    return FreshPrompts(left[:wanted], 0) if len(left) >= enough else FreshPrompts(used, len(used))


def distinct(prompts: Iterable[str]) -> tuple[str, ...]:
    """Return prompts without repeats, in order; text encoders see neither case nor the width of a space.

    With another picture a prompt is another.
    """
    first: dict[tuple[str, object], str] = {}
    for prompt in prompts:
        picture = prompt.source if isinstance(prompt, Canvas) else None
        first.setdefault((as_read(prompt), picture), prompt)
    return tuple(first.values())
