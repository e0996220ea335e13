"""Which words of a prompt an image looks at: a loss on maps of cross-attention, and an edit of their logits against it.

After Attention Regulation (arXiv:2403.06381); ``regulate`` says in what it differs.

B: images. N: heads. P: places of a map, rows first. L: tokens. W: words of a prompt, as many as the longest has.
G: bumps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PEAK = 0.9
"""What a word is to have at one place in ten, and the quantile over places that is held against it."""
MASS_WEIGHT = 80.0
EDIT_WEIGHT = 0.09
RATE = 100.0
"""Length of a step of the inner optimisation, on maps of ``RATE_PLACES``."""
RATE_PLACES = 256
KEPT = 0.25
"""Share that the edit of the step before keeps in the moving average."""


@dataclass(frozen=True)
class Words:
    """The tokens of every prompt that are to be looked at."""

    index_BW: Tensor
    """Their places among the prompt's tokens; 0 where there are fewer."""
    is_there_BW: Tensor
    """Whether there is such a word."""

    @classmethod
    def of(cls, places: Sequence[Sequence[int]], device: torch.device) -> "Words":
        """Return the words of prompts, each given by the numbers of its tokens."""
        longest = max((1, *map(len, places)))
        index = [[*own, *[0] * (longest - len(own))] for own in places]
        is_there = [[True] * len(own) + [False] * (longest - len(own)) for own in places]
        return cls(torch.tensor(index, device=device), torch.tensor(is_there, device=device))

    @property
    def share_B11(self) -> Tensor:
        """Of the mean over a prompt's words, what one counts; float32."""
        return 1 / self.is_there_BW.sum(1).clamp(min=1).float().view(-1, 1, 1)

    @property
    def wanted_B11(self) -> Tensor:
        """Share of the attention that each word is to have: a fifth of all, or an equal part of all."""
        return self.share_B11.clamp(max=0.2)

    def picked(self, maps_BNPL: Tensor, absent: float) -> Tensor:
        """Return the words' columns of maps over all tokens, (B, N, P, W); ``absent`` where there is no word."""
        index_BNPW = self.index_BW[:, None, None].expand(*maps_BNPL.shape[:3], -1)
        return maps_BNPL.gather(-1, index_BNPW).masked_fill(~self.is_there_BW[:, None, None], absent)

    def spread(self, columns_BNPW: Tensor, num_tokens: int) -> Tensor:
        """Return maps over all tokens, (B, N, P, L), with these columns for the words and 0 for other tokens."""
        index_BNPW = self.index_BW[:, None, None].expand_as(columns_BNPW)
        maps_BNPL = columns_BNPW.new_zeros(*columns_BNPW.shape[:3], num_tokens)
        return maps_BNPL.scatter_add(-1, index_BNPW, columns_BNPW * self.is_there_BW[:, None, None])


def attention_losses(probs_BNPW: Tensor, words: Words) -> Tensor:
    """Return how far each head's attention is from words that are all looked at, (B, N); differentiable, 0 is best.

    The mean over words of (q - 0.9)^2 + 80 (m - min(1, 0.2 n) / n)^2: q the 0.9-quantile over places, m the mean over
    places of the attention that a word has, n the number of words.
    """
    q_BNW, _, _, _ = _quantiles(probs_BNPW)
    miss_BNW = (q_BNW - PEAK).square() + MASS_WEIGHT * (probs_BNPW.mean(2) - words.wanted_B11).square()
    return _mean(miss_BNW, words)


def map_shape(num_places: int, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of a map on latents of ``height`` x ``width`` that a UNet has halved some times.

    Raises:
        ValueError: No number of halvings gives so many places.
    """
    rows, columns = height, width
    while rows * columns > num_places:
        rows, columns = -(-rows // 2), -(-columns // 2)
        if rows * columns == 1:
            break
    if rows * columns != num_places:
        raise ValueError(f"no map of latents of {height} x {width} has {num_places} places")
    return rows, columns


def bumps(rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return Gaussian bumps on a map, (P, G): of deviation a sixteenth of its side or 1, and two of these apart."""
    std = max(1, min(rows, columns) // 16)
    y, x = (torch.arange(side, device=device, dtype=dtype) for side in (rows, columns))
    y_centres, x_centres = (_centres(side, std, device, dtype) for side in (rows, columns))
    y_RG, x_CG = (_bump(places, centres, std) for places, centres in ((y, y_centres), (x, x_centres)))
    return torch.einsum("ri,cj->rcij", y_RG, x_CG).reshape(rows * columns, -1)


def _centres(side: int, std: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor([*range(2 * std, side, 2 * std)] or [side // 2], device=device, dtype=dtype)


def _bump(places: Tensor, centres: Tensor, std: int) -> Tensor:
    return (-(places[:, None] - centres).square() / (2 * std**2)).exp()


def regulate(logits_BNPL: Tensor, words: Words, bumps_PG: Tensor, iterations: int) -> Tensor:
    """Return heights w of the bumps that, added to the words' logits, lower the loss, (B, N, G, W); no gradient.

    Gradient descent on ``attention_losses`` + 0.09 mean(w^2), for each image and head by itself, by the derivative in
    closed form (``slope_of_heights``), so that nothing is recorded for autograd. The best of all iterates counts.

    Different from the published code (YaNgZhAnG-V5/attention_regulation): w starts at 0 and not at random, and is never
    worse than that; the best iterate is each head's own; the step is in proportion to the map's size, the published 100
    at 16 x 16; and the attention to the start and end of the text is what softmax leaves them, where there it is put
    back as it was.

    Args:
        logits_BNPL: Of the layer, float32 or float64.
        words: To be looked at.
        bumps_PG: On the layer's map.
        iterations: Steps of the descent; with 0 the heights are 0.
    """
    logits_BNPL = logits_BNPL.detach()
    words_BNPW, rest_BNP1 = split_logits(logits_BNPL, words)
    rate = RATE * len(bumps_PG) / RATE_PLACES
    shape = (*logits_BNPL.shape[:2], bumps_PG.shape[1], words.index_BW.shape[1])
    w_BNGW, best_BNGW = logits_BNPL.new_zeros(shape), logits_BNPL.new_zeros(shape)
    least_BN = torch.full_like(best_BNGW[..., 0, 0], torch.inf)
    for i in range(iterations + 1):
        loss_BN, slope_BNGW = slope_of_heights(w_BNGW, words_BNPW, rest_BNP1, words, bumps_PG)
        is_better_BN = loss_BN < least_BN
        least_BN = torch.where(is_better_BN, loss_BN, least_BN)
        best_BNGW = torch.where(is_better_BN[..., None, None], w_BNGW, best_BNGW)
        if i < iterations:
            w_BNGW = w_BNGW - rate * slope_BNGW
    return best_BNGW


def split_logits(logits_BNPL: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """Return the words' logits (B, N, P, W), and the logarithm of the sum of all others' exponentials (B, N, P, 1)."""
    is_word_BNPL = words.spread(torch.ones_like(logits_BNPL[..., : words.index_BW.shape[1]]), logits_BNPL.shape[-1]) > 0
    rest_BNP1 = logits_BNPL.masked_fill(is_word_BNPL, -torch.inf).logsumexp(-1, keepdim=True)
    return words.picked(logits_BNPL, -torch.inf), rest_BNP1


def slope_of_heights(
    w_BNGW: Tensor, words_BNPW: Tensor, rest_BNP1: Tensor, words: Words, bumps_PG: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the inner loss (B, N) at these heights, and its derivative in them (B, N, G, W).

    With p = softmax(logits + bumps w) and g = dL/dp at the words' columns, dL/dlogit = p (g - sum_words p g), and
    dL/dw is its product with the bumps. Arguments are those of ``regulate``, split by ``split_logits``.
    """
    shifted_BNPW = words_BNPW + torch.einsum("pg,bngw->bnpw", bumps_PG, w_BNGW)
    total_BNP1 = torch.cat([shifted_BNPW, rest_BNP1], -1).logsumexp(-1, keepdim=True)
    p_BNPW = (shifted_BNPW - total_BNP1).exp()
    q_BNW, low_BNW, high_BNW, weight = _quantiles(p_BNPW)
    off_mass_BNW = p_BNPW.mean(2) - words.wanted_B11
    miss_BNW = (q_BNW - PEAK).square() + MASS_WEIGHT * off_mass_BNW.square() + EDIT_WEIGHT * w_BNGW.square().mean(2)
    share_BNW = 2 * words.share_B11 * words.is_there_BW[:, None]
    peak_BNW = share_BNW * (q_BNW - PEAK)
    g_BNPW = (share_BNW * MASS_WEIGHT * off_mass_BNW / p_BNPW.shape[2]).unsqueeze(2).expand_as(p_BNPW).clone()
    g_BNPW.scatter_add_(2, low_BNW.unsqueeze(2), ((1 - weight) * peak_BNW).unsqueeze(2))
    g_BNPW.scatter_add_(2, high_BNW.unsqueeze(2), (weight * peak_BNW).unsqueeze(2))
    pull_BNPW = p_BNPW * (g_BNPW - (p_BNPW * g_BNPW).sum(-1, keepdim=True))
    slope_BNGW = torch.einsum("pg,bnpw->bngw", bumps_PG, pull_BNPW)
    slope_BNGW = slope_BNGW + EDIT_WEIGHT * share_BNW.unsqueeze(2) * w_BNGW / bumps_PG.shape[1]
    return _mean(miss_BNW, words), slope_BNGW


def _quantiles(p_BNPW: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the 0.9-quantiles over places, linear between the two places that they lie between, and their share."""
    last = p_BNPW.shape[2] - 1
    low = int(PEAK * last)
    high, weight = min(low + 1, last), PEAK * last - low
    values_BNPW, places_BNPW = p_BNPW.sort(dim=2)
    q_BNW = (1 - weight) * values_BNPW[:, :, low] + weight * values_BNPW[:, :, high]
    return q_BNW, places_BNPW[:, :, low], places_BNPW[:, :, high], weight


def _mean(values_BNW: Tensor, words: Words) -> Tensor:
    """Return the mean over the words that are there, (B, N); 0 where there are none."""
    return (values_BNW * words.is_there_BW[:, None]).sum(-1) * words.share_B11[..., 0]
