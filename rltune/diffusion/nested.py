"""Values in nested lists, tuples and dicts, as arguments and results of networks come."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def leaves(value: Any) -> Iterator[Any]:
    """Yield what is in nested lists, tuples and dicts, in order."""
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors among the leaves, in order."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return lists, tuples and dicts nested as they are, with each tensor changed, in order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [mapped(part, change) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value
