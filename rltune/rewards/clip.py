"""A frozen open_clip model with differentiable image preprocessing, shared by every reward that looks through it.

B: images or prompts in the batch. D: width of the shared embedding. H, W: image rows and columns. L: tokens.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from rltune.errors import UserError
from rltune.rewards.frozen import freeze, is_large, share_equal
from rltune.rewards.preprocess import ResizeMode, normalise, resize_to

logger = logging.getLogger(__name__)

Kept = dict[tuple[int, int], tuple[Tensor, Tensor]]
_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)
INTERPOLATIONS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


@contextmanager
def embeddings_kept() -> Iterator[None]:
    """Embed each tensor of images once a tower while this is open, so that rewards on one tower share the pass.

    Nothing may be backpropagated before it is closed, or what is kept would hang on a graph that is gone.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


class ClipTower:
    """Unit embeddings of images and prompts by one frozen CLIP model, in float32 and evaluation mode.

    The vision tower of a large model keeps the input of each block alone for the backward pass. Parameters that another
    frozen model in this process holds already are not held twice.

    Args:
        model: An open_clip model; its ``visual.preprocess_cfg`` says how images are resized and normalised.
        tokenizer: Its tokenizer, ``(texts, context_length=...) -> (B, L)`` ids.
        name: What messages call the model.

    Raises:
        UserError: The preprocessing is one that we do not reproduce.
    """

    def __init__(self, model: Any, tokenizer: Callable[..., Tensor], *, name: str) -> None:
        self.name = name
        self.model: Any = share_equal(freeze(model))  # Any: open_clip is untyped
        if is_large(model):  # open_clip's own switch knows every kind of image tower, and works in evaluation mode
            model.visual.set_grad_checkpointing(True)
        self._tokenizer = tokenizer
        self._text_cache: dict[str, Tensor] = {}
        self._has_warned_truncation = False
        preprocess = model.visual.preprocess_cfg
        size = preprocess["size"]
        self.size_px: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.resize_mode: ResizeMode = preprocess["resize_mode"]
        if self.resize_mode not in get_args(ResizeMode) or preprocess["interpolation"] not in INTERPOLATIONS:
            raise UserError(
                f"CLIP model {name!r}: preprocessing {self.resize_mode!r}, {preprocess['interpolation']!r} is not "
                f"supported; use a model with {' or '.join(get_args(ResizeMode))} and {' or '.join(INTERPOLATIONS)}"
            )
        if self.resize_mode != "squash" and self.size_px[0] != self.size_px[1]:
            raise UserError(f"CLIP model {name!r}: a crop to {self.size_px} is not square, which is not supported")
        self.interpolation = INTERPOLATIONS[preprocess["interpolation"]]
        self.mean: list[float] = list(preprocess["mean"])
        self.std: list[float] = list(preprocess["std"])
        self.device = torch.device("cpu")

    def preprocess(self, images_B3HW: Tensor) -> Tensor:
        """Return RGB in [0, 1] resized, centre-cropped and normalised as the model was trained, differentiably.

        open_clip's own transform goes through PIL, which rounds to 8 bits and clips what bicubic interpolation
        overshoots. We do neither, since both would take gradient away: over built-in scenes at 224 px the difference is
        0.2 of 255 levels on average and up to 27 beside saturated edges (more than 1 level at 0.3 % of the values).
        """
        x_B3HW = resize_to(images_B3HW, self.size_px, mode=self.resize_mode, interpolation=self.interpolation)
        return normalise(x_B3HW, self.mean, self.std)

    def image_features(self, images_B3HW: Tensor) -> Tensor:
        """Embed RGB in [0, 1] -> ``(B, D)`` float32 of unit length, differentiable in the images.

        Within ``embeddings_kept`` the same tensor of images is embedded once, whoever asks.
        """
        if images_B3HW.shape[0] == 0:
            return images_B3HW.new_zeros(0, self.text_features([""]).shape[1], dtype=torch.float32)
        kept = _kept.get()
        if kept is None:
            return self._embed_images(images_B3HW)
        key = (id(self), id(images_B3HW))
        if key in kept and not torch.is_grad_enabled():
            return kept[key][1].detach()
        if key not in kept or (images_B3HW.requires_grad and not kept[key][1].requires_grad):
            kept[key] = (images_B3HW, self._embed_images(images_B3HW))  # the images too: their id must stay theirs
        return kept[key][1]

    def _embed_images(self, images_B3HW: Tensor) -> Tensor:
        features_BD: Tensor = self.model.encode_image(self.preprocess(images_B3HW), normalize=True)
        return features_BD

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts -> ``(B, D)`` float32 of unit length, constants; each prompt is embedded once and kept.

        A prompt with more tokens than the model reads is cut; the first one is named in a warning.
        """
        with torch.no_grad():  # frozen weights and text: there is nothing to differentiate
            for prompt in prompts:
                if prompt not in self._text_cache:
                    self._text_cache[prompt] = self._embed(prompt)
            return torch.stack([self._text_cache[prompt] for prompt in prompts])

    def to(self, device: torch.device) -> "ClipTower":
        """Move the model and the kept prompt embeddings to ``device`` and return the tower."""
        self.device = torch.device(device)
        share_equal(self.model.to(self.device))
        self._text_cache = {prompt: features_D.to(self.device) for prompt, features_D in self._text_cache.items()}
        return self

    def _embed(self, prompt: str) -> Tensor:
        ids_1L = self._tokenizer([prompt])
        if not self._has_warned_truncation and self._is_cut(prompt, ids_1L):
            self._has_warned_truncation = True
            logger.warning(
                "CLIP model %r reads %d tokens; the rest of longer prompts is not scored. The first such prompt: %r",
                self.name, ids_1L.shape[1], prompt,
            )  # fmt: skip
        features_1D: Tensor = self.model.encode_text(ids_1L.to(self.device), normalize=True)
        return features_1D[0]

    def _is_cut(self, prompt: str, ids_1L: Tensor) -> bool:
        # Tokenizers do not say that they cut. Given more room, a prompt that was cut keeps another token in the place
        # of the end mark (or, where there is none, has more than padding in the room added).
        num_tokens = ids_1L.shape[1]
        roomy_L = self._tokenizer([prompt], context_length=4 * num_tokens)[0]
        added = roomy_L[num_tokens:]
        return not torch.equal(roomy_L[:num_tokens], ids_1L[0]) or bool((added != added[-1]).any())
