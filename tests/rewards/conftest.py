"""Networks of the shipped layout with random weights, small where size is free: what the reward suite scores with."""

import base64
import io
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Owlv2Config,
    Owlv2ForObjectDetection,
)

from rltune.builtin.counter import Counter
from rltune.builtin.judge import Judge
from rltune.rewards.aesthetic import LAION_WIDTHS
from tests.rewards.imagereward_layout import save_files
from tests.rewards.prefpaint_layout import Published

EMBED_DIM = 16
HIDDEN = [12, 8]
CONTEXT = 24


def save_tokenizer(folder: Path) -> int:
    letters = "abcdefghijklmnopqrstuvwxyz,"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    return len(tokens)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder: 32 px, bicubic, crop after resizing the shorter side."""
    return save_clip(tmp_path_factory.mktemp("clip"), EMBED_DIM)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of 32 px."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(2):
        levels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="session")
def clip_l_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the embedding of CLIP-L, which LAION's head reads."""
    return save_clip(tmp_path_factory.mktemp("clip_l"), LAION_WIDTHS[0])


def save_clip(folder: Path, embed_dim: int) -> Path:
    vocab_size = save_tokenizer(folder)
    model_cfg = {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": vocab_size, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**model_cfg)
    model_cfg["text_cfg"]["hf_tokenizer_name"] = "local"
    preprocess_cfg = {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aesthetic head with two hidden layers."""
    torch.manual_seed(1)
    widths = [EMBED_DIM, *HIDDEN, 1]
    state = {}
    for i in range(len(widths) - 1):
        layer = nn.Linear(widths[i], widths[i + 1])
        state |= {f"layers.{2 * i}.weight": layer.weight.detach(), f"layers.{2 * i}.bias": layer.bias.detach()}
    header = {"in": str(EMBED_DIM), "hidden": json.dumps(HIDDEN), "activation": "silu", "offset": "5.5", "scale": "2.0"}
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(state, path, metadata=header)
    return path


@pytest.fixture(scope="session")
def laion_head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of LAION's layout."""
    torch.manual_seed(4)
    state = {}
    for i, (width_in, width_out) in zip((0, 2, 4, 6, 7), pairwise(LAION_WIDTHS), strict=True):
        layer = nn.Linear(width_in, width_out)
        state |= {f"layers.{i}.weight": layer.weight.detach(), f"layers.{i}.bias": layer.bias.detach()}
    path = tmp_path_factory.mktemp("laion") / "head.pth"
    torch.save(state, path)
    return path


def make_clip_h(seed: int, *, num_shared: int = 0) -> open_clip.CLIP:
    """ViT-H-14 but for its sizes: heads of 80 and 64, patches of 14. The first layers do not follow the seed."""
    torch.manual_seed(seed)
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    vision = {"image_size": 28, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    torch.manual_seed(99)
    with torch.no_grad():
        for block in (*model.visual.transformer.resblocks[:num_shared], *model.transformer.resblocks[:num_shared]):
            for parameter in block.parameters():
                parameter.normal_(std=0.05)
        model.token_embedding.weight.normal_(std=0.02)
    return model


@pytest.fixture(scope="session")
def hps_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of HPS's layout, in half precision as published, with the first block of each tower in common."""
    folder = tmp_path_factory.mktemp("hps")
    for version, seed in (("2", 5), ("2.1", 6)):
        state = {name: value.half() for name, value in make_clip_h(seed, num_shared=1).state_dict().items()}
        torch.save({"state_dict": state}, folder / f"HPS_v{version}_compressed.pt")
    return folder / "HPS_v2_compressed.pt", folder / "HPS_v2.1_compressed.pt"


@pytest.fixture(scope="session")
def pickscore_model() -> CLIPModel:
    """transformers' CLIP-H, small: what PickScore is published as."""
    torch.manual_seed(7)
    text = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 256}
    text |= {"projection_dim": 32, "hidden_act": "gelu", "eos_token_id": 49407}
    vision = {"hidden_size": 160, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 640}
    vision |= {"projection_dim": 32, "hidden_act": "gelu", "image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return CLIPModel(config).eval()


@pytest.fixture(scope="session")
def pickscore_file(tmp_path_factory: pytest.TempPathFactory, pickscore_model: CLIPModel) -> Path:
    """Its weights as the hub has them."""
    folder = tmp_path_factory.mktemp("pickscore")
    pickscore_model.save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.fixture(scope="session")
def counter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A counter that has learnt nothing."""
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("counter") / "counter.safetensors"
    save_file(Counter().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def judge_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge that has learnt nothing."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_file(Judge().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def imagereward_options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small ImageReward that has learnt nothing."""
    return save_files(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="session")
def prefpaint_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small PrefPaint that has learnt nothing, saved from several GPUs."""
    path = tmp_path_factory.mktemp("prefpaint") / "prefpaintReward.pt"
    torch.save({f"module.{name}": value for name, value in Published().state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def owlv2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OWLv2 of two layers that looks at 8 x 8 patches of 64 px, with a tokenizer."""
    folder = tmp_path_factory.mktemp("owlv2")
    vocab_size = save_tokenizer(folder)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": vocab_size - 1, "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    config = Owlv2Config(
        text_config={**layers, **ends, "vocab_size": vocab_size, "max_position_embeddings": 40},  # letters are tokens
        vision_config={**layers, "image_size": 64, "patch_size": 8},
        projection_dim=32,
    )
    torch.manual_seed(4)
    network = Owlv2ForObjectDetection(config)
    # As in the published one, most boxes of any picture show nothing, and logits are a few at most.
    with torch.no_grad():
        network.class_head.logit_shift.weight.mul_(0.1)
        network.class_head.logit_scale.weight.mul_(0.1)
        network.class_head.logit_shift.bias.fill_(-2.0)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of two layers; its positions are interpolated, as the published one's are."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(5)
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**layers, image_size=112, patch_size=28)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scoring_function(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A user's function that is the mean level of a picture, as ``module:name``."""
    folder = tmp_path_factory.mktemp("scoring")
    (folder / "scores_of_a_user.py").write_text(
        "import numpy as np\n\ndef brightness(images, prompts):\n    return [np.asarray(i).mean() for i in images]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "scores_of_a_user:brightness"


class _Brightness(BaseHTTPRequestHandler):
    """A server that keeps the protocol of the reward ``http`` and answers with the mean level of a picture."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in asked["images"]]
        scores = [float(np.asarray(picture).mean()) for picture in pictures]
        body = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def scoring_server() -> Iterator[str]:
    """Address of a server that scores pictures."""
    with pytest.MonkeyPatch.context() as patch, ThreadingHTTPServer(("127.0.0.1", 0), _Brightness) as server:
        patch.setenv("no_proxy", "127.0.0.1")  # whatever the machine's way to the network is
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
        server.shutdown()


@pytest.fixture(scope="session")
def reward_options(
    clip_folder: Path,
    picture_folder: Path,
    clip_l_folder: Path,
    head_file: Path,
    laion_head_file: Path,
    hps_files: tuple[Path, Path],
    pickscore_file: Path,
    counter_file: Path,
    judge_file: Path,
    imagereward_options: dict[str, str],
    prefpaint_file: Path,
    owlv2_folder: Path,
    dino_folder: Path,
    scoring_function: str,
    scoring_server: str,
) -> Mapping[str, Mapping[str, Any]]:
    """Name -> options with which the suite builds a reward; one that needs weights has an entry here."""
    return {
        "aesthetic": {"clip": str(clip_folder), "head": str(head_file)},
        "laion_aesthetic": {"clip": str(clip_l_folder), "head": str(laion_head_file)},
        "alignment": {"model": str(clip_folder)},
        "centroid": {"model": str(clip_folder), "images": str(picture_folder)},
        "clip_score": {"model": str(clip_folder)},
        "hpsv2": {"weights": str(hps_files[0])},
        "hpsv2_1": {"weights": str(hps_files[1])},
        "pickscore": {"weights": str(pickscore_file)},
        "count": {"weights": str(counter_file)},
        "presence": {"weights": str(counter_file)},
        "faithful": {"weights": str(judge_file)},
        "faithful_exact": {"weights": str(judge_file)},
        "imagereward": imagereward_options,
        "prefpaint": {"weights": str(prefpaint_file)},
        "object_count": {"of": "red apple", "target": 2, "model": str(owlv2_folder)},
        "object_presence": {"of": ["red apple", "cat"], "model": str(owlv2_folder)},
        "diversity_dino": {"model": str(dino_folder)},
        "callable": {"function": scoring_function},
        "http": {"url": scoring_server},
    }
