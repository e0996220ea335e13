"""Where a CLIP tower comes from: the built-in one, open_clip's published ones, a folder, or a checkpoint of CLIP-H."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from rltune.assets import BUILTIN_CLIP_DIR
from rltune.errors import RunError, UserError
from rltune.registry import suggest
from rltune.rewards.clip import ClipTower
from rltune.rewards.frozen import map_weights
from rltune.rewards.preprocess import CLIP_MEAN, CLIP_STD, ResizeMode
from rltune.rewards.weights import check_hub

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""What weights are called in a repository that open_clip names without a file."""
_towers: WeakValueDictionary[tuple[str, ...], ClipTower] = WeakValueDictionary()
"""Towers that are in use in this process, by what they were loaded from: rewards on equal towers share one."""


def load_clip(source: str) -> ClipTower:
    """Return the CLIP model that ``source`` names; the same tower again while anyone holds it.

    Args:
        source: ``builtin``, a folder with ``open_clip_config.json`` beside the weights, or ``MODEL/TAG`` of open_clip's
            published weights (``ViT-L-14/openai``), which must be in the cache or within reach of a network.

    Raises:
        UserError: ``source`` is none of these, or the folder does not hold a model.
        RunError: The weights are not on this machine and cannot be fetched.
    """
    if not isinstance(source, str):
        raise UserError(f"CLIP model: must be 'builtin', a folder or MODEL/TAG of open_clip, got {source!r}")
    key = (str(Path(source).expanduser().resolve()) if Path(source).expanduser().is_dir() else source,)
    tower = _towers.get(key)
    if tower is None:
        tower = _towers[key] = _load(source)
    return tower


def _load(source: str) -> ClipTower:
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
        model = _mapped(open_clip.create_model(identifier, require_pretrained=True), folder / OPEN_CLIP_FILES[0])
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
        _check_reach(published)
        # open_clip 3.3 only warns where weights were trained with QuickGELU and the model is built without: the
        # embeddings would be off. OpenAI's weights are such.
        network = open_clip.create_model(
            model, tag, require_pretrained=True, force_quick_gelu=published.get("quick_gelu", False)
        )
        network = _mapped(network, _cached_safetensors(published.get("hf_hub", "")))
        tokenizer = open_clip.get_tokenizer(model)
    except (OSError, ValueError, RuntimeError, RunError) as error:
        raise RunError(
            f"CLIP model {name!r}: its weights are not on this machine and could not be fetched ({error}); "
            f"{_how_to_fetch(model, published)}, and give the folder that holds them and open_clip_config.json in "
            "place of the name"
        ) from error
    return ClipTower(network, tokenizer, name=name)


def _mapped(network: nn.Module, path: Path | None) -> nn.Module:
    """Return the network with its weights in the file; open_clip copies them, and may have read another one."""
    return map_weights(network, path) if path is not None and path.is_file() else network


def _cached_safetensors(hub: str) -> Path | None:
    """Return the safetensors file that open_clip read for weights it names ``OWNER/REPO/FILE``, if it read one."""
    repo, _, file = hub.rpartition("/")
    name = str(Path(file).with_suffix(".safetensors")) if file else OPEN_CLIP_FILES[0]
    found = try_to_load_from_cache(repo, name) if repo else None
    return Path(found) if isinstance(found, str) else None


def _check_reach(published: Mapping[str, Any]) -> None:
    """Refuse weights that are not here and cannot come: open_clip would try for long (see ``check_hub``)."""
    repo, _, file = published.get("hf_hub", "").rpartition("/")
    if not repo:
        return
    # As open_clip looks for them: the safetensors beside a .bin or .pth first.
    names = (str(Path(file).with_suffix(".safetensors")), file) if file else OPEN_CLIP_FILES
    if not any(isinstance(try_to_load_from_cache(repo, name), str) for name in names):
        check_hub(repo, names[-1])


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
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns that the model has no weights, as it should not
    try:
        with torch.device("meta"):
            network = open_clip.create_model(model, load_weights=False, pretrained_text=False, device="meta")
    finally:
        logging.disable(before)
    num_parameters: int = sum(parameter.numel() for parameter in network.parameters())
    return num_parameters * 4 / 1e9


TEXT_HEAD_WIDTH = 64
"""Of all of them: 1024 in 16 heads in ViT-H-14, 512 in 8 in ViT-B-32."""


@dataclass(frozen=True)
class Kind:
    """What the shapes of a checkpoint do not say."""

    name: str
    vision_head_width: int
    has_quick_gelu: bool = False


VIT_H = Kind("ViT-H-14", 80)  # 1280 in 16 heads
VIT_B = Kind("ViT-B-32", 64, has_quick_gelu=True)  # 768 in 12; OpenAI's


def load_clip_state(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    reward: str,
    resize_mode: ResizeMode = "shortest",
    kind: Kind = VIT_H,
) -> ClipTower:
    """Return a tower from a state dict of open_clip's key names; sizes are read from its shapes.

    Args:
        path: Where the state dict is from, for messages.
        state: Names to tensors of any precision; the tower holds float32.
        reward: Name of the reward, for messages.
        resize_mode: How the reward was trained to see images that are not square.
        kind: Of the model.

    Raises:
        UserError: The state dict is not one of such a model.
    """
    try:
        sizes = _sizes(state, kind)
        with torch.device("meta"):  # no time for initial weights that are replaced at once
            model = open_clip.CLIP(**sizes, quick_gelu=kind.has_quick_gelu)
        parameters = {key: nn.Parameter(value.float(), requires_grad=False) for key, value in state.items()}
        model.load_state_dict(parameters, assign=True)
    except (KeyError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        lines = " ".join(" ".join(str(error).split())[:400].split())
        raise UserError(f"reward {reward!r}: {path} is not a checkpoint of {kind.name} ({lines})") from error
    num_tokens = sizes["text_cfg"]["context_length"]
    mask = torch.full((num_tokens, num_tokens), -torch.inf).triu(1)  # the one buffer that checkpoints leave out
    model.register_buffer("attn_mask", mask, persistent=False)
    model.visual.preprocess_cfg = {
        "size": sizes["vision_cfg"]["image_size"],
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "interpolation": "bicubic",
        "resize_mode": resize_mode,
    }
    tokenizer = open_clip.get_tokenizer(kind.name, context_length=num_tokens)
    return ClipTower(model, tokenizer, name=reward)


def _sizes(state: Mapping[str, Tensor], kind: Kind) -> dict[str, Any]:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    num_patches = state["visual.positional_embedding"].shape[0] - 1
    num_tokens, text_width = state["positional_embedding"].shape
    return {
        "embed_dim": state["text_projection"].shape[1],
        "vision_cfg": {
            "image_size": round(num_patches**0.5) * patch,
            "layers": _count(state, "visual.transformer.resblocks."),
            "width": width,
            "head_width": kind.vision_head_width,
            "patch_size": patch,
            "mlp_ratio": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        },
        "text_cfg": {
            "context_length": num_tokens,
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": text_width // TEXT_HEAD_WIDTH,
            "layers": _count(state, "transformer.resblocks."),
            "mlp_ratio": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / text_width,
        },
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))
