"""Which of a run's checkpoints counts: the last, or the best of those that keep every constraint."""

from collections.abc import Callable, Mapping

from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.runs.metrics import JUDGES, violations
from rltune.training.checkpoint import Evaluated, Selected


class Selection:
    """The evaluations of a run as far as they are remembered: the last, and what ``evaluate.select`` chose so far.

    Args:
        config: The experiment.
        base: ``eval/NAME`` of the base model, which itself is no candidate.
    """

    def __init__(self, config: RunConfig, base: Mapping[str, float]) -> None:
        self._config, self._base = config, base
        self.last: Evaluated | None = None
        self.selected: Selected | None = None
        """None where the last one counts."""

    @property
    def counted(self) -> Evaluated | None:
        """The evaluation whose metrics are reported."""
        return self.selected.evaluated if self.selected else self.last

    def resume(self, last: Evaluated | None, selected: Selected | None) -> None:
        """Go on from a checkpoint."""
        self.last, self.selected = last, selected

    def take(self, evaluated: Evaluated, adapter: Callable[[], Mapping[str, Tensor]]) -> None:
        """Take in an evaluation; ``adapter`` returns a copy of the adapters that gave it."""
        self.last = evaluated
        name = self._config.evaluate.select
        if name == "last" or any(bad > 0 for bad in violations(self._config, evaluated.metrics, self._base).values()):
            return
        if self.selected is None or self._value(name, evaluated) > self._value(name, self.selected.evaluated):
            self.selected = Selected(evaluated, adapter())

    def _value(self, name: str, evaluated: Evaluated) -> float:
        value = evaluated.metrics[f"eval/{name}"]
        return value if JUDGES.get(name, True) else -value
