"""Whether a picture shows what its prompt asks for, read by a judge that no training sees: to measure, not to train on.

B: images in the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rltune.assets import BUILTIN_JUDGE
from rltune.builtin.grammar import Content, parse
from rltune.builtin.judge import Judge, Verdict, compare, load_judge
from rltune.errors import UserError
from rltune.rewards.base import REWARDS, Card, weights_file
from rltune.rewards.objects import to_network


class Faithful:
    """Share of what the prompt asks for that the picture shows: ground, colours, number of objects, shapes.

    Args:
        judge: The network that reads the picture.
        is_strict: Score 1 only where everything is right, each group with its own colour, number and shape; else 0.
    """

    def __init__(self, judge: Judge, *, is_strict: bool = False) -> None:
        self._judge = judge
        self._is_strict = is_strict

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, without gradient.

        Raises:
            UserError: A prompt is not one of the built-in world, or names two kinds of objects of one colour, which the
                judge cannot tell apart.
        """
        contents = [self._content(prompt) for prompt in prompts]
        verdicts = map(compare, self._judge.read(to_network(images_B3HW).clamp(-1, 1)), contents)
        return torch.tensor([self._score(verdict) for verdict in verdicts], device=images_B3HW.device)

    def _content(self, prompt: str) -> Content:
        content = asked_of(prompt)
        if content is None:
            raise UserError(
                f"judge {'faithful_exact' if self._is_strict else 'faithful'!r}: cannot read what {prompt!r} asks for; "
                "it reads prompts of the built-in model only, such as 'two red stars and a blue ring on a white "
                "background', with another colour for each kind of object"
            )
        return content

    def _score(self, verdict: Verdict) -> float:
        if self._is_strict:
            return float(verdict.exact)
        return (verdict.ground + verdict.colors + verdict.count + verdict.shape) / 4

    def to(self, device: torch.device) -> None:
        """Move the judge to ``device``."""
        self._judge.to(device)


def asked_of(prompt: str) -> Content | None:
    """Return what a prompt of the built-in world asks for; None of others, and where two kinds share a colour."""
    content = parse(prompt)
    colors = [group.color for group in content.groups] if content else []
    return None if len(set(colors)) < len(colors) else content


@REWARDS.register("faithful", Card("0 to 1", is_shipped=True, value_range=(0.0, 1.0), is_differentiable=False))
def build_faithful(*, weights: str | None = None) -> Faithful:
    """Share of the prompt's ground, colours, count and shapes that an independent judge reads.

    Args:
        weights: Another file of the judge's layout.

    Raises:
        RunError: The judge's weights are missing.
    """
    return Faithful(load_judge(weights_file("faithful", weights, BUILTIN_JUDGE)))


@REWARDS.register("faithful_exact", Card("0 or 1", is_shipped=True, value_range=(0.0, 1.0), is_differentiable=False))
def build_faithful_exact(*, weights: str | None = None) -> Faithful:
    """1 where that judge reads exactly what the prompt asks for, else 0.

    Args:
        weights: Another file of the judge's layout.

    Raises:
        RunError: The judge's weights are missing.
    """
    return Faithful(load_judge(weights_file("faithful_exact", weights, BUILTIN_JUDGE)), is_strict=True)
