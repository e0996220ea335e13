from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rltune.builtin.pictures import save_pictures


def test_a_grid_shows_the_pictures_row_by_row(tmp_path: Path) -> None:
    images = torch.tensor([0, 100, 200], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 4)
    save_pictures(tmp_path / "grid.png", images, columns=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L")).astype(int)
    # Two white pixels around each picture of four.
    assert grid.shape == (14, 14)
    assert (grid[2:6, 2:6] == 0).all()
    assert (grid[2:6, 8:12] == 100).all()
    assert (grid[8:12, 2:6] == 200).all()
    assert (grid[:2] == 255).all()
    assert (grid[6:8] == 255).all()
