"""What a kind of adapter does not go together with."""

from collections.abc import Iterator

from rltune.config.rules import Clash, Known
from rltune.config.settings import Settings

MIXED = ("sum", "chebyshev")
"""Methods of mixtures that every image may have weights of its own in."""


def adapter_clashes(config: Settings, known: Known) -> Iterator[Clash]:
    """Yield what keeps a basis of LoRAs from being trained."""
    kind, section = "model.adapter.kind", config.model.basis
    if config.model.adapter.kind != "basis":
        return
    if section.corners + section.centre > 1:
        what = f"with model.basis.corners, {section.corners:g}, it must be 1 at most, got {section.centre:g}"
        yield Clash("model.basis.centre", what, "lower it", ("model.basis.corners", kind))
    if config.estimator.name in known.policy_estimators:
        what = f"a basis weighs the rewards of every image in a gradient, which {config.estimator.name} does not take"
        yield Clash(kind, f"{what}, got basis", "take an estimator that backpropagates, or lora", ("estimator.name",))
    if config.mixture.method not in MIXED:
        what = f"of a basis every image has weights of its own, got {config.mixture.method}"
        yield Clash("mixture.method", what, f"write {' or '.join(MIXED)}", (kind,))
    if len(config.trained_rewards) == 1:
        what = (
            f"has a LoRA for each reward of positive weight, and {config.trained_rewards[0]} is the only one, got basis"
        )
        others = tuple(f"rewards.{name}.weight" for name in config.rewards)
        yield Clash(kind, what, "give a second reward a weight, or take lora", others)
    if config.model.lora.dora:
        what = "the effect of DoRAs is no sum by weights, which a basis is, got true"
        yield Clash("model.lora.dora", what, "delete it", (kind,))
    if config.model.lora.start is not None:
        what = f"a basis starts fresh, got {config.model.lora.start!r}"
        yield Clash("model.lora.start", what, "delete it", (kind,))
    if config.resources.compile:
        what = "a basis weighs layers image by image, which compiled blocks do not see, got true"
        yield Clash("resources.compile", what, "delete it", (kind,))
