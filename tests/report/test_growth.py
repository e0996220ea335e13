from pathlib import Path

import numpy as np
import pytest

from rltune.report.gather import gather
from rltune.report.growth import growth
from rltune.runs.objectives import find_front
from tests.report.synthetic import FOUR, UNITS, asked, write_synthetic


@pytest.mark.parametrize("objectives", [FOUR[:1], FOUR[1:3], FOUR])
def test_it_is_the_hypervolume_of_every_prefix(tmp_path: Path, objectives: list[str]) -> None:
    experiment = asked(25, objectives)
    run = gather(write_synthetic(tmp_path / "mix", experiment, with_pictures=False), experiment)
    fronts = [find_front(run.results[:count], run.front.objectives, UNITS) for count in range(1, 27)]
    expected = [front.hypervolume for front in fronts if front is not None]
    assert growth(run).volumes == pytest.approx(expected, rel=1e-12)
    assert growth(run).volumes[-1] == pytest.approx(run.searched.hypervolume, rel=1e-12)


def test_worker_seconds_are_those_of_all_slots(tmp_path: Path) -> None:
    experiment = asked(8, FOUR[:2])
    folder = write_synthetic(tmp_path / "mix", experiment, with_pictures=False)
    spent = growth(gather(folder, experiment)).spent_s
    assert spent is not None
    assert np.allclose(spent[1:], [2.0 * second for second in range(1, 9)])  # a trial a second, two slots
    folder.events_file.unlink()
    assert growth(gather(folder, experiment)).spent_s is None
