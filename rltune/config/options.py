"""The options of estimators and rewards as typed sections, made of what their builders take, and what breaks them."""

import math
import operator
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError, create_model

from rltune.config.distributions import show
from rltune.config.rules import Clash, Known, Section
from rltune.config.settings import Settings
from rltune.config.strict import Bool, Float, Int, StrictModel
from rltune.config.words import Node, known_keys, what_is_wrong
from rltune.registry import Option, Within, suggest

PLAIN: Mapping[Any, Any] = {bool: Bool, int: Int, float: Float, str: str, type(None): None}
"""Types that mean here what they mean in the sections of an experiment."""
IN_THE_SECTION = ("k", "draw", "std")
"""Options of estimators that have a place in the section ``estimator`` itself."""


class OptionsModel(StrictModel):
    """Options of something that a registry builds; their texts are its own.

    Pydantic would look for docstrings under the fields: in the source of every function on the stack, for seconds.
    """

    model_config = ConfigDict(use_attribute_docstrings=False)


def options_section(owner: str, options: Sequence[Option]) -> Section:
    """Return the section ``options`` of an estimator or a reward: a key an option, with its type, default and text.

    An option of a type that an experiment file cannot hold takes anything, and is left to the builder.
    """
    fields: dict[str, Any] = {}
    for i, option in enumerate(options):
        kind = _typed(option.type)
        is_told = option.default is not None or kind is Any or type(None) in get_args(kind)
        if isinstance(option.default, float) and not math.isfinite(option.default):  # which JSON has not
            is_told = False
        default: Any = {"default": option.default} if is_told else {"default_factory": dict}
        # under another name, since an option may be called as a method of the model is
        fields[f"option_{i}"] = (kind, Field(**default, alias=option.name, description=option.text or None))
    return create_model(f"Options of {owner}", __base__=OptionsModel, __doc__=f"Options of {owner}.", **fields)


def _typed(kind: Any) -> Any:
    """Return a builder's type as the sections have it: ``int`` is no true, ``float`` is finite."""
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and kind in PLAIN:
        return PLAIN[kind]
    if origin is Literal:
        return kind
    if origin is Annotated:
        inner, bounds = _typed(parts[0]), [part for part in parts[1:] if isinstance(part, Within)]
        is_bounded = bounds and inner in (Int, Float)
        return Annotated[inner, Field(ge=bounds[0].low, le=bounds[0].high)] if is_bounded else inner
    if origin in (Union, types.UnionType):
        kinds = [_typed(part) for part in parts]
        return Any if Any in kinds else reduce(operator.or_, kinds)
    if origin in (list, Sequence) or (origin is tuple and parts[-1] is ...):
        return list[_typed(parts[0])]  # type: ignore[misc]  # made while running
    if origin in (dict, Mapping):
        return dict[str, Any]  # what is in it is the builder's to say: it may be a secret, which no message shows
    return Any


def option_clashes(config: Settings, known: Known) -> Iterator[Clash]:
    """Yield every option of the estimator and the rewards that is unknown or of another type."""
    estimator = config.estimator
    section = known.estimator_options.get(estimator.name)
    if section is not None:
        yield from _faults("estimator.options", estimator.options, section, estimator.name, ("estimator.name",))
    for key in IN_THE_SECTION:
        value = getattr(estimator, key)
        if value is None:
            continue
        if key in estimator.options:
            what = f"is given beside estimator.{key} ({show(value)}), got {show(estimator.options[key])}"
            yield Clash(f"estimator.options.{key}", what, "delete one", (f"estimator.{key}",))
        if section is not None and key not in known_keys(node_of(section)):
            able = [name for name, other in known.estimator_options.items() if key in known_keys(node_of(other))]
            remedy = f"delete it, or take {' or '.join(able)}" if able else "delete it"
            what = f"{estimator.name} has no such setting, got {show(value)}"
            yield Clash(f"estimator.{key}", what, remedy, ("estimator.name",))
    for name, reward in config.rewards.items():
        kind, where = config.kind_of(name), f"rewards.{name}"
        if kind in known.reward_options:
            section = known.reward_options[kind]
            yield from _faults(f"{where}.options", reward.options, section, kind, (f"{where}.reward", where))


def _faults(
    where: str, options: Mapping[str, Any], section: Section, owner: str, others: tuple[str, ...]
) -> Iterator[Clash]:
    try:
        section.model_validate(options)
        return
    except ValidationError as error:
        wrong = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors(include_url=False))
    known = node_of(section).get("properties", {})
    for key in wrong:
        if key not in known:
            advice = suggest(key, tuple(known)) if known else "it takes none"
            yield Clash(f"{where}.{key}", f"{owner} has no such option, got {key!r}", advice, others)
        elif any(branch.get("type") == "object" for branch in known[key].get("anyOf", (known[key],))):
            what = f"must be a mapping, got {type(options[key]).__name__}"
            yield Clash(f"{where}.{key}", what, "write {name: value}", others)
        else:
            yield Clash(f"{where}.{key}", *what_is_wrong(known[key], options[key]), others)


@cache
def node_of(section: Section) -> Node:
    """Return the JSON schema of a section; not to be changed."""
    return section.model_json_schema()
