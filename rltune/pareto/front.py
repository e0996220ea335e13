"""Which points no other beats. Larger is better in every objective.

N: points. D: objectives.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def non_dominated(values_ND: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Return which points are on the front: ``(N,)`` booleans.

    A point dominates another if it is at least as good in every objective and better in one. Equal points do not
    dominate one another, so that all copies of a point on the front are on it.

    Raises:
        ValueError: ``values_ND`` is not a matrix of finite numbers with at least one column.
    """
    points_ND = as_points(values_ND)
    is_front_N = np.zeros(len(points_ND), dtype=np.bool_)
    # who dominates comes before in the order of a dictionary, largest first: the first of those left is on the front
    left = np.lexsort(-points_ND.T[::-1])
    while left.size:
        point_D, rest_ND = points_ND[left[0]], points_ND[left[1:]]
        is_front_N[left[0]] = True
        is_dominated = (rest_ND <= point_D).all(axis=1) & (rest_ND < point_D).any(axis=1)
        left = left[1:][~is_dominated]
    return is_front_N


def dominators(values_ND: npt.ArrayLike) -> list[int | None]:
    """Return for each point the first row that dominates it; None for those on the front.

    Raises:
        ValueError: ``values_ND`` is not a matrix of finite numbers with at least one column.
    """
    points_ND = as_points(values_ND)
    found: list[int | None] = []
    for point_D in points_ND:
        rows = np.flatnonzero((points_ND >= point_D).all(axis=1) & (points_ND > point_D).any(axis=1))
        found.append(int(rows[0]) if rows.size else None)
    return found


def ranks(values_ND: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Return each point's front, ``(N,)``: 0 on the front, 1 on the front of the rest without it, and so on.

    The fast non-dominated sorting of NSGA-II (Deb et al. 2002, section III-A): dominators are counted once, and a front
    that is taken away is taken off the counts.

    Raises:
        ValueError: ``values_ND`` is not a matrix of finite numbers with at least one column.
    """
    points_ND = as_points(values_ND)
    num = len(points_ND)
    is_as_good_NN, is_better_NN = np.ones((num, num), dtype=np.bool_), np.zeros((num, num), dtype=np.bool_)
    for column_N in points_ND.T:  # one objective at a time: (N, N, D) at once would be D times the memory
        is_as_good_NN &= column_N[:, None] >= column_N
        is_better_NN |= column_N[:, None] > column_N
    dominates_NN = is_as_good_NN & is_better_NN
    count_N = dominates_NN.sum(axis=0)
    rank_N = np.full(num, -1, dtype=np.intp)
    rank = 0
    while (is_front_N := (count_N == 0) & (rank_N < 0)).any():
        rank_N[is_front_N] = rank
        count_N = count_N - dominates_NN[is_front_N].sum(axis=0)
        rank += 1
    return rank_N


def as_points(values_ND: npt.ArrayLike) -> Array:
    """Return the values as a float64 matrix, one point a row.

    Raises:
        ValueError: They are not a matrix of finite numbers with at least one column.
    """
    points_ND = np.asarray(values_ND, dtype=np.float64)
    if points_ND.ndim != 2 or points_ND.shape[1] == 0:
        raise ValueError(f"values must be of shape (N, D) with D >= 1, got {points_ND.shape}")
    if not np.isfinite(points_ND).all():
        raise ValueError(f"values must be finite, got {points_ND[~np.isfinite(points_ND).all(axis=1)][0].tolist()}")
    return points_ND
