"""The point of a front where a little more of one objective starts to cost much of another.

N: points. D: objectives.
"""

import numpy as np
import numpy.typing as npt

from rltune.pareto.front import Array, as_points, non_dominated


def knee(values_ND: npt.ArrayLike) -> int:
    """Return the row of the knee: the point of the front that lies furthest out from the plane through its extremes.

    Larger is better. Objectives are first scaled to [0, 1] over the front. The extremes are the points that are best in
    one objective each; with two objectives the plane is the chord between the ends. Distance is counted towards better
    values, so that a front that bends inwards has its knee at an end. See Das, "On characterizing the knee of the
    Pareto curve" (1999), whose plane is the same. Where more than two objectives have extremes that coincide, or that
    lie so that the plane slopes up, the plane through the unit points is used.

    One objective: the best point. Ties, copies among them, go to the first row.

    Raises:
        ValueError: There are no points, or they are not a matrix of finite numbers.
    """
    points_ND = as_points(values_ND)
    if len(points_ND) == 0:
        raise ValueError("a knee needs at least one point, got none")
    rows = np.flatnonzero(non_dominated(points_ND))
    front = points_ND[rows]
    low_D, high_D = front.min(axis=0), front.max(axis=0)
    varies_D = high_D > low_D
    if not varies_D.any():
        return int(rows[0])
    scaled = (front[:, varies_D] - low_D[varies_D]) / (high_D - low_D)[varies_D]
    normal_D = _normal(scaled)
    # Rounded, or the ends of a straight front would win or lose by an error of 1e-16.
    distance_N = np.round((scaled @ normal_D - 1) / np.linalg.norm(normal_D), 12)
    return int(rows[distance_N.argmax()])


def _normal(scaled_ND: Array) -> Array:
    """Return n of the plane ``n . x = 1`` through the extremes."""
    extremes_DD = scaled_ND[scaled_ND.argmax(axis=0)]
    if np.linalg.matrix_rank(extremes_DD) == len(extremes_DD):
        normal_D: Array = np.linalg.solve(extremes_DD, np.ones(len(extremes_DD)))
        if (normal_D > 0).all():
            return normal_D
    return np.ones(len(extremes_DD))
