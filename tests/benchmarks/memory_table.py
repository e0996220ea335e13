"""Write the tables of ``docs/memory.md``: python tests/benchmarks/memory_table.py

Everything is counted on networks without values: no weights, no GPU, some minutes.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rltune.config.experiment import RunConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.memory import GIB
from rltune.training.forecast import DTYPES, Forecast, counts_of, forecast
from tests.benchmarks.architectures import Architecture, architectures

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
MARKER = "<!-- Everything below is written by: python tests/benchmarks/memory_table.py -->\n"
RANK = 16
CARDS = {24: 23.5, 48: 47.0, 80: 79.0, 141: 139.0}
"""GB on the box of a card -> GiB that can be used of it."""
STORED = [
    "| model | image (px) | parameters (M) | adapters (M) | weights (GiB) | a step stores (GiB) "
    "| with blocks in checkpoints (GiB) | largest block (GiB) |",
    "|---|---|---|---|---|---|---|---|",
]
PEAKS = [
    "| model | image (px) | no checkpoints inside a step (GiB) | blocks (GiB) | blocks and tiles (GiB) | card (GB) |",
    "|---|---|---|---|---|---|",
]


def config_of(architecture: Architecture, px: int, **resources: Any) -> RunConfig:
    """One image at a time, scored by a CLIP of size H."""
    return RunConfig.model_validate(
        {
            "rewards": {"hpsv2": {}},
            "evaluate": {"judges": []},
            "model": {"lora": {"rank": RANK}},
            "sampler": {"height": px, "width": px, "guidance": architecture.guidance},
            "optim": {"batch": 1},
            "resources": {"precision": "bf16", **resources},
        }
    )


def look(architecture: Architecture, model: ModelFamily, px: int, **resources: Any) -> Forecast:
    return forecast(config_of(architecture, px, **resources), model, precision="bf16")


def lines(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """Yield a line of each table for every image size of a model."""
    model = architecture.family()
    branches = " (two branches)" if architecture.guidance > 1 else ""
    for px in architecture.px:
        config = config_of(architecture, px, decoder_tiles=False)
        counts = counts_of(config, model, DTYPES["bf16"])
        step = counts.step
        sizes = [f"{size / GIB:.2f}" for size in (step.plain, step.outside, step.largest)]
        cells = [
            f"{architecture.name}{branches}",
            px,
            f"{counts.num_parameters / 1e6:.0f}",
            f"{counts.num_adapted / 1e6:.1f}",
            f"{counts.network / GIB:.1f}",
            *sizes,
        ]
        plain = look(architecture, model, px, checkpoint_blocks=False, decoder_tiles=False).peak_gib
        nested = look(architecture, model, px, checkpoint_blocks=True, decoder_tiles=False).peak_gib
        tiled = look(architecture, model, px, checkpoint_blocks=True, decoder_tiles=True).peak_gib if px > 512 else None
        least = nested if tiled is None else tiled
        card = next((str(card) for card, usable in CARDS.items() if least <= usable), "none")
        peaks = [f"{plain:.1f}", f"{nested:.1f}", "-" if tiled is None else f"{tiled:.1f}", card]
        yield _row(cells), _row([architecture.name, px, *peaks])


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def tables(found: dict[str, Architecture]) -> str:
    """Return both tables of some architectures."""
    stored, peaks = list(STORED), list(PEAKS)
    for architecture in found.values():
        for first, second in lines(architecture):
            stored.append(first)
            peaks.append(second)
            print(first, second, sep="\n", flush=True)
    return "\n".join(["## What a network call stores", "", *stored, "", "## What a worker takes", "", *peaks, ""])


def main() -> None:
    """Bring the page up to date."""
    logging.disable(logging.WARNING)
    head, marker, _ = PAGE.read_text().partition(MARKER)
    assert marker, f"{PAGE} lacks the line {MARKER}"
    PAGE.write_text(head + MARKER + "\n" + tables(architectures()))


if __name__ == "__main__":
    main()
