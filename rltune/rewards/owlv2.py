"""OWLv2 (arXiv:2306.09683), a detector of whatever a phrase names, frozen and differentiable in the image.

B: images in the batch. H, W: image rows and columns. N: boxes of an image, one a patch. Q: phrases. D: width of the
text embedding.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity
from torch.nn.functional import normalize, pad
from torchvision.ops import box_convert
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import gaussian_blur, resize

from rltune.errors import UserError
from rltune.rewards.frozen import checkpoint_blocks, freeze, is_large, share_equal
from rltune.rewards.preprocess import normalise
from rltune.rewards.pretrained import find_folder, load_network, load_tokenizer
from rltune.rewards.weights import WeightsFile

OWLV2 = "google/owlv2-base-patch16-ensemble"
OWLV2_FILES = tuple(
    WeightsFile(file=file, licence="Apache-2.0", size_mb=size_mb, repo=OWLV2)
    for file, size_mb in (("model.safetensors", 620), ("config.json", 0.001), ("vocab.json", 1.1), ("merges.txt", 0.5))
)
ARTICLES = ("a", "an", "the")


class Owlv2:
    """What a frozen OWLv2 says of images, for phrases that are fixed when it is loaded.

    Args:
        network: ``transformers.Owlv2ForObjectDetection``.
        query_QD: Embeddings of the phrases, from ``embed_phrases``.
    """

    def __init__(self, network: Any, query_QD: Tensor) -> None:
        self._network: Any = share_equal(freeze(network))  # Any: transformers is untyped to us
        self._query_QD = query_QD
        self.size_px: int = network.config.vision_config.image_size
        if is_large(network):
            checkpoint_blocks(network.owlv2.vision_model.encoder.layers)

    def preprocess(self, images_B3HW: Tensor) -> Tensor:
        """Return RGB in [0, 1] as the network reads it, differentiably: squared by black at the bottom and the right.

        The steps of transformers 5.23's ``Owlv2ImageProcessor``: pad with 0 (the model's own code does so; 0.5 costs
        0.6 points of LVIS mAP, says transformers pull request 41938), blur where the image is to be made smaller, with
        a deviation of (factor - 1) / 2, then bilinear without antialiasing. Over built-in scenes enlarged to 512 x 512,
        512 x 768, 768 x 512, 1024 x 1024 and 1536 x 1024 px, 8 bits, the difference from that processor is 4e-6 of 255
        levels on average and 7e-5 at most; from its PIL variant, which ends at the edges otherwise, 4e-5 and 0.23.
        """
        x_B3HW = images_B3HW.float()
        height, width = x_B3HW.shape[-2:]
        side = max(height, width)
        x_B3HW = pad(x_B3HW, (0, side - width, 0, side - height))
        sigma = (side / self.size_px - 1) / 2
        if sigma > 0:
            x_B3HW = gaussian_blur(x_B3HW, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)
        x_B3HW = resize(x_B3HW, [self.size_px] * 2, InterpolationMode.BILINEAR, antialias=False)
        return normalise(x_B3HW)

    def logits(self, images_B3HW: Tensor) -> Tensor:
        """How surely each box shows each phrase, ``(B, N, Q)`` float32 logits, differentiable; needs no boxes."""
        return self._classify(self._features(images_B3HW))

    def detect(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``logits`` and the boxes they are of, ``(B, N, 4)``: left, top, right, bottom in units of the square.

        The square is the image padded; both are differentiable.
        """
        map_BHWD = self._features(images_B3HW)
        boxes_BN4 = self._network.box_predictor(map_BHWD.flatten(1, 2), map_BHWD)
        return self._classify(map_BHWD), box_convert(boxes_BN4, "cxcywh", "xyxy")

    def to(self, device: torch.device) -> "Owlv2":
        """Move network and queries to ``device`` and return the detector."""
        share_equal(self._network.to(device))
        self._query_QD = self._query_QD.to(device)
        return self

    def _features(self, images_B3HW: Tensor) -> Tensor:
        map_BHWD: Tensor = self._network.image_embedder(pixel_values=self.preprocess(images_B3HW))[0]
        return map_BHWD

    def _classify(self, map_BHWD: Tensor) -> Tensor:
        query_BQD = self._query_QD.expand(map_BHWD.shape[0], -1, -1)
        logits_BNQ: Tensor = self._network.class_predictor(map_BHWD.flatten(1, 2), query_BQD)[0]
        return logits_BNQ


def load_owlv2(reward: str, model: str, phrases: Sequence[str]) -> Owlv2:
    """Return the detector for ``phrases``, on the CPU.

    Args:
        reward: Name of the reward, for messages.
        model: Id of an OWLv2 on the Hugging Face hub, or a folder in the layout of transformers.
        phrases: What to look for, such as ``red apple``.

    Raises:
        UserError: A phrase is longer than the model reads, or the files are not an OWLv2.
        RunError: The files are not on this machine and cannot be fetched.
    """
    folder = find_folder(reward, model, OWLV2_FILES)
    from transformers import CLIPTokenizer, Owlv2ForObjectDetection

    tokenizer = load_tokenizer(reward, CLIPTokenizer, folder)
    network = freeze(load_network(reward, Owlv2ForObjectDetection, folder))
    query_QD = embed_phrases(reward, network, tokenizer, phrases)
    detector = Owlv2(network, query_QD)
    network.owlv2.text_model = Identity()  # the phrases do not change: 250 MB less to keep
    return detector


def embed_phrases(reward: str, network: Any, tokenizer: Any, phrases: Sequence[str]) -> Tensor:
    """Return the query embeddings of phrases, ``(Q, D)`` float32 of unit length, constants.

    Raises:
        UserError: A phrase has more tokens than the model reads.
    """
    num_tokens: int = network.config.text_config.max_position_embeddings
    rows = []
    with torch.no_grad():  # frozen weights and text: there is nothing to differentiate
        for phrase in phrases:
            # One at a time and so without padding, which attention, causal as it is, would not look at anyway.
            ids = tokenizer(query_text(phrase))["input_ids"]
            if len(ids) > num_tokens:
                raise UserError(
                    f"reward {reward!r}: of must be at most {num_tokens} tokens long as {query_text(phrase)!r}, got "
                    f"{len(ids)}; name the object in fewer words"
                )
            rows.append(network.owlv2.get_text_features(torch.tensor([ids])).pooler_output[0])
    return normalize(torch.stack(rows), dim=1)


def query_text(phrase: str) -> str:
    """What the model is asked for a phrase: ``a photo of a red apple``, as in the examples of its authors' code."""
    words = phrase.split()
    if [word.lower() for word in words[:2]] == ["a", "photo"]:
        return " ".join(words)
    article = () if words[0].lower() in ARTICLES else ("a",)
    return " ".join(("a photo of", *article, *words))
