"""Name -> builder. A module of the registry's package registers itself; looking a name up imports them all once."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from rltune.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Builders of one kind, by name.

    Args:
        kind: What is registered, for messages: ``"reward"``.
        package: Dotted package whose modules register builders when imported.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._builders: dict[str, T] = {}
        self._is_loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files a builder under ``name``.

        Raises:
            ValueError: The name is taken by another builder.
        """

        def decorate(builder: T) -> T:
            if name in self._builders:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._builders[name] = builder
            return builder

        return decorate

    def names(self) -> tuple[str, ...]:
        """Return every known name, sorted."""
        self._load()
        return tuple(sorted(self._builders))

    def get(self, name: str) -> T:
        """Return the builder of ``name``.

        Raises:
            UnknownNameError: Nothing is registered under it; the message lists what is.
        """
        self._load()
        if name not in self._builders:
            raise UnknownNameError(f"{self.kind} {name!r} is unknown; {suggest(name, self.names())}")
        return self._builders[name]

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")


def suggest(name: str, known: tuple[str, ...]) -> str:
    """Return advice for a name that is not among ``known``: the nearest one if it is near, and all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
