"""Images as pictures of 8 bits, for what reads files or PIL images instead of tensors.

B: images in the batch. H, W: image rows and columns.
"""

from PIL import Image
from torch import Tensor


def to_pictures(images_B3HW: Tensor) -> list[Image.Image]:
    """Return RGB in [0, 1] as pictures of 8 bits a channel, clipped and rounded to the nearest level: no gradient."""
    levels_B3HW = (images_B3HW.detach().float().clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(pixels_HW3) for pixels_HW3 in levels_B3HW.permute(0, 2, 3, 1).cpu().numpy()]
