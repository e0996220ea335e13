"""Networks of the shipped layout with random weights, small where size is free: what the reward suite scores with."""

import base64
import io
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer

from rltune.builtin.counter import Counter
from rltune.builtin.judge import Judge

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
    folder = tmp_path_factory.mktemp("clip")
    vocab_size = save_tokenizer(folder)
    model_cfg = {
        "embed_dim": EMBED_DIM,
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
    clip_folder: Path, head_file: Path, counter_file: Path, judge_file: Path, scoring_function: str, scoring_server: str
) -> Mapping[str, Mapping[str, Any]]:
    """Name -> options with which the suite builds a reward; one that needs weights has an entry here."""
    return {
        "aesthetic": {"clip": str(clip_folder), "head": str(head_file)},
        "alignment": {"model": str(clip_folder)},
        "count": {"weights": str(counter_file)},
        "presence": {"weights": str(counter_file)},
        "faithful": {"weights": str(judge_file)},
        "faithful_exact": {"weights": str(judge_file)},
        "callable": {"function": scoring_function},
        "http": {"url": scoring_server},
    }
