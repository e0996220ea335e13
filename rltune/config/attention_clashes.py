"""What does not go together with an edit, or a loss, of cross-attention."""

from collections.abc import Iterator

from rltune.config.rules import Clash
from rltune.config.settings import Settings


def attention_clashes(config: Settings) -> Iterator[Clash]:
    """Yield what keeps cross-attention from being edited, or its maps from being seen."""
    section, num_steps = config.sampler.attention, config.sampler.steps
    strength, weight = "sampler.attention.strength", "regularize.attention"
    if section.is_on and num_steps is not None and round(section.steps * num_steps) == 0:
        what = f"leaves none of the {num_steps} steps (sampler.steps) to be edited, got {section.steps:g}"
        yield Clash("sampler.attention.steps", what, f"raise it, or write {strength}: 0", ("sampler.steps", strength))
    if config.resources.compile and (section.is_on or config.regularize.attention > 0):
        what = f"{strength if section.is_on else weight} reads maps of attention, which compiled blocks do not show"
        yield Clash("resources.compile", f"{what}, got true", "delete one of them", (strength, weight))
