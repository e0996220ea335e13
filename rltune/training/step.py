"""The optimiser's step: sum gradients over workers, clip, update, clear; and the moving average of what it leaves."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rltune.errors import NonFiniteError
from rltune.estimators.base import Peers


class Updater:
    """The optimiser of the adapters as an estimator sees it, for one round.

    Args:
        parameters: The adapters.
        optimizer: Of them.
        peers: The workers of the run.
        max_grad_norm: Longer gradients are scaled down to this.
        may_vanish: Whether a gradient of exactly zero is always right: a reward that is capped.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        peers: Peers,
        *,
        max_grad_norm: float,
        may_vanish: bool = False,
    ) -> None:
        self._parameters, self._optimizer, self._peers = parameters, optimizer, peers
        self._max_grad_norm, self._may_vanish = max_grad_norm, may_vanish
        self.norms: list[float] = []
        """The global gradient norm before clipping, of every update."""

    def __call__(self, *, may_vanish: bool = False) -> None:
        """Update; ``may_vanish`` allows a gradient of exactly zero, which changes nothing then.

        Raises:
            NonFiniteError: The norm is not finite, or exactly zero without leave; nothing was updated.
        """
        self._peers.sum_gradients(self._parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        self.norms.append(norm)
        if norm == 0 and (may_vanish or self._may_vanish):
            self._optimizer.zero_grad(set_to_none=True)
            return
        if not 0 < norm < float("inf"):
            self._optimizer.zero_grad(set_to_none=True)
            what = "exactly zero: the reward does not depend on the images" if norm == 0 else f"{norm}"
            raise NonFiniteError(
                f"the gradient of the mixed reward is {what}; lower optim.lr or estimator.k, or leave out the reward "
                "that saturates"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class MovingAverage:
    """An exponential moving average of parameters, with the bias of its start taken out.

    After n updates the weight of round i's values is proportional to decay^(n - i), rounds 1..n: the first value is
    not counted for more than the others, as it is in averages that start from it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._sums = [torch.zeros_like(parameter) for parameter in parameters]
        self._weight = 0.0
        self._own: list[Tensor] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters' present values."""
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            total.mul_(self._decay).add_(parameter, alpha=1 - self._decay)
        self._weight = self._weight * self._decay + 1 - self._decay

    @torch.no_grad()
    def __enter__(self) -> None:
        """Put the average in the parameters' place."""
        self._own = [parameter.detach().clone() for parameter in self._parameters]
        if self._weight > 0:
            for total, parameter in zip(self._sums, self._parameters, strict=True):
                parameter.copy_(total / self._weight)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        """Put the parameters' own values back."""
        assert self._own is not None
        for own, parameter in zip(self._own, self._parameters, strict=True):
            parameter.copy_(own)
        self._own = None

    def state_dict(self) -> dict[str, object]:
        """Return the running sums and their weight."""
        return {"sums": self._sums, "weight": self._weight}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take over what ``state_dict`` returned."""
        sums, weight = state["sums"], state["weight"]
        assert isinstance(sums, list)
        assert isinstance(weight, float)
        for total, value in zip(self._sums, sums, strict=True):
            total.copy_(value)
        self._weight = weight
