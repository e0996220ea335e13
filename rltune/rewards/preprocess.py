"""What image networks are fed with, as differentiable functions of tensors instead of through PIL.

PIL rounds to 8 bits and clips what bicubic interpolation overshoots; we do neither, since both would take gradient
away. B: images in the batch. H, W: image rows and columns.
"""

from collections.abc import Sequence

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel mean and deviation that OpenAI's CLIP, LAION's, BLIP and OWLv2 normalise with."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize_to(
    images_B3HW: Tensor,
    size_px: tuple[int, int],
    *,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    is_cropped: bool = True,
    resize_px: int | None = None,
) -> Tensor:
    """Return float32 images of ``size_px`` (height, width), resized with antialiasing; differentiable.

    Args:
        images_B3HW: RGB in [0, 1].
        size_px: Height and width of the result; where ``is_cropped``, they are equal.
        interpolation: Bicubic as CLIP does, or bilinear.
        is_cropped: Resize the shorter side and cut the middle out; else squash the image into the size.
        resize_px: What the shorter side is resized to before the crop; the size itself by default.
    """
    x_B3HW: Tensor = images_B3HW.float()
    if not is_cropped:
        squashed_B3HW: Tensor = resize(x_B3HW, list(size_px), interpolation, antialias=True)
        return squashed_B3HW
    cropped_B3HW: Tensor = center_crop(
        resize(x_B3HW, [resize_px or size_px[0]], interpolation, antialias=True), list(size_px)
    )
    return cropped_B3HW


def normalise(images_B3HW: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Return images with a mean per channel subtracted and divided by a deviation."""
    normalised_B3HW: Tensor = normalize(images_B3HW, list(mean), list(std))
    return normalised_B3HW
