"""``rltune sample --optimise noise``: what was asked for, and the table of what became of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rltune.cli.terminal import console, told
from rltune.errors import UserError

if TYPE_CHECKING:
    from rltune.training.noise_rows import Aim, Pair


@dataclass(frozen=True)
class Wish:
    """What the options of the command say of optimising, as they were written."""

    kind: str | None
    rewards: Sequence[str] = ()
    options: Sequence[str] = ()
    judges: Sequence[str] = ()
    num_steps: int | None = None
    lr: float | None = None
    k: int | None = None

    def check(self) -> None:
        """Check that it goes together; loads nothing.

        Raises:
            UserError: Something else than the noise is, or nothing, and options say how.
        """
        if self.kind not in (None, "noise"):
            raise UserError(f"--optimise: must be noise, got {self.kind!r}")
        given = {
            "--reward": self.rewards,
            "--option": self.options,
            "--judge": self.judges,
            "--optimise-steps": self.num_steps,
            "--rate": self.lr,
            "--k": self.k,
        }
        told = [name for name, value in given.items() if value not in (None, [], ())]
        if self.kind is None and told:
            raise UserError(f"{', '.join(told)}: nothing is optimised; give --optimise noise too")
        if self.kind is not None and not self.rewards:
            raise UserError("--optimise noise: wants something to raise; give --reward NAME")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UserError(f"--rate: must be a positive number, got {self.lr:g}")


def aim_of(wish: Wish, base: str, prompts: Sequence[str]) -> "Aim":
    """Return what is to be raised, its rewards loaded, with a judge that no training sees where there is one.

    Raises:
        UserError: A reward, a weight or an option is wrong, or a reward has no gradient.
        RunError: Its weights are not on this machine.
    """
    from rltune.cli.rewards import section_of
    from rltune.rewards.faithful import asked_of
    from rltune.training.noise_rows import Aim
    from rltune.training.rewards import build_reward

    weights = dict(_weighted(text) for text in wish.rewards)
    can_judge = base == "builtin" and all(asked_of(prompt) for prompt in prompts)
    judges = list(wish.judges) or (["faithful"] if can_judge else [])
    options: dict[str, list[str]] = {name: [] for name in (*weights, *judges)}
    for pair in wish.options:
        key, equals, value = pair.partition("=")
        name, dot, option = key.rpartition(".")
        if not (equals and dot) or name not in options:
            raise UserError(
                f"--option: must be REWARD.KEY=VALUE of {' or '.join(options)}, got {pair!r}; for example "
                f"{next(iter(options))}.KEY=VALUE"
            )
        options[name].append(f"{option}={value}")
    built = {name: build_reward(name, section_of(name, given)) for name, given in options.items()}
    given = {"num_steps": wish.num_steps, "lr": wish.lr, "k": wish.k}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    rewards = {name: built[name] for name in weights}
    return Aim(rewards, weights, {name: built[name] for name in judges if name not in weights}, **settings)


def _weighted(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        weight = float(number) if equals else 1.0
        if not name or not math.isfinite(weight) or weight == 0:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--reward: must be NAME or NAME=WEIGHT, a number that is not 0, got {text!r}; write aesthetic=0.5"
        ) from None
    return name, weight


def show_pairs(pairs: Sequence["Pair"], labels: Sequence[str], aim: "Aim") -> None:
    """Print what each model's images scored before and after, and what that took."""
    from rich.table import Table

    from rltune.intervals import half_width, standard_error

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", overflow="fold")
    for title in ("", "before", "after", "change", "s an image"):
        table.add_column(title, justify="left" if not title else "right", overflow="fold")
    for pair, label in zip(pairs, labels, strict=True):
        for i, name in enumerate([*aim.rewards, *aim.judges]):
            before_N, after_N = pair.drawn.values[name], pair.optimised.values[name]
            half = half_width(standard_error(after_N - before_N), len(before_N) - 1)
            change = told(float((after_N - before_N).mean()), half, sign="+")
            kind = "" if name in aim.rewards else " (judge)"
            numbers = (f"{before_N.mean():.4g}", f"{after_N.mean():.4g}", change)
            table.add_row("" if i else label, name + kind, *numbers, "" if i else f"{pair.seconds:.1f}")
    console.print(table)
    norm = sum(float(pair.optimised.norm_N.mean()) for pair in pairs) / len(pairs)
    num_steps = pairs[0].num_sampling
    console.print(
        f"\n{aim.num_steps} steps of the noise, {aim.lr:g} of its norm each, through {aim.k or num_steps} of "
        f"{num_steps} sampling steps; the best noise of each image is kept. Its norm is {norm:.1f} on average, that "
        f"of a standard normal {math.sqrt(pairs[0].num_values):.1f}. 95 % intervals over images",
        style="dim",
        soft_wrap=True,
    )
