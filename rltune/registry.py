"""Name -> builder. A module of the registry's package registers itself; looking a name up imports them all once.

An installed package registers builders of its own by an entry point that names a module, in the group that is called
as the registry's package: ``[project.entry-points."rltune.rewards"]`` with ``sharpness = "my_package.sharpness"``.
"""

import difflib
import importlib
import inspect
import logging
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from rltune.errors import UnknownNameError, UserError

T = TypeVar("T")
Builder = TypeVar("Builder", bound=Callable[..., Any])
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Within:
    """Bounds of a number, both included, in its type: ``Annotated[float, Within(0, 1)]``."""

    low: float
    high: float


@dataclass(frozen=True)
class Option:
    """One thing that a builder takes by keyword."""

    name: str
    type: Any
    """As the builder annotates it; ``Any`` where it does not, or in names that mean nothing here."""
    default: Any = None
    """None too where it is made anew at each call."""
    text: str = ""
    """What the builder's docstring says of it."""


class Registry(Generic[T]):
    """Builders of one kind of thing, by name.

    Args:
        kind: What is registered, for messages: ``"reward"``.
        package: Dotted package whose modules register builders when imported.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._builders: dict[str, Callable[..., T]] = {}
        self._is_loaded = False

    def register(self, name: str) -> Callable[[Builder], Builder]:
        """Return a decorator that files a builder under ``name``.

        A builder of the registry's own package takes the place of one from elsewhere, with a warning: a module from
        elsewhere may have been imported first.

        Raises:
            ValueError: The name is taken by another builder.
        """

        def decorate(builder: Builder) -> Builder:
            taken = self._builders.get(name)
            if taken is not None and (self._is_own(taken) or not self._is_own(builder)):
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            if taken is not None:
                logger.warning(
                    "%s %r of %s is not used: rltune has one of that name", self.kind, name, taken.__module__
                )
            self._builders[name] = builder
            return builder

        return decorate

    def names(self) -> tuple[str, ...]:
        """Return every known name, sorted."""
        self._load()
        return tuple(sorted(self._builders))

    def get(self, name: str) -> Callable[..., T]:
        """Return the builder of ``name``.

        Raises:
            UnknownNameError: Nothing is registered under it; the message lists what is.
        """
        self._load()
        if name not in self._builders:
            raise UnknownNameError(f"{self.kind} {name!r} is unknown; {suggest(name, self.names())}")
        return self._builders[name]

    def options(self, name: str) -> tuple[Option, ...]:
        """Return what the builder of ``name`` takes by keyword.

        Raises:
            UnknownNameError: As ``get``.
        """
        return options_of(self.get(name))

    def check(self, name: str, options: Mapping[str, Any]) -> None:
        """Check that ``name`` is known and takes ``options`` by keyword; builds nothing.

        Raises:
            UserError: The name or an option is unknown; the message lists the known ones.
        """
        takes = tuple(option.name for option in self.options(name))
        for option in options:
            if option not in takes:
                advice = suggest(option, takes) if takes else "it takes none"
                raise UserError(f"{self.kind} {name!r}: option {option!r} is unknown; {advice}")

    def build(self, name: str, options: Mapping[str, Any]) -> T:
        """Return what ``name`` stands for, built with ``options``.

        Raises:
            UserError: The name or an option is unknown, or the builder refuses a value.
        """
        self.check(name, options)
        return self.get(name)(**options)

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        for point in entry_points(group=self._package):
            try:
                point.load()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever another package does when imported
                logger.warning(
                    "the %s plug-in %r of %s (%s) is left out: %s: %s",
                    self.kind,
                    point.name,
                    point.dist.name if point.dist is not None else "an unknown package",
                    point.value,
                    type(error).__name__,
                    error,
                )

    def _is_own(self, builder: Callable[..., T]) -> bool:
        return builder.__module__.startswith(f"{self._package}.")


def options_of(builder: Callable[..., Any]) -> tuple[Option, ...]:
    """Return what a class or a function takes, with the texts of ``Args:`` or ``Attributes:`` in its docstring."""
    texts = _described(inspect.getdoc(builder) or "")
    try:
        takes = inspect.signature(builder, eval_str=True).parameters.values()
    except NameError:  # annotated with names that only a type checker imports
        takes = inspect.signature(builder).parameters.values()
    return tuple(
        Option(
            name=option.name,
            type=Any if isinstance(option.annotation, str) or option.annotation is option.empty else option.annotation,
            default=option.default if isinstance(option.default, str | int | float | tuple | list) else None,
            text=texts.get(option.name, ""),
        )
        for option in takes
    )


def _described(doc: str) -> dict[str, str]:
    """Return name -> text of the ``Args:`` and ``Attributes:`` of a docstring, each text on one line."""
    found: dict[str, str] = {}
    for part in re.findall(r"^(?:Args|Attributes):\n((?:(?: {4}.*)?\n?)*)", doc, flags=re.MULTILINE):
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", part, flags=re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def suggest(name: str, known: tuple[str, ...]) -> str:
    """Return advice for a name that is not among ``known``: the nearest one if it is near, and all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
