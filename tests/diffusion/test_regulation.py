"""The loss on maps of attention and its derivative, by PyTorch's own softmax and quantile and by finite differences."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rltune.diffusion.regulation import (
    Words,
    attention_losses,
    bumps,
    map_shape,
    regulate,
    slope_of_heights,
    split_logits,
)

CPU = torch.device("cpu")
B, N, L = 2, 3, 9
ROWS, COLUMNS = 6, 8
PLACES = [[1, 4, 5], [2]]


def logits(scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(B, N, ROWS * COLUMNS, L, generator=generator, dtype=torch.float64)


def own_loss(logits_BNPL: Tensor, w_BNGW: Tensor, bumps_PG: Tensor) -> Tensor:
    """An image and a head at a time, by softmax over all tokens and torch.quantile, without padding -> (B, N)."""
    rows = []
    for image, places in enumerate(PLACES):
        for head in range(N):
            heights_GW = w_BNGW[image, head, :, : len(places)]
            shifted_PL = logits_BNPL[image, head].index_add(1, torch.tensor(places), bumps_PG @ heights_GW)
            p_PW = shifted_PL.softmax(-1)[:, places]
            wanted = min(1, 0.2 * len(places)) / len(places)
            peak = (torch.quantile(p_PW, 0.9, dim=0) - 0.9).square().mean()
            rows.append(peak + 80 * (p_PW.mean(0) - wanted).square().mean() + 0.09 * heights_GW.square().mean())
    return torch.stack(rows).view(B, N)


def test_the_loss_is_that_of_softmax_and_quantile_of_each_image_s_own_words() -> None:
    words, zero = Words.of(PLACES, CPU), torch.zeros(B, N, 1, 3, dtype=torch.float64)
    found_BN = attention_losses(words.picked(logits().softmax(-1), 0.0), words)
    none_PG = torch.zeros(ROWS * COLUMNS, 1, dtype=torch.float64)
    torch.testing.assert_close(found_BN, own_loss(logits(), zero, none_PG), rtol=1e-6, atol=0)  # 0.2 in float32


def test_a_prompt_without_words_has_no_loss_and_no_edit() -> None:
    words = Words.of([[1, 2], []], CPU)
    bumps_PG = bumps(ROWS, COLUMNS, CPU, torch.float64)
    loss_BN = attention_losses(words.picked(logits().softmax(-1), 0.0), words)
    assert (loss_BN[0] > 0).all()
    assert (loss_BN[1] == 0).all()
    w_BNGW = regulate(logits(), words, bumps_PG, 3)
    assert w_BNGW[0].abs().max() > 0
    assert (w_BNGW[1] == 0).all()


def test_the_derivative_in_the_heights_is_that_of_finite_differences() -> None:
    words, bumps_PG = Words.of(PLACES, CPU), bumps(ROWS, COLUMNS, CPU, torch.float64)
    generator = torch.Generator().manual_seed(1)
    w_BNGW = torch.randn(B, N, bumps_PG.shape[1], 3, generator=generator, dtype=torch.float64)
    loss_BN, slope_BNGW = slope_of_heights(w_BNGW, *split_logits(logits(), words), words, bumps_PG)
    w_BNGW[1, :, :, 1:] = 0  # there are no such words
    # the wanted share is 0.2 in float32
    expected = own_loss(logits(), w_BNGW, bumps_PG)
    torch.testing.assert_close(loss_BN[0], expected[0], rtol=1e-6, atol=0)
    step = 1e-6
    for image, head, bump, word in [(0, 0, 0, 0), (0, 1, 3, 2), (0, 2, 5, 1), (1, 0, 2, 0), (1, 2, 4, 0)]:
        moved = torch.zeros_like(w_BNGW)
        moved[image, head, bump, word] = step
        above, below = (own_loss(logits(), w_BNGW + sign * moved, bumps_PG) for sign in (1, -1))
        difference_BN = (above - below) / (2 * step)
        assert slope_BNGW[image, head, bump, word].item() == pytest.approx(difference_BN[image, head].item(), rel=1e-5)
    absent = slope_of_heights(torch.zeros_like(w_BNGW), *split_logits(logits(), words), words, bumps_PG)[1][1, :, :, 1:]
    assert (absent == 0).all()


def test_no_iteration_is_no_edit_and_more_never_make_it_worse() -> None:
    words, bumps_PG = Words.of(PLACES, CPU), bumps(ROWS, COLUMNS, CPU, torch.float64)
    assert (regulate(logits(), words, bumps_PG, 0) == 0).all()
    losses = [own_loss(logits(), regulate(logits(), words, bumps_PG, count), bumps_PG) for count in (0, 1, 3, 20)]
    for fewer, more in pairwise(losses):
        assert (more <= fewer).all()
    assert (losses[-1] < 0.7 * losses[0]).all()


def test_what_an_image_gets_does_not_depend_on_its_batch() -> None:
    bumps_PG = bumps(ROWS, COLUMNS, CPU, torch.float64)
    together = regulate(logits(), Words.of(PLACES, CPU), bumps_PG, 5)
    for image, places in enumerate(PLACES):
        alone = regulate(logits()[image : image + 1], Words.of([places], CPU), bumps_PG, 5)
        torch.testing.assert_close(together[image : image + 1, :, :, : len(places)], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "count"), [(6, 8, 2 * 3), (16, 16, 7 * 7), (32, 32, 7 * 7), (2, 1, 1)])
def test_bumps_are_two_deviations_apart(rows: int, columns: int, count: int) -> None:
    std = max(1, min(rows, columns) // 16)
    bumps_PG = bumps(rows, columns, CPU, torch.float64)
    assert bumps_PG.shape == (rows * columns, count)
    assert bumps_PG.max() == 1
    if count > 1:
        first_RC = bumps_PG[:, 0].view(rows, columns)
        assert first_RC[2 * std, 2 * std] == 1
        away = (-torch.tensor(3.0**2 + 1, dtype=torch.float64) / (2 * std**2)).exp()
        torch.testing.assert_close(first_RC[2 * std + 3, 2 * std - 1], away)


def test_places_of_a_map_are_those_of_latents_halved_and_rounded_up() -> None:
    assert map_shape(64 * 48, 64, 48) == (64, 48)
    assert map_shape(8 * 6, 64, 48) == (8, 6)
    assert map_shape(3 * 5, 5, 9) == (3, 5)
    for places in (7, 0):
        with pytest.raises(ValueError, match=f"latents of 8 x 8 has {places} places"):
            map_shape(places, 8, 8)
