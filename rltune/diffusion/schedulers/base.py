"""Coefficient tables by the class of a pipeline's scheduler; one file a kind of scheduler registers its readers here.

A reader takes the scheduler with its timesteps set and returns the table of the very step that it takes. ``T``: steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from rltune.diffusion.table import ChainTable
from rltune.registry import Registry

Rule = Literal["posterior", "flow_grpo"]
"""What eta means for a flow model, see ``flow.py``; others have the posterior's alone."""


class Reader(Protocol):
    """Reads the table of one kind of scheduler."""

    def __call__(self, scheduler: Any, *, eta: float, rule: Rule) -> ChainTable:
        """Return the coefficients of a scheduler whose timesteps are set.

        Raises:
            ValueError: A setting makes its step something else than affine in one state, or there is no such rule.
        """
        ...


READERS: Registry[ChainTable] = Registry("scheduler", "rltune.diffusion.schedulers")
"""Class of a scheduler -> reader. Look up with ``has_reader``: not every class has one."""


def has_reader(scheduler: Any) -> bool:
    """Return whether a pipeline's own scheduler can be read as a table."""
    return type(scheduler).__name__ in READERS.names()


def read_scheduler(
    scheduler: Any, *, num_steps: int, eta: float, rule: Rule = "posterior", grid: Mapping[str, Any] | None = None
) -> ChainTable:
    """Return the table of a pipeline's own scheduler.

    Args:
        scheduler: The pipeline's, which is left as it is.
        num_steps: T.
        eta: Share of the fresh noise; 0 is deterministic, 1 what the ancestral form of the sampler adds.
        rule: What eta means for a flow model.
        grid: What the pipeline hands to ``set_timesteps`` instead of T alone: its own ``sigmas``, ``mu``.

    Raises:
        ValueError: Its step is not affine in one state, or it has no such steps.
    """
    name = type(scheduler).__name__
    if name not in READERS.names():
        raise ValueError(
            f"a step of {name} is not affine in one state; write {_instead(scheduler)} as _class_name in the model's "
            f"scheduler/scheduler_config.json: it reads the same settings"
        )
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(**({"num_inference_steps": num_steps} if grid is None else grid))
    table = READERS.get(name)(own, eta=eta, rule=rule)
    if table.num_steps != num_steps:
        raise ValueError(f"{name} makes {table.num_steps} steps of {num_steps}; take another number")
    return table


def _instead(scheduler: Any) -> str:
    """Return the class of the nearest scheduler that has a reader."""
    if scheduler.config.get("use_flow_sigmas"):
        return "DPMSolverMultistepScheduler"
    is_flow = type(scheduler).__name__.startswith("FlowMatch")
    return "FlowMatchEulerDiscreteScheduler" if is_flow else "EulerDiscreteScheduler"


def make_table(timesteps_T: torch.Tensor, columns: Sequence[Any], *, init_scale: float = 1.0) -> ChainTable:
    """Return a table of the columns a, b, s, d, e (T each), signal and noise (T + 1 each), in float64.

    Raises:
        ValueError: A coefficient is not finite.
    """
    tensors = [torch.as_tensor(column, dtype=torch.float64) for column in columns]
    wrong = [k for k in range(len(timesteps_T)) if not all(bool(column[k].isfinite()) for column in tensors)]
    if wrong:
        raise ValueError(f"step {wrong[0] + 1} of {len(timesteps_T)} has coefficients that are not finite")
    a_T, b_T, s_T, d_T, e_T, signal_U, noise_U = tensors
    return ChainTable(timesteps_T, a_T, b_T, s_T, d_T, e_T, signal_U, noise_U, init_scale)


def only_posterior(rule: Rule, name: str) -> None:
    """Refuse a rule that is a flow model's."""
    if rule != "posterior":
        raise ValueError(f"rule {rule!r} is that of a flow model, and {name} is of another kind; take posterior")
