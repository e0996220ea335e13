"""ImageReward: how people would rank an image among those made for the same prompt.

B: images in the batch. D: width of the text features. H, W: image rows and columns. L: tokens. S: pixels a side of what
the network sees.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer

from rltune.errors import UserError
from rltune.rewards.base import REWARDS, Card
from rltune.rewards.blip import NUM_TOKENS, ScoreNetwork, load_network, read_text_sizes
from rltune.rewards.preprocess import normalise, resize_to
from rltune.rewards.weights import WeightsFile, locate

logger = logging.getLogger(__name__)

NAME = "imagereward"
MEAN = 0.16717362830052426
STD = 1.0333394966054072
"""Of the raw output over the authors' data; the score is standardised with them (``ImageReward.py``)."""
NEW_TOKENS = ("[DEC]", "[ENC]")
"""Behind BERT's own tokens in BLIP's vocabulary (``blip.py``, ``init_tokenizer``)."""
NEEDED_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

WEIGHTS = WeightsFile(
    file="ImageReward.pt",
    licence="Apache-2.0",
    size_mb=1786.9,
    repo="THUDM/ImageReward",
    sha256="d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
)
VOCAB = WeightsFile(
    file="vocab.txt",
    licence="Apache-2.0",
    size_mb=0.23,
    repo="google-bert/bert-base-uncased",
    sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)
CONFIG = WeightsFile(file="med_config.json", licence="Apache-2.0", size_mb=0.0005, repo="THUDM/ImageReward")
"""Not needed: its published values are in ``blip.py``."""


class PromptTokenizer:
    """Prompts as BERT tokens, lower-cased, padded or cut to ``NUM_TOKENS``; needs the vocabulary file alone.

    The first token stays ``[CLS]``: BLIP puts ``[ENC]`` there when it matches images and texts, ImageReward does not
    (``score``, ``inference_rank`` and ``score_gard`` alike).

    Args:
        path: BERT's vocabulary, a token a line.
        vocab_size: How many tokens the network knows.

    Raises:
        UserError: The file is not a vocabulary, or one of another size.
    """

    def __init__(self, path: Path, *, vocab_size: int) -> None:
        try:
            with path.open(encoding="utf-8") as lines:
                ids = {line.rstrip("\n"): i for i, line in enumerate(lines)}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"reward {NAME!r}: vocab must be a text file, got {path} ({error})") from error
        missing = [token for token in NEEDED_TOKENS if token not in ids]
        if missing or len(ids) + len(NEW_TOKENS) != vocab_size:
            lacks = f" and no {missing[0]}" if missing else ""
            raise UserError(
                f"reward {NAME!r}: vocab must be the vocab.txt of bert-base-uncased, with {len(NEW_TOKENS)} tokens "
                f"fewer than the {vocab_size} that the model knows, got {path} with {len(ids)} tokens{lacks}"
            )
        self._tokenizer: Any = BertTokenizer(vocab=ids)
        bos, *others = NEW_TOKENS
        self._tokenizer.add_special_tokens({"bos_token": bos, "additional_special_tokens": others})
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}
        self._has_warned_truncation = False

    def __call__(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return tokens and mask, each ``(B, L)`` int64; each prompt is read once and kept.

        A prompt of more tokens than the network reads is cut; the first one is named in a warning.
        """
        pairs = [self._read(prompt) for prompt in prompts]
        ids_BL = torch.stack([ids_L for ids_L, _ in pairs])
        mask_BL = torch.stack([mask_L for _, mask_L in pairs])
        return ids_BL.to(device), mask_BL.to(device)

    def _read(self, prompt: str) -> tuple[Tensor, Tensor]:
        if prompt not in self._cache:
            if not self._has_warned_truncation and len(self._tokenizer(prompt)["input_ids"]) > NUM_TOKENS:
                self._has_warned_truncation = True
                logger.warning(
                    "%s reads %d tokens; the rest of longer prompts is not scored. The first such prompt: %r",
                    NAME, NUM_TOKENS, prompt,
                )  # fmt: skip
            read = self._tokenizer(prompt, padding="max_length", truncation=True, max_length=NUM_TOKENS)
            self._cache[prompt] = torch.tensor(read["input_ids"]), torch.tensor(read["attention_mask"])
        return self._cache[prompt]


class ImageReward:
    """``(head(features) - mean) / std`` of the text features that have looked at the image; about -2 to 2, unbounded.

    Source: arXiv:2304.05977 and its code, github.com/THUDM/ImageReward (``score_gard``).

    Args:
        network: The frozen network.
        tokenizer: Prompts to what it reads.
    """

    def __init__(self, network: ScoreNetwork, tokenizer: PromptTokenizer) -> None:
        self._network = network
        self._tokenizer = tokenizer

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable."""
        raw_B1: Tensor = self._network.head(self.features(images_B3HW, prompts))
        return (raw_B1[:, 0] - MEAN) / STD

    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return what the head reads, the first token's features ``(B, D)`` float32, differentiable in the images."""
        if images_B3HW.shape[0] == 0:
            return images_B3HW.new_zeros(0, self._network.num_features, dtype=torch.float32)
        ids_BL, mask_BL = self._tokenizer(prompts, images_B3HW.device)
        return self._network.features(self.preprocess(images_B3HW), ids_BL, mask_BL)

    def preprocess(self, images_B3HW: Tensor) -> Tensor:
        """Return RGB in [0, 1] as the network was trained on it, ``(B, 3, S, S)`` float32, differentiable.

        The shorter side is resized, bicubic with antialiasing, the middle cut out, the channels normalised. Without
        the published code's rounding to 8 bits: over built-in scenes, enlarged to 512 to 1024 px and square or not, the
        difference is 0.13 of 255 levels on average and at most 2.5; where 64 px are enlarged to 224, 0.2 and up to 27
        beside saturated edges, whose overshoot PIL clips.
        """
        size_px = self._network.size_px
        return normalise(resize_to(images_B3HW, (size_px, size_px)))

    def to(self, device: torch.device) -> None:
        """Move the network to ``device``."""
        self._network.to(device)


@REWARDS.register(NAME, Card(scale="about -2 to 2", licence="Apache-2.0", weights=(WEIGHTS, VOCAB)))
def build_imagereward(
    *, weights: str | None = None, vocab: str | None = None, config: str | None = None
) -> ImageReward:
    """How people would rank an image made for its prompt: the published ImageReward.

    Args:
        weights: ``ImageReward.pt``, or a ``.safetensors`` file of the same tensors, in place of the published one.
        vocab: ``vocab.txt`` of bert-base-uncased, in place of the published one.
        config: ``med_config.json`` of a text encoder of other sizes than the published ones.

    Raises:
        UserError: An option has a value that it cannot take, or a file is not what it should be.
        RunError: A file is not on this machine.
    """
    weights_path = locate(NAME, WEIGHTS, weights)
    vocab_path = locate(NAME, VOCAB, vocab, option="vocab")
    sizes = read_text_sizes(None if config is None else locate(NAME, CONFIG, config, option="config"))
    tokenizer = PromptTokenizer(vocab_path, vocab_size=int(sizes["vocab_size"]))  # first: the weights take a while
    return ImageReward(load_network(weights_path, sizes), tokenizer)
