"""What several fronts of the same experiment reach: everywhere, mostly, or once. Larger is better in every objective.

N: points. D: objectives.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rltune.pareto.front import Array, as_points, non_dominated


def attainment_surfaces(fronts: Sequence[npt.ArrayLike]) -> list[Array]:
    """Return the corners of what at least k fronts attain, ``(N, D)``, for k = 1 up to their number.

    A front attains what one of its points is at least as good as; the surface of what at least k of n attain is the
    k/n attainment surface (Fonseca and Fleming 1996). Exact: what k of the first i fronts attain is what k of those
    before attain, together with what the i-th and k - 1 of them have in common. No front attains more than its points;
    one without points attains nothing.

    Raises:
        ValueError: There is no front, or one is not a matrix of finite numbers with the columns of the others.
    """
    points = [as_points(front) for front in fronts]
    if len({front_ND.shape[1] for front_ND in points}) != 1:
        raise ValueError(f"fronts must be one at least, with as many columns each, got {[p.shape for p in points]}")
    nothing = points[0][:0]
    surfaces: list[Array] = []
    for front_ND in points:
        below = [front_ND, *(_common(surface_ND, front_ND) for surface_ND in surfaces)]
        surfaces = [_corners(np.concatenate(pair)) for pair in zip([*surfaces, nothing], below, strict=True)]
    return surfaces


def _common(first_ND: Array, second_ND: Array) -> Array:
    """Return corners of what both attain: of two boxes, the smaller of each coordinate."""
    corners: Array = np.minimum(first_ND[:, None], second_ND[None]).reshape(-1, first_ND.shape[1])
    return corners


def _corners(points_ND: Array) -> Array:
    """Return the points that count, without copies, in the order of their coordinates."""
    corners: Array = np.unique(points_ND[non_dominated(points_ND)], axis=0)
    return corners
