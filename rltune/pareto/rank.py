"""One order for points of several objectives, best first: by front, and within a front spread out over it.

Larger is better in every objective. N: points. D: objectives.
"""

import numpy as np
import numpy.typing as npt

from rltune.pareto.front import as_points, ranks


def epsilon_net(values_ND: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Return the rows, ``(N,)``, in an order in which every first few are spread out over all of them.

    The greedy epsilon-net of MO-ASHA (Schmucker et al. 2021, arXiv:2106.12639): next comes the row that is furthest
    from those before it. Distances are Euclidean after each objective is scaled to [0, 1] over the rows, which the
    paper leaves open: in raw units the objective with the largest numbers would decide alone. An objective that does
    not vary plays no part.

    It starts with the best compromise, the largest sum of scaled objectives, so that the order in which objectives
    are named does not matter. Ties go to the earlier row.

    Raises:
        ValueError: ``values_ND`` is not a matrix of finite numbers with at least one column.
    """
    points_ND = as_points(values_ND)
    if len(points_ND) == 0:
        return np.zeros(0, dtype=np.intp)
    low_D, high_D = points_ND.min(axis=0), points_ND.max(axis=0)
    range_D = np.where(high_D > low_D, high_D - low_D, 1.0)
    scaled_ND = (points_ND - low_D) / range_D
    # rounded, or errors of 1e-16 would decide between rows that are as good
    order = [int(np.round(scaled_ND.sum(axis=1), 12).argmax())]
    gap_N = np.full(len(points_ND), np.inf)
    while len(order) < len(points_ND):
        gap_N = np.minimum(gap_N, np.round(np.linalg.norm(scaled_ND - scaled_ND[order[-1]], axis=1), 12))
        gap_N[order] = -1.0
        order.append(int(gap_N.argmax()))
    return np.array(order, dtype=np.intp)


def total_rank(values_ND: npt.ArrayLike, violation_N: npt.ArrayLike | None = None) -> npt.NDArray[np.intp]:
    """Return each point's place, ``(N,)``: 0 is the best, every place is given once.

    Feasible points come first, by front and within a front by its epsilon-net; behind all of them those that break
    constraints, the least violation first (constrained domination, Deb et al. 2002, section VI). Ties go to the
    earlier row.

    Args:
        values_ND: The points.
        violation_N: By how much each breaks its constraints in all; up to 0 where they hold. Left out, they all hold.

    Raises:
        ValueError: ``values_ND`` is not a matrix of finite numbers, or there is not one violation a point.
    """
    points_ND = as_points(values_ND)
    violation = np.zeros(len(points_ND)) if violation_N is None else np.asarray(violation_N, dtype=np.float64)
    if violation.shape != (len(points_ND),) or np.isnan(violation).any():
        raise ValueError(f"violation must be {len(points_ND)} numbers, got {violation.tolist()}")
    feasible = np.flatnonzero(violation <= 0)
    front_N = ranks(points_ND[feasible])
    order: list[int] = []
    for front in range(int(front_N.max(initial=-1)) + 1):
        rows = feasible[front_N == front]
        order += rows[epsilon_net(points_ND[rows])].tolist()
    broken = np.flatnonzero(violation > 0)
    order += broken[np.argsort(violation[broken], kind="stable")].tolist()
    place_N = np.empty(len(points_ND), dtype=np.intp)
    place_N[order] = np.arange(len(points_ND))
    return place_N
