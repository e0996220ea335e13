"""A whole experiment, every value concrete and all of them together right; the rules are in ``clashes.py``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from rltune.config.clashes import find_clashes
from rltune.config.rules import Known
from rltune.config.settings import Settings

WHOLE_SWEEP = (
    "name",
    "task",
    "model.base",
    "model.revision",
    "model.config",
    "model.drop",
    "prompts.eval",
    "prompts.masks",
    "evaluate",
    "objectives",
    "constraints",
    "search",
    "stop",
    "sweep",
    "resources",
    "track",
)
"""What all trials share, or they could not be compared: no distribution may stand here or below."""


@dataclass(frozen=True)
class Context:
    """What a validation may look at besides the experiment: pydantic's ``context``."""

    known: Known = field(default_factory=Known)
    must_find_files: bool = False
    """Check that prompt files exist; only where the user is, a worker may run elsewhere."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Dotted path, a section and a key -> what a setting is that the experiment leaves open."""


class RunConfig(Settings):
    """An experiment in which every value is concrete: one training run."""

    @model_validator(mode="before")
    @classmethod
    def _open_settings(cls, value: Any, info: ValidationInfo) -> Any:
        context = info.context if isinstance(info.context, Context) else Context()
        for path, default in context.defaults.items() if isinstance(value, Mapping) else ():
            section, key = path.split(".")
            given = value.get(section) or {}  # what is no section is a fault of its own
            if isinstance(given, Mapping) and given.get(key) is None:
                value = {**value, section: {**given, key: default}}
        return value

    @model_validator(mode="after")
    def _sections_fit(self, info: ValidationInfo) -> Self:
        context = info.context if isinstance(info.context, Context) else Context()
        clashes = find_clashes(self, context.known, must_find_files=context.must_find_files)
        if clashes:
            text = "\n".join(f"{clash.where}: {clash.what}; {clash.remedy}" for clash in clashes)
            raise PydanticCustomError("clash", "{text}", {"text": text, "clashes": clashes})
        return self
