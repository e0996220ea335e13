"""What every section of an experiment is made of: a frozen model that knows its keys, and numbers that are numbers."""

from os.path import expanduser
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    model_validator,
)

Bool = StrictBool
"""true or false; 1 and "yes" are not."""
Int = StrictInt
"""A whole number; 1.0, true and "1" are not."""
Float = StrictFloat
"""A finite number, whole or not; true and "1" are not."""
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(expanduser)]
"""What may be a path; a ``~`` before it is spelt out here, for all who read it."""


def _empty_if_none(value: Any) -> Any:
    """A section without content, ``optim:``, is what YAML calls null; it means all defaults."""
    return {} if value is None else value


EmptyIfNone = BeforeValidator(_empty_if_none)
Options = Annotated[dict[str, Any], EmptyIfNone]
"""Free-form keyword arguments of something that a registry builds; its builder checks them."""


class StrictModel(BaseModel):
    """A section: frozen, without unknown keys or NaN. The docstring under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return _empty_if_none(value)
