"""The measured figures as the tables that the model card quotes."""

from collections.abc import Mapping

from rltune.builtin.measure import MEASURES

_LABELS: Mapping[str, str] = {
    "exact": "everything right",
    "ground": "ground",
    "one_color": "one group: colour",
    "one_count": "one group: count",
    "one_shape": "one group: shape",
    "one_all": "one group: all three",
    "two_colors": "two groups: both colours",
    "two_all": "two groups: all of both",
}
_SETS = ("samples", "reconstructions", "renders", "shuffled")


def figure_tables(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: what the judge reads in each set of pictures, then every stage's own figures."""
    lines = [
        "| share of pictures | samples | 95 % interval | reconstructions | renders | shuffled |",
        "|---|---|---|---|---|---|",
    ]
    for name in MEASURES:
        low, high = (figures["samples"][f"{name}_{end}"] for end in ("low", "high"))
        shares = [f"{figures[kind][name]:.3f}" for kind in _SETS]
        lines.append(f"| {_LABELS[name]} | {shares[0]} | {low:.3f} to {high:.3f} | {' | '.join(shares[1:])} |")
    lines += ["", "| score of the shipped reward models | samples | | reconstructions | renders | shuffled |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in ("alignment", "aesthetic"):
        scores = [f"{figures[kind][name]:.3f}" for kind in _SETS]
        lines.append(f"| {name} | {scores[0]} | | {' | '.join(scores[1:])} |")
    lines += ["", "| stage | figures on held-out scenes |", "|---|---|"]
    for stage, values in figures.items():
        if stage not in _SETS:
            lines.append(f"| {stage} | {', '.join(f'{name} {_show(value)}' for name, value in values.items())} |")
    return "\n".join(lines)


def _show(value: float) -> str:
    return f"{value:.4g}" if value < 10_000 else f"{value:,.0f}"
