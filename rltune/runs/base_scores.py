"""What the base model scored: the reference of every figure of a run. Numbers alone; its images are not read.

P: prompts. N: images, prompt-major.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rltune.records import check_schema
from rltune.runs.metrics import OVER_PROMPTS, Unit, Values, summarise

NUMBERS_FILE = "base.json"


@dataclass(frozen=True)
class BaseScores:
    """Scores of the base model on the held-out set, and what they are counted in."""

    values: Mapping[str, Values]
    """Each reward and judge, ``(P,)``: the mean over each prompt's images."""
    units: Mapping[str, Unit] = field(default_factory=dict)
    """What each reward and judge is counted in; empty in runs of before."""
    image_values: Mapping[str, Values] = field(default_factory=dict)
    """Each reward's score of every image, ``(N,)``; empty in runs of before."""

    @property
    def summary(self) -> dict[str, float]:
        """``eval/NAME`` of each reward and judge, with standard errors, and gains of 0."""
        return summarise(self.values, self.values)

    @property
    def sizes(self) -> dict[str, float]:
        """Size of the unit of each reward and judge; as runs of before had it, where none was recorded."""
        of_before = {name: _spread(values_P) for name, values_P in self.values.items() if name not in self.units}
        return of_before | {name: unit.size for name, unit in self.units.items()}

    @property
    def unit_words(self) -> dict[str, str]:
        """What the unit of each reward and judge is."""
        return dict.fromkeys(self.values, OVER_PROMPTS) | {name: unit.what for name, unit in self.units.items()}


def _spread(values_P: Values) -> float:
    return (float(values_P.std(ddof=1)) if len(values_P) > 1 else 0.0) or 1.0


def read_numbers(folder: Path) -> dict[str, Any] | None:
    """Return what ``base.json`` says, or None where the base model was not measured yet.

    Raises:
        UserError: A newer version wrote it.
    """
    file = folder / NUMBERS_FILE
    if not file.is_file():
        return None
    numbers: dict[str, Any] = json.loads(file.read_text())
    check_schema(numbers, file)
    return numbers


def as_numbers(scores: BaseScores) -> dict[str, Any]:
    """Return scores in JSON's types, as ``base.json`` has them."""
    return {
        "values": {name: values_P.tolist() for name, values_P in scores.values.items()},
        "units": {name: asdict(unit) for name, unit in scores.units.items()},
        "image_values": {name: values_N.tolist() for name, values_N in scores.image_values.items()},
    }


def scores_of(numbers: Mapping[str, Any]) -> BaseScores:
    """Return the scores that ``base.json`` has."""
    return BaseScores(
        values={name: np.array(values_P) for name, values_P in numbers["values"].items()},
        units={name: Unit(unit["size"], unit["what"]) for name, unit in numbers.get("units", {}).items()},
        image_values={name: np.array(values_N) for name, values_N in numbers.get("image_values", {}).items()},
    )


def load_scores(folder: Path) -> BaseScores | None:
    """Return the base model's scores, or None where it was not measured yet.

    Raises:
        UserError: A newer version wrote them.
    """
    numbers = read_numbers(folder)
    return None if numbers is None else scores_of(numbers)
