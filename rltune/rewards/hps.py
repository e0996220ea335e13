"""Human preference scores HPSv2 and HPSv2.1 (arXiv:2306.09341): CLIP-H fine-tuned on what people preferred."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from rltune.errors import UserError
from rltune.rewards.alignment import Alignment
from rltune.rewards.base import REWARDS, Card
from rltune.rewards.clip_loading import load_clip_state
from rltune.rewards.weights import WeightsFile, locate

HPS_2 = WeightsFile(repo="xswu/HPSv2", file="HPS_v2_compressed.pt", licence="Apache-2.0", size_mb=1972)
HPS_2_1 = WeightsFile(repo="xswu/HPSv2", file="HPS_v2.1_compressed.pt", licence="Apache-2.0", size_mb=1972)


def load_hps(reward: str, path: Path) -> Alignment:
    """Return the score of a published checkpoint: the cosine of the embeddings of image and prompt.

    As published (https://github.com/tgxs002/HPSv2, ``hpsv2/img_score.py``): the longer side is resized to 224 px and
    black put beside it, prompts are cut at 77 tokens. There the network runs in half precision where a GPU has it,
    here in float32.

    Raises:
        UserError: The file is not such a checkpoint.
    """
    state = read_checkpoint(reward, path)
    return Alignment(load_clip_state(path, state, reward=reward, resize_mode="longest"))


def read_checkpoint(reward: str, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.pt`` file whose ``state_dict`` entry holds them, without running what it contains.

    Raises:
        UserError: It is not such a file.
    """
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        return dict(state)
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError, EOFError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"reward {reward!r}: {path} is not a checkpoint with a state_dict in it ({first}); fetch it again"
        ) from error


@REWARDS.register("hpsv2", Card(scale="about 0.2 to 0.35", weights=(HPS_2,)))
def build_hpsv2(*, weights: str | None = None) -> Alignment:
    """Human preference score v2, CLIP-H fine-tuned.

    Args:
        weights: Path of ``HPS_v2_compressed.pt``; the Hugging Face cache if left out.

    Raises:
        UserError: The file is not such a checkpoint.
        RunError: It is not on this machine and cannot be fetched.
    """
    return load_hps("hpsv2", locate("hpsv2", HPS_2, weights))


@REWARDS.register("hpsv2_1", Card(scale="about 0.2 to 0.35", weights=(HPS_2_1,)))
def build_hpsv2_1(*, weights: str | None = None) -> Alignment:
    """Human preference score v2.1, CLIP-H fine-tuned.

    Args:
        weights: Path of ``HPS_v2.1_compressed.pt``; the Hugging Face cache if left out.

    Raises:
        UserError: The file is not such a checkpoint.
        RunError: It is not on this machine and cannot be fetched.
    """
    return load_hps("hpsv2_1", locate("hpsv2_1", HPS_2_1, weights))
