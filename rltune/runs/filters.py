"""Which trials of a finished run a reader wants to see: conditions such as ``diversity > 0.8`` or ``rank >= 4``."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltune.errors import UserError
from rltune.registry import suggest
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.results import TrialResult

OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
PATTERN = re.compile(rf"\s*([\w./-]+?)\s*({'|'.join(OPERATORS)})\s*(\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """A comparison of one of a trial's numbers, or of a setting, with a value."""

    text: str
    """As the user wrote it."""
    name: str
    compare: Callable[[Any, Any], bool]
    value: float | str

    def holds(self, result: TrialResult) -> bool:
        """Return whether a trial meets it; one that has no such number or setting does not."""
        found = numbers_of(result).get(self.name)
        if found is None or isinstance(found, str) != isinstance(self.value, str):
            return self.compare is operator.ne and found is not None
        return bool(self.compare(found, self.value))


def numbers_of(result: TrialResult) -> dict[str, Any]:
    """Return what a condition may name of a trial: values of rewards and judges, gains, and settings.

    A setting has its whole dotted path, and its last part where no other ends in it.
    """
    metrics = {key.removeprefix("eval/"): value for key, value in result.metrics.items() if not key.endswith("_se")}
    ends = [path.rpartition(".")[2] for path in result.values]
    short = {end: value for end, value in zip(ends, result.values.values(), strict=True) if ends.count(end) == 1}
    return short | dict(result.values) | metrics


def parse_condition(text: str, results: Sequence[TrialResult]) -> Condition:
    """Read a condition on the trials of a run.

    Raises:
        UserError: It is none, or names nothing that a trial of the run has.
    """
    match = PATTERN.fullmatch(text)
    if match is None:
        raise UserError(f"--where: must be a name, a comparison and a value, got {text!r}; write 'diversity > 0.8'")
    name, sign, value = match.groups()
    known = {key: value for result in results for key, value in numbers_of(result).items()}
    if name not in known:
        raise UserError(f"--where: no trial has {name!r}; {suggest(name, tuple(known))}")
    number = _number(value)
    is_text = isinstance(known[name], str)
    if (number is None) != is_text or (is_text and sign not in ("=", "==", "!=")):
        example = f"{name} == {known[name]}" if is_text else f"{name} {sign} 0.5"
        raise UserError(f"--where: {name} is {'a word' if is_text else 'a number'}, got {text!r}; write '{example}'")
    return Condition(text.strip(), name, OPERATORS[sign], value if number is None else number)


def keep(results: Sequence[TrialResult], conditions: Sequence[Condition]) -> list[TrialResult]:
    """Return the trials that meet all conditions, and the base model, which all others are compared with."""
    return [
        result
        for result in results
        if result.trial == BASE_TRIAL or all(condition.holds(result) for condition in conditions)
    ]


def _number(text: str) -> float | None:
    try:
        return float({"true": "1", "false": "0"}.get(text.lower(), text))
    except ValueError:
        return None
