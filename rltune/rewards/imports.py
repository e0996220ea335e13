"""Python objects that an experiment names as text: ``module:name``."""

import importlib
import os
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from rltune.errors import UserError


def load_object(reward: str, path: Any, *, option: str = "function") -> Callable[..., Any]:
    """Return the function or class that ``module:name`` stands for, imported as ``python -m`` would import it.

    Modules are found on ``sys.path``, and the current folder is put in front of it unless it is on it.

    Args:
        reward: Name of the reward, for messages.
        path: Both dotted names, ``package.module:Class.method``.
        option: Name of the reward's option that takes the path, for messages.

    Raises:
        UserError: It is written otherwise, cannot be imported, is not there, or cannot be called.
    """
    what = f"reward {reward!r}: {option} {path!r}"
    if not _is_path(path):
        raise UserError(f"reward {reward!r}: {option} must be 'module:name', as in 'my_scores:sharpness', got {path!r}")
    module_name, _, name = path.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is run
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{what}: there is no module {error.name!r}; start rltune in the folder that holds it ({folder} is the "
                "current one), install it, or add its folder to PYTHONPATH"
            ) from error
        raise UserError(
            f"{what}: importing {module_name!r} failed with {type(error).__name__}: {error}; see that 'python -c "
            f'"import {module_name}"\' works'
        ) from error
    try:
        found = attrgetter(name)(module)
    except AttributeError as error:
        raise UserError(
            f"{what}: module {module_name!r} ({getattr(module, '__file__', None)}) has no {name!r}; give the name of a "
            "function in it"
        ) from error
    if not callable(found):
        raise UserError(f"{what}: must be a function or a class, got {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _is_path(path: Any) -> bool:
    if not isinstance(path, str) or path.count(":") != 1:
        return False
    return all(part.isidentifier() for part in path.replace(":", ".").split("."))
