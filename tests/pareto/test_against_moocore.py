"""Dominance, ranks, hypervolumes and attainment surfaces of thousands of random fronts, as moocore has them."""

import moocore
import numpy as np
import pytest

from rltune.pareto.attainment import attainment_surfaces
from rltune.pareto.front import non_dominated, ranks
from rltune.pareto.hypervolume import hypervolume


@pytest.mark.parametrize(
    ("num_objectives", "num_fronts"),
    [
        *((2, 200), (3, 100)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1000), (3, 1000), (4, 500), (5, 100))),
    ],
)
def test_fronts_and_volumes(num_objectives: int, num_fronts: int) -> None:
    rng = np.random.default_rng(num_objectives)
    for number in range(num_fronts):
        shape = (int(rng.integers(1, 25)), num_objectives)
        # whole numbers have ties and copies; a small power bends the front outwards, so that it has many points
        points_ND = (
            rng.integers(0, 5, shape).astype(float) if number % 3 == 0 else rng.random(shape) ** rng.choice([0.2, 1.0])
        )
        reference_D = np.full(num_objectives, rng.choice([-1.0, 0.0, 0.3]))
        expected = moocore.hypervolume(points_ND, ref=reference_D, maximise=True)
        assert hypervolume(points_ND, reference_D) == pytest.approx(expected, rel=1e-11)  # sums in another order
        is_front_N = moocore.is_nondominated(points_ND, maximise=True, keep_weakly=True)
        assert non_dominated(points_ND).tolist() == is_front_N.tolist()
        rank_N = moocore.pareto_rank(points_ND, maximise=True)
        assert ranks(points_ND).tolist() == (rank_N - rank_N.min()).tolist()


@pytest.mark.parametrize("num_objectives", [2, 3])
def test_attainment_surfaces(num_objectives: int) -> None:
    rng = np.random.default_rng(num_objectives)
    for num_fronts in (1, 2, 3, 5) * 20:
        shapes = [(int(rng.integers(1, 6)), num_objectives) for _ in range(num_fronts)]
        fronts = [rng.integers(0, 6, shape).astype(float) for shape in shapes]
        which_N = np.repeat(np.arange(num_fronts), [len(front_ND) for front_ND in fronts])
        found_ND = moocore.eaf(-np.concatenate(fronts), which_N)  # smaller is better there; last, the share of fronts
        for k, surface_ND in enumerate(attainment_surfaces(fronts), start=1):
            of_k_N = np.isclose(found_ND[:, -1], 100 * k / num_fronts)
            assert set(map(tuple, surface_ND)) == set(map(tuple, -found_ND[of_k_N, :num_objectives]))
