"""A frozen open_clip model with differentiable image preprocessing, which the CLIP rewards share.

B: images or prompts in the batch. D: width of the shared embedding. H, W: image rows and columns. L: tokens.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from rltune.assets import BUILTIN_CLIP_DIR
from rltune.errors import RunError, UserError
from rltune.registry import suggest
from rltune.rewards.frozen import freeze
from rltune.rewards.preprocess import normalise, resize_to

logger = logging.getLogger(__name__)

INTERPOLATIONS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


class ClipTower:
    """Unit embeddings of images and prompts by one frozen CLIP model, in float32 and evaluation mode.

    Args:
        model: An open_clip model; its ``visual.preprocess_cfg`` says how images are resized and normalised.
        tokenizer: Its tokenizer, ``(texts, context_length=...) -> (B, L)`` ids.
        name: What messages call the model.

    Raises:
        UserError: The preprocessing is one that we do not reproduce.
    """

    def __init__(self, model: Any, tokenizer: Callable[..., Tensor], *, name: str) -> None:
        self.name = name
        self.model: Any = freeze(model)  # Any: open_clip is untyped
        self._tokenizer = tokenizer
        self._text_cache: dict[str, Tensor] = {}
        self._has_warned_truncation = False
        preprocess = model.visual.preprocess_cfg
        size = preprocess["size"]
        self.size_px: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.resize_mode: str = preprocess["resize_mode"]
        if self.resize_mode not in ("shortest", "squash") or preprocess["interpolation"] not in INTERPOLATIONS:
            raise UserError(
                f"CLIP model {name!r}: preprocessing {self.resize_mode!r}, {preprocess['interpolation']!r} is not "
                f"supported; use a model with 'shortest' or 'squash' and {' or '.join(INTERPOLATIONS)}"
            )
        if self.resize_mode == "shortest" and self.size_px[0] != self.size_px[1]:
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
        x_B3HW = resize_to(
            images_B3HW,
            self.size_px,
            interpolation=self.interpolation,
            is_cropped=self.resize_mode == "shortest",
        )
        return normalise(x_B3HW, self.mean, self.std)

    def image_features(self, images_B3HW: Tensor) -> Tensor:
        """Embed RGB in [0, 1] -> ``(B, D)`` float32 of unit length, differentiable in the images."""
        if images_B3HW.shape[0] == 0:
            return images_B3HW.new_zeros(0, self.text_features([""]).shape[1], dtype=torch.float32)
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
        self.model.to(self.device)
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


def load_clip(source: str) -> ClipTower:
    """Return the CLIP model that ``source`` names, on the CPU.

    Args:
        source: ``builtin``, a folder with ``open_clip_config.json`` beside the weights, or ``MODEL/TAG`` of open_clip's
            published weights (``ViT-L-14/openai``), which must be in the cache or within reach of a network.

    Raises:
        UserError: ``source`` is none of these, or the folder does not hold a model.
        RunError: The weights are not on this machine and cannot be fetched.
    """
    if source == "builtin":
        if not BUILTIN_CLIP_DIR.is_dir():
            raise RunError(f"built-in CLIP model: {BUILTIN_CLIP_DIR} is missing; install rltune again")
        return _load_folder(BUILTIN_CLIP_DIR, name=source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _load_folder(folder, name=source)
    model, _, tag = source.partition("/")
    tags = tuple(open_clip.list_pretrained_tags_by_model(model))
    if not tags:
        advice = suggest(model, tuple(open_clip.list_models())).split("known:")[0].strip()
        raise UserError(
            f"CLIP model {source!r}: neither a folder nor MODEL/TAG of open_clip; {advice or 'give'} "
            "'builtin', a folder with open_clip_config.json, or for example 'ViT-L-14/openai'"
        )
    if tag not in tags:
        raise UserError(f"CLIP model {source!r}: {model} has no weights {tag!r}; {suggest(tag, tags)}")
    return _load_published(model, tag, name=source)


def _load_folder(folder: Path, *, name: str) -> ClipTower:
    identifier = f"local-dir:{folder.resolve()}"
    try:
        model = open_clip.create_model(identifier, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(identifier)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"CLIP model {name!r}: {folder} does not load as an open_clip folder ({error}); it must hold "
            "open_clip_config.json, open_clip_model.safetensors and, if the config names one, a tokenizer"
        ) from error
    return ClipTower(model, tokenizer, name=name)


def _load_published(model: str, tag: str, *, name: str) -> ClipTower:
    published = open_clip.get_pretrained_cfg(model, tag)
    try:
        # open_clip 3.3 only warns where weights were trained with QuickGELU and the model is built without: the
        # embeddings would be off. OpenAI's weights are such.
        network = open_clip.create_model(
            model, tag, require_pretrained=True, force_quick_gelu=published.get("quick_gelu", False)
        )
        tokenizer = open_clip.get_tokenizer(model)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(
            f"CLIP model {name!r}: its weights are not on this machine and could not be fetched ({error}); "
            f"{_how_to_fetch(model, published)}, and give the folder that holds them and open_clip_config.json in "
            "place of the name"
        ) from error
    return ClipTower(network, tokenizer, name=name)


def _how_to_fetch(model: str, published: Mapping[str, Any]) -> str:
    # A text tower from Hugging Face needs the network for its very config.
    is_sized = "hf_model_name" not in open_clip.get_model_config(model)["text_cfg"]
    size = f"about {weights_gb(model):.1f} GB" if is_sized else "large"
    repo, _, file = published.get("hf_hub", "").rpartition("/")
    if repo:
        file = file or "open_clip_model.safetensors"
        where = f"{file} ({size}) of https://huggingface.co/{repo}"
        return f"they are {where}: run `hf download {repo}` where there is a network"
    return f"they are {published['url']} ({size}): fetch them where there is a network"


def weights_gb(model: str) -> float:
    """Return the size in GB (10^9 bytes) of the float32 weights of an open_clip model, without allocating them."""
    with torch.device("meta"):
        network = open_clip.create_model(model, load_weights=False, pretrained_text=False, device="meta")
    num_parameters: int = sum(parameter.numel() for parameter in network.parameters())
    return num_parameters * 4 / 1e9
