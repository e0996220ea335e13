"""What belongs to some kinds of adapters alone, where several are searched."""

from collections.abc import Iterator, Mapping
from typing import Any

from rltune.config.conditions import Space, ancestors
from rltune.config.distributions import Choice, show
from rltune.config.yamlfile import Path

KIND: Path = ("model", "adapter", "kind")
TRAINED = ("lora", "basis", "conditioning")
OF: Mapping[Path, tuple[str, ...]] = {
    ("model", "lora"): ("lora", "basis"),
    ("model", "basis"): ("basis",),
    ("model", "conditioning"): ("conditioning",),
    ("model", "prompt"): ("prompt",),
    ("optim",): TRAINED,
    ("estimator",): TRAINED,
    ("regularize",): TRAINED,
}
"""Section -> the kinds that read it. A kind that is not among these is taken to read all."""
NO_LORA = ("conditioning", "prompt")
"""What none is trained by."""
KNOWN = {kind for kinds in OF.values() for kind in kinds}


def without_lora(data: dict[str, Any], values: Mapping[Path, Any]) -> None:
    """Leave out what is said of LoRAs where a kind was chosen, among others, that trains none."""
    if values.get(KIND) in NO_LORA:
        data["model"].pop("lora", None)


def faults_of_kinds(space: Space) -> Iterator[tuple[Path, str, str]]:
    """Yield what is searched for a kind that does not read it: its trials would differ in nothing."""
    searched = space.get(KIND)
    if not isinstance(searched, Choice):
        return
    name = ".".join(KIND)
    for path in space:
        readers = next((kinds for section, kinds in OF.items() if path[: len(section)] == section), None)
        others = [] if readers is None else [kind for kind in searched.options if kind in KNOWN - set(readers)]
        for one in (path, *ancestors(space, path)):
            for parent, options in space[one].when:
                others = [kind for kind in others if parent != KIND or kind in options]
        if others:
            left = [str(kind) for kind in searched.options if kind not in KNOWN or kind in (readers or ())]
            wanted = left[0] if len(left) == 1 else f"[{', '.join(left)}]"
            what = f"{name} {show(others[0])} does not read it, for which it is searched too"
            yield path, what, f"add when: {{{name}: {wanted}}}" if left else "delete it"
