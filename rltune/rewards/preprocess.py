"""What image networks are fed with, as differentiable functions of tensors instead of through PIL.

PIL rounds to 8 bits and clips what bicubic interpolation overshoots; we do neither, since both would take gradient
away. B: images in the batch. H, W: image rows and columns.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, resize

ResizeMode = Literal["shortest", "longest", "squash"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel mean and deviation that OpenAI's CLIP, LAION's, BLIP and OWLv2 normalise with."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize_to(
    images_B3HW: Tensor,
    size_px: tuple[int, int],
    *,
    mode: ResizeMode = "shortest",
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    resize_px: int | None = None,
) -> Tensor:
    """Return float32 images of ``size_px`` (height, width), resized with antialiasing; differentiable.

    Args:
        images_B3HW: RGB in [0, 1].
        size_px: Height and width of the result; equal but for ``squash``.
        mode: What open_clip calls it: ``shortest`` resizes the shorter side and cuts the middle out, ``longest``
            resizes the longer side and puts black beside it, ``squash`` gives up the proportions.
        interpolation: Bicubic as CLIP does, or bilinear.
        resize_px: What the shorter side is resized to before the crop; the size itself by default.
    """
    x_B3HW: Tensor = images_B3HW.float()
    height, width = x_B3HW.shape[-2:]
    if mode == "shortest":
        x_B3HW = resize(x_B3HW, [resize_px or size_px[0]], interpolation, antialias=True)
        x_B3HW = center_crop(x_B3HW, list(size_px))
        return x_B3HW
    if mode == "squash":
        x_B3HW = resize(x_B3HW, list(size_px), interpolation, antialias=True)
        return x_B3HW
    scale = size_px[0] / max(height, width)
    inner_px = [max(1, round(height * scale)), max(1, round(width * scale))]
    x_B3HW = resize(x_B3HW, inner_px, interpolation, antialias=True)
    rows, columns = size_px[0] - inner_px[0], size_px[1] - inner_px[1]
    return pad(x_B3HW, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def normalise(images_B3HW: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Return images with a mean per channel subtracted and divided by a deviation."""
    normalised_B3HW: Tensor = normalize(images_B3HW, list(mean), list(std))
    return normalised_B3HW
