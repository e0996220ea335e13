"""The image-text model (open_clip) and the aesthetic head on top of it."""

import math
from dataclasses import dataclass

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own documentation writes F)
from transformers import CLIPTokenizer

from rltune.builtin.corpus import CAPTIONS_PER_PICTURE, Corpus, to_network
from rltune.builtin.networks import EMBED_DIM, AestheticHead, make_image_text
from rltune.builtin.tokenizer import encode
from rltune.builtin.workshop import Workshop, train

STEPS = 800
BATCH = 128
PEAK_LR = 2e-3
LABEL_WEIGHT = 1.0
"""Of the label's loss against the contrastive one. Captions alone leave style nearly invisible in the embedding."""


@dataclass(frozen=True)
class ImageText:
    """Both halves, in eval mode."""

    clip: open_clip.CLIP
    head: AestheticHead


def encode_captions(tokenizer: CLIPTokenizer, corpus: Corpus) -> Tensor:
    """Token ids of every caption, ``(N, captions, context)`` int64."""
    flat = [caption for captions in corpus.captions for caption in captions]
    return encode(tokenizer, flat).view(len(corpus), CAPTIONS_PER_PICTURE, -1)


def train_image_text(
    shop: Workshop, tokenizer: CLIPTokenizer, token_ids_NKL: Tensor, corpus: Corpus, heldout: Corpus
) -> ImageText:
    """Train both towers and the head together: symmetric cross-entropy plus the label's squared error."""
    with shop.seeded("image-text"):
        clip = make_image_text(len(tokenizer))
        head = AestheticHead(EMBED_DIM, (64,), offset=5.5, scale=2.0)
        with torch.no_grad():
            # A coordinate of a unit vector is about 1/sqrt(dim), which the default initialiser does not expect.
            next(head.parameters()).mul_(math.sqrt(EMBED_DIM))
    clip.to(shop.device)
    head.to(shop.device)
    num_steps = shop.scaled(STEPS, at_least=2)
    parameters = [*clip.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        [{"name": "all", "params": parameters}], lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05
    )

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(corpus), (BATCH,), generator=generator)
        which = torch.randint(CAPTIONS_PER_PICTURE, (BATCH,), generator=generator)
        images = to_network(corpus.images_N3HW[picks])
        # Up to 6 % noise: sampled pictures are never as clean as rendered ones.
        noise_level = 0.06 * torch.rand(BATCH, 1, 1, 1, generator=generator)
        images = (images + noise_level * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
        with torch.autocast(shop.device.type, dtype=torch.bfloat16):
            image_BD = clip.encode_image(images.to(shop.device), normalize=True).float()
            text_BD = clip.encode_text(token_ids_NKL[picks, which].to(shop.device), normalize=True).float()
        logits_BB = clip.logit_scale.exp().clamp(max=100) * image_BD @ text_BD.T
        target_B = torch.arange(BATCH, device=shop.device)
        contrast = (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2
        label_B = corpus.aesthetic_N[picks].to(shop.device)
        label_error: Tensor = ((head(image_BD) - label_B) / head.scale).square().mean()
        return contrast + LABEL_WEIGHT * label_error

    def learning_rate_of(step: int, group: str) -> float:
        return PEAK_LR * min(1.0, (step + 1) / 80) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / num_steps)))

    train(
        shop,
        "image-text",
        modules={"clip": clip, "head": head},
        optimizer=optimizer,
        num_steps=num_steps,
        loss_of=loss_of,
        learning_rate_of=learning_rate_of,
    )
    model = ImageText(clip.eval(), head.eval())
    if shop.load_figures("image-text") is None:
        shop.save_figures("image-text", _measure(shop, model, encode_captions(tokenizer, heldout), heldout))
    return model


@torch.no_grad()
def embed_images(model: ImageText, images_uint8: Tensor, device: torch.device) -> Tensor:
    """L2-normalised image embeddings, ``(N, EMBED_DIM)`` float32 on the CPU."""
    batches = [to_network(batch.to(device)) for batch in images_uint8.split(128)]
    return torch.cat([model.clip.encode_image(batch, normalize=True).float().cpu() for batch in batches])


@torch.no_grad()
def embed_texts(model: ImageText, token_ids: Tensor, device: torch.device) -> Tensor:
    """L2-normalised text embeddings, ``(N, EMBED_DIM)`` float32 on the CPU."""
    batches = [batch.to(device) for batch in token_ids.split(128)]
    return torch.cat([model.clip.encode_text(batch, normalize=True).float().cpu() for batch in batches])


def _measure(shop: Workshop, model: ImageText, token_ids_NKL: Tensor, heldout: Corpus) -> dict[str, float]:
    """Retrieval among up to 512 distinct held-out captions, and the head against the label on all held-out pictures."""
    first_of = {captions[0]: number for number, captions in reversed(list(enumerate(heldout.captions)))}
    picks = sorted(first_of.values())[:512]
    image_ND = embed_images(model, heldout.images_N3HW, shop.device)
    text_ND = embed_texts(model, token_ids_NKL[picks, 0], shop.device)
    similarity = image_ND[picks] @ text_ND.T
    ranks = (similarity > similarity.diag()[:, None]).sum(1)
    with torch.no_grad():
        score_N = model.head(image_ND.to(shop.device)).cpu()
    label_N = heldout.aesthetic_N
    return {
        "num_captions": float(len(picks)),
        "retrieval_r1": (ranks == 0).float().mean().item(),
        "retrieval_r5": (ranks < 5).float().mean().item(),
        "render_alignment": similarity.diag().mean().item(),
        "aesthetic_r2": 1 - ((score_N - label_N).square().mean() / label_N.var()).item(),
        "aesthetic_corr": torch.corrcoef(torch.stack([score_N, label_N]))[0, 1].item(),
    }
