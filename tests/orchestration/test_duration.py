"""How long a sweep may take: operations by hand, over a rate."""

from pathlib import Path

import pytest

from rltune.config.load import load_experiment
from rltune.diffusion.outline import find_pipeline, load_outline
from rltune.orchestration import duration
from rltune.orchestration.duration import PASSES, SHARES, START_S, foresee
from rltune.orchestration.nodes import Node
from rltune.orchestration.workload import work_out

CALL, DECODING, RATE = 1000, 100, 1e6
TEXT = """
rewards: {brightness: }
sampler: {steps: 6, guidance: 3.0}
estimator: {name: alignprop, k: {int: [2, 6]}, draw: DRAW}
optim: {steps: 4, batch: 3}
evaluate: {every: 2, prompts: 2, images_per_prompt: 2, judges: []}
search: {trials: 3}
resources: {workers: WORKERS, concurrent: 1}
"""


@pytest.mark.parametrize(("draw", "active"), [("fixed", (2, 6)), ("uniform", (1.5, 3.5))])
@pytest.mark.parametrize(("workers", "images", "evaluated"), [(1, 3, 4), (2, 2, 2)])
def test_a_range_from_the_cheapest_end_at_its_best_to_the_dearest_at_its_worst(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    draw: str,
    active: tuple[float, float],
    workers: int,
    images: int,
    evaluated: int,
) -> None:
    monkeypatch.setattr(duration, "matrix_rate", lambda dtype: RATE)
    monkeypatch.setattr(duration, "operations_an_image", lambda *_, **__: (CALL, DECODING))
    (tmp_path / "x.yaml").write_text(TEXT.replace("DRAW", draw).replace("WORKERS", str(workers)))
    experiment = load_experiment(tmp_path / "x.yaml")
    outline = load_outline(find_pipeline("builtin"), base="builtin")
    work = work_out(experiment, [Node(4.0, 0.0)])
    found = foresee(experiment, outline, work)
    drawn = 6 * CALL + DECODING
    for end in (0, 1):
        rate = SHARES[end] * RATE
        step = images * (drawn + PASSES[end] * (active[end] * CALL + DECODING))
        assert found.step_s[end] == pytest.approx(step / rate)
        trial = 4 * step + 2 * evaluated * drawn
        base = (4 + 32) * drawn
        assert found.total_s[end] == pytest.approx(START_S[end] + (base + 3 * trial) / rate)


def test_nothing_is_foreseen_of_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("rewards: {brightness: }")
    experiment = load_experiment(tmp_path / "x.yaml")
    outline = load_outline(find_pipeline("builtin"), base="builtin")
    assert foresee(experiment, outline, work_out(experiment, [Node(4.0, 1.0)])) is None
