"""What Optuna asks of every sampler: its own test suite, on the surrogate without anything of ours around it."""

from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase

from rltune.search.surrogate import SurrogateSampler


class TestSurrogate(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: SurrogateSampler(seed=0)
