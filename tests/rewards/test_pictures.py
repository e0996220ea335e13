"""What a picture of 8 bits keeps of an image."""

import numpy as np
import torch

from rltune.rewards.pictures import to_pictures


def test_levels_are_rounded_and_clipped() -> None:
    images = torch.tensor([-0.5, 0.4 / 255, 0.6 / 255, 99.4 / 255, 1.5]).expand(2, 3, 4, 5).clone().requires_grad_()
    pictures = to_pictures(images)
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (5, 4))] * 2
    assert np.asarray(pictures[1])[3, :, 2].tolist() == [0, 0, 1, 99, 255]


def test_channels_rows_and_columns_stay_where_they_are() -> None:
    levels = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    for picture, levels_3HW in zip(to_pictures(levels / 255), levels, strict=True):
        assert np.asarray(picture).tolist() == levels_3HW.permute(1, 2, 0).tolist()
    assert to_pictures(torch.zeros(0, 3, 4, 5)) == []
