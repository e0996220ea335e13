import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rltune.runs.metrics import summarise
from rltune.training.evaluation import ImageSet, Samples, diversity, drift, per_prompt, save_grid


def flat_images(*levels: int) -> np.ndarray:
    return np.stack([np.full((4, 6, 3), level, np.uint8) for level in levels])


def test_diversity_is_the_mean_pairwise_distance_within_a_prompt() -> None:
    # flat images differ by their levels alone: prompt one |0 - 51|, |0 - 255|, |51 - 255|; prompt two all equal
    pixels = flat_images(0, 51, 255, 40, 40, 40)
    assert diversity(pixels, 3) == pytest.approx([(51 + 255 + 204) / 3 / 255, 0.0])


def test_diversity_of_single_images_is_zero() -> None:
    assert diversity(flat_images(0, 255), 1).tolist() == [0.0, 0.0]


def test_drift_is_the_distance_to_the_base_image_of_the_same_noise() -> None:
    assert drift(flat_images(51, 0, 10, 10), flat_images(0, 51, 10, 10), 2) == pytest.approx([0.2, 0.0])


def test_distances_are_root_mean_squares_over_pixels() -> None:
    pixels = flat_images(0, 0)
    pixels[1, :, :3] = 255  # half of the columns
    assert diversity(pixels, 2) == pytest.approx([0.5**0.5])


def test_summary_takes_the_prompt_as_the_unit() -> None:
    images = ImageSet(("a", "b"), 2, (4, 8, 8))
    samples = Samples(flat_images(0, 0, 0, 0), {"score": np.array([1.0, 3.0, 4.0, 8.0])})
    values = per_prompt(samples, Samples(samples.pixels_NHW3, {}), images, ["drift"], ["score"])
    summary = summarise(values, {"score": np.array([1.0, 4.0]), "drift": np.zeros(2)})
    assert summary["eval/score"] == 4.0  # prompt means 2 and 6
    assert summary["eval/score_se"] == pytest.approx(np.std([2.0, 6.0], ddof=1) / 2**0.5)
    assert summary["eval/drift"] == 0.0
    assert "eval/diversity" not in summary
    # paired by prompt: 2 - 1 and 6 - 4
    assert summary["gain/score"] == 1.5
    assert summary["gain/score_se"] == pytest.approx(np.std([1.0, 2.0], ddof=1) / 2**0.5)


def test_an_image_counts_where_it_beats_the_base_models_of_its_noise_in_every_objective() -> None:
    images = ImageSet(("a", "b"), 3, (4, 8, 8))
    ours = {"x": np.array([2.0, 2.0, 0.0, 0.0, 1.0, 5.0]), "y": np.array([2.0, 0.0, 0.0, 0.0, 2.0, 5.0])}
    base = Samples(flat_images(*[0] * 6), {"x": np.ones(6), "y": np.array([1.0, 1.0, 1.0, 1.0, 1.0, 4.0])})
    ours["watched"], base_watched = np.zeros(6), np.ones(6)  # no objective
    base = Samples(base.pixels_NHW3, {**base.values, "watched": base_watched})
    samples = Samples(base.pixels_NHW3, ours)
    # a: better in both, in one, worse in both; b: worse in both, a tie and a win, better in both
    values = per_prompt(samples, base, images, [], ["x", "diversity", "y"])
    assert values["domination"].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert values["collapse"].tolist() == pytest.approx([1 / 3, 1 / 3])
    alone = per_prompt(samples, base, images, [], ["x"])  # the tie in b is neither
    assert alone["domination"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert alone["collapse"].tolist() == pytest.approx([1 / 3, 1 / 3])
    itself = per_prompt(base, base, images, [], ["x", "y"])
    assert (itself["domination"].tolist(), itself["collapse"].tolist()) == ([0, 0], [0, 0])


def test_without_scores_of_images_nothing_is_said_of_them() -> None:
    images, scored = ImageSet(("a",), 2, (4, 8, 8)), Samples(flat_images(0, 1), {"x": np.array([1.0, 2.0])})
    of_before = Samples(scored.pixels_NHW3, {})
    for base, objectives in ((of_before, ["x"]), (scored, ["diversity", "drift"])):
        assert set(per_prompt(scored, base, images, ["diversity"], objectives)) == {"x", "diversity"}


def test_of_a_single_prompt_there_is_no_standard_error() -> None:
    summary = summarise({"score": np.array([1.0])}, {"score": np.array([0.5])})
    assert summary == {"eval/score": 1.0, "gain/score": 0.5}


def test_images_of_a_prompt_follow_each_other() -> None:
    images = ImageSet(("a", "b"), 3, (4, 8, 8))
    assert [images.prompt_of(i) for i in range(len(images))] == ["a", "a", "a", "b", "b", "b"]


def test_grid_is_filled_row_by_row(tmp_path: Path) -> None:
    save_grid(flat_images(10, 20, 30), tmp_path / "new" / "grid.png", columns=2)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (8, 12, 3)
    assert [grid[0, 0, 0], grid[0, 6, 0], grid[4, 0, 0], grid[4, 6, 0]] == [10, 20, 30, 255]


@pytest.mark.parametrize("each", [1, 2, 5, 9])
def test_a_prompt_at_a_time_gives_the_bits_of_all_at_once(each: int) -> None:
    pixels, base = np.random.default_rng(0).integers(0, 256, (2, 6 * each, 16, 24, 3), dtype=np.uint8)
    x, y = (images.reshape(6, each, -1).astype(np.float64) / 255 for images in (pixels, base))
    first, second = np.triu_indices(each, k=1)
    apart = np.sqrt(np.square(x[:, first] - x[:, second]).mean(axis=2)).mean(axis=1) if each > 1 else np.zeros(6)
    assert diversity(pixels, each).tolist() == apart.tolist()
    assert drift(pixels, base, each).tolist() == np.sqrt(np.square(x - y).mean(axis=2)).mean(axis=1).tolist()


def test_judging_many_images_takes_memory_for_one_prompt() -> None:
    pixels = np.zeros((64, 64, 64, 3), np.uint8)  # 0.8 MB, 6.3 MB in float64
    for judge in (lambda: diversity(pixels, 2), lambda: drift(pixels, pixels, 2)):
        tracemalloc.start()
        judge()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2e6  # a prompt's two images in float64 are 0.2 MB, with some copies
