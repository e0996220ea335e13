"""What a build shows of itself: grids of pictures, and learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torchvision.utils import save_image

COLUMNS = 16


def save_pictures(path: Path, images_uint8: Tensor, *, columns: int = COLUMNS) -> None:
    """Write ``(N, 3, H, W)`` uint8 pictures as one PNG, row by row."""
    save_image(images_uint8.float() / 255, path, nrow=columns, padding=2, pad_value=1.0)


def plot_curve(path: Path, curve: Sequence[Mapping[str, float]], *, title: str) -> None:
    """Plot a learning curve: every column but ``step`` over ``step``, losses on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for row in curve for name in row if name != "step"):
        points = [(row["step"], row[name]) for row in curve if name in row]
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 50 else "", markersize=3, label=name)
    axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
