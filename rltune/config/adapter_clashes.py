"""What a kind of adapter does not go together with."""

import re
from collections.abc import Iterator

from rltune.config.model_section import LoraConfig
from rltune.config.rules import Clash, Known
from rltune.config.settings import Settings

MIXED = ("sum", "chebyshev")
"""Methods of mixtures that every image may have weights of its own in."""


PLACE = "{prompt}"
NAMES = re.compile(r"\{(\w+)\}")
"""Of what stands in a template."""


def adapter_clashes(config: Settings, known: Known) -> Iterator[Clash]:
    """Yield what the kind of adapter does not go together with."""
    if config.model.adapter.kind == "basis":
        yield from _basis_clashes(config, known)
    if config.model.adapter.kind == "conditioning":
        yield from _conditioning_clashes(config)
    if config.model.adapter.kind == "prompt":
        yield from _prompt_clashes(config)


def _prompt_clashes(config: Settings) -> Iterator[Clash]:
    """Yield what keeps words from being added to prompts."""
    kind, section = "model.adapter.kind", config.model.prompt
    if section.template.count(PLACE) != 1:
        what = f"must hold {PLACE} once, got {section.template!r}"
        yield Clash("model.prompt.template", what, f'write such as "{PLACE}, {{light}}"', (kind,))
    names = set(NAMES.findall(section.template)) - {PLACE[1:-1]}
    for name in sorted(names - section.words.keys()):
        what = f"names {name}, for which model.prompt.words has nothing, got {section.template!r}"
        others = (kind, f"model.prompt.words.{name}")
        yield Clash("model.prompt.template", what, f"add {name} to model.prompt.words", others)
    for name in sorted(section.words.keys() - names):
        what = f"stands nowhere in model.prompt.template, {section.template!r}, got {section.words[name]!r}"
        remedy = f"write {{{name}}} there, or delete it"
        yield Clash(f"model.prompt.words.{name}", what, remedy, (kind, "model.prompt.template"))
    for name, word in section.words.items():
        if NAMES.search(word):
            what = f"is a text of its own, and names in braces belong in the template, got {word!r}"
            yield Clash(f"model.prompt.words.{name}", what, "move it to model.prompt.template", (kind,))
    if config.sampler.base_steps:
        what = f"words are for all steps where {kind} is prompt, got sampler.base_steps {config.sampler.base_steps}"
        yield Clash("sampler.base_steps", what, "delete sampler.base_steps", (kind,))
    yield from _shifted_clashes(config, "model.prompt.template", section.template)
    yield from _no_lora_clashes(config)


def _conditioning_clashes(config: Settings) -> Iterator[Clash]:
    """Yield what keeps numbers that mix prompts from being trained."""
    kind, template = "model.adapter.kind", config.model.conditioning.styled
    if template.count(PLACE) != 1 or template.strip() == PLACE:
        what = f"must hold {PLACE} once, and words of style beside it, got {template!r}"
        yield Clash("model.conditioning.styled", what, f'write such as "{PLACE}, in warm light"', (kind,))
    yield from _shifted_clashes(config, "model.conditioning.styled", template)
    yield from _no_lora_clashes(config)


def _shifted_clashes(config: Settings, path: str, template: str) -> Iterator[Clash]:
    """Yield what a template does not go together with because of words before the prompt."""
    if template.startswith(PLACE):
        return
    for where, is_on in (
        ("sampler.attention.strength", config.sampler.attention.is_on),
        ("regularize.attention", config.regularize.attention > 0),
    ):
        if is_on:
            what = f"{where} looks for the prompt's words at their own places, which words before it shift"
            remedy = f"begin with {PLACE}, or set {where} to 0"
            yield Clash(path, f"{what}, got {template!r}", remedy, (where, "model.adapter.kind"))


def _no_lora_clashes(config: Settings) -> Iterator[Clash]:
    kind, own = "model.adapter.kind", LoraConfig()
    name_of_kind = config.model.adapter.kind
    for name in LoraConfig.model_fields:
        if (value := getattr(config.model.lora, name)) != getattr(own, name):
            what = f"no LoRA is trained where {kind} is {name_of_kind}, got {value!r}"
            yield Clash(f"model.lora.{name}", what, "delete it", (kind,))
    if config.sweep.soup:
        what = f"soups are sums of LoRAs, and none is trained where {kind} is {name_of_kind}, got sweep.soup true"
        yield Clash("sweep.soup", what, "delete sweep.soup", (kind,))


def _basis_clashes(config: Settings, known: Known) -> Iterator[Clash]:
    """Yield what keeps a basis of LoRAs from being trained."""
    kind, section = "model.adapter.kind", config.model.basis
    if section.corners + section.centre > 1:
        what = f"with model.basis.corners, {section.corners:g}, it must be 1 at most, got {section.centre:g}"
        yield Clash("model.basis.centre", what, "lower it", ("model.basis.corners", kind))
    if config.estimator.name in known.policy_estimators:
        what = f"a basis weighs the rewards of every image in a gradient, which {config.estimator.name} does not take"
        yield Clash(kind, f"{what}, got basis", "take an estimator that backpropagates, or lora", ("estimator.name",))
    if config.mixture.method not in MIXED:
        what = f"of a basis every image has weights of its own, got mixture.method {config.mixture.method}"
        yield Clash("mixture.method", what, f"write {' or '.join(MIXED)}", (kind,))
    if len(config.trained_rewards) == 1:
        what = (
            f"has a LoRA for each reward of positive weight, and {config.trained_rewards[0]} is the only one, got basis"
        )
        others = tuple(f"rewards.{name}.weight" for name in config.rewards)
        yield Clash(kind, what, "give a second reward a weight, or take lora", others)
    if config.model.lora.dora:
        what = "the effect of DoRAs is no sum by weights, which a basis is, got model.lora.dora true"
        yield Clash("model.lora.dora", what, "delete model.lora.dora", (kind,))
    if config.model.lora.start is not None:
        what = f"a basis starts fresh, got model.lora.start {config.model.lora.start!r}"
        yield Clash("model.lora.start", what, "delete model.lora.start", (kind,))
    if config.resources.compile:
        what = "a basis weighs layers image by image, which compiled blocks do not see, got resources.compile true"
        yield Clash("resources.compile", what, "delete resources.compile", (kind,))
