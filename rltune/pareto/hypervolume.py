"""How much a front covers: the volume between it and a reference point. Larger is better in every objective.

N: points. D: objectives.
"""

import numpy as np
import numpy.typing as npt

from rltune.pareto.front import Array, as_points, non_dominated


def reference_point(base_D: npt.ArrayLike, scale_D: npt.ArrayLike) -> Array:
    """Return the point that hypervolumes of a run are measured from: base model minus one standard deviation.

    It is declared before the run and from the base model alone, so that runs from the same base compare, and no trial
    moves it. One deviation below, since at the base's own values a trial that pays a little of one reward for much of
    another would count nothing, and since the base itself then covers a volume to compare with.

    Args:
        base_D: The base model's mean of every objective.
        scale_D: The standard deviation of the base model's scores of single images.

    Raises:
        ValueError: A number is not finite, a deviation is negative, or the lengths differ.
    """
    base, scale = as_points(np.asarray(base_D)[None])[0], as_points(np.asarray(scale_D)[None])[0]
    if base.shape != scale.shape or (scale < 0).any():
        raise ValueError(f"scale must be {base.size} numbers >= 0, got {scale.tolist()}")
    reference_D: Array = base - scale
    return reference_D


def hypervolume(values_ND: npt.ArrayLike, reference_D: npt.ArrayLike) -> float:
    """Return the exact volume of what the points dominate above ``reference_D``, in the product of the units.

    Points that do not exceed the reference in every objective add nothing; no points have volume 0. Exponential in D
    (a few hundred points are quick up to D = 4).

    Raises:
        ValueError: The values are not a matrix of finite numbers, or the reference has not one number a column.
    """
    points_ND, reference = as_points(values_ND), as_points(np.asarray(reference_D)[None])[0]
    if points_ND.shape[1] != reference.size:
        raise ValueError(f"reference must have {points_ND.shape[1]} numbers, got {reference.size}")
    above_ND = points_ND - reference
    return _volume(above_ND[(above_ND > 0).all(axis=1)])


def _volume(points_ND: Array) -> float:
    """Return the volume of the union of the boxes from 0 to each point; all coordinates are >= 0.

    Two objectives are swept. For more, this is WFG (While, Bradstreet and Barone 2012): the sum, over the points, of
    what each covers and the later ones do not. In order of the last objective, smallest first, every later box reaches
    at least as high as the point's own, so that what is not covered is a prism over D - 1 objectives.
    """
    if len(points_ND) == 0:
        return 0.0
    if points_ND.shape[1] == 1:
        return float(points_ND.max())
    if points_ND.shape[1] == 2:
        swept = points_ND[np.argsort(-points_ND[:, 0], kind="stable")]
        heights = np.maximum.accumulate(swept[:, 1])
        return float((swept[:, 0] * np.diff(heights, prepend=0.0)).sum())
    front = np.unique(points_ND[non_dominated(points_ND)], axis=0)
    front = front[np.argsort(front[:, -1], kind="stable")]
    volume = 0.0
    for i, point_D in enumerate(front):
        shared = np.minimum(front[i + 1 :, :-1], point_D[:-1])
        volume += float(point_D[-1]) * (float(point_D[:-1].prod()) - _volume(shared))
    return volume
