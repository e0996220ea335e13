"""The image-text model (open_clip) and the aesthetic head on top of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own documentation writes F)
from transformers import CLIPTokenizer

from rltune.builtin.corpus import CAPTIONS_PER_PICTURE, Corpus, to_network
from rltune.builtin.networks import EMBED_DIM, AestheticHead, make_image_text
from rltune.builtin.render import render
from rltune.builtin.scenes import NUMBERS, OBJECT_COLORS, SHAPES, distinct_scenes
from rltune.builtin.tokenizer import encode
from rltune.builtin.workshop import Workshop, cosine_rate, train

STEPS = 2_600
BATCH = 128
PEAK_LR = 2e-3
LABEL_WEIGHT = 1.0
"""Of the label's loss against the contrastive one. Captions alone leave style nearly invisible in the embedding."""


@dataclass(frozen=True)
class ImageText:
    """Both halves, in eval mode."""

    clip: open_clip.CLIP
    head: AestheticHead


NUM_RETRIEVED = 512
WORD_CLASSES = (
    SHAPES,
    ("circles", "squares", "triangles", "stars", "rings", "crosses"),
    tuple(OBJECT_COLORS),
    NUMBERS[2:],
)
"""Words that can stand for each other in a caption and then make it wrong."""


def encode_captions(tokenizer: CLIPTokenizer, corpus: Corpus) -> Tensor:
    """Token ids of every caption, ``(N, captions, context)`` int64."""
    flat = [caption for captions in corpus.captions for caption in captions]
    return encode(tokenizer, flat).view(len(corpus), CAPTIONS_PER_PICTURE, -1)


def train_image_text(
    shop: Workshop, tokenizer: CLIPTokenizer, token_ids_NKL: Tensor, corpus: Corpus, heldout: Corpus
) -> ImageText:
    """Train both towers and the head together: symmetric cross-entropy plus the label's squared error.

    Each picture also has to tell its caption from the same one with a word swapped (NegCLIP, arXiv:2210.01936): in a
    random batch colours alone tell most pictures apart, and a model so trained hardly sees shape.
    """
    with shop.seeded("image-text"):
        clip = make_image_text(len(tokenizer))
        head = AestheticHead(EMBED_DIM, (64,), offset=5.5, scale=2.0)
        with torch.no_grad():
            # A coordinate of a unit vector is about 1/sqrt(dim), which the default initialiser does not expect.
            next(head.parameters()).mul_(math.sqrt(EMBED_DIM))
    clip.to(shop.device)
    clip.visual.to(memory_format=torch.channels_last)
    head.to(shop.device)
    num_steps = shop.scaled(STEPS, at_least=2)
    parameters = [*clip.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        [{"name": "all", "params": parameters}], lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05
    )
    word_classes = [encode(tokenizer, list(words))[:, 1] for words in WORD_CLASSES]

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(corpus), (BATCH,), generator=generator)
        which = torch.randint(CAPTIONS_PER_PICTURE, (BATCH,), generator=generator)
        images = to_network(corpus.images_N3HW[picks])
        # Up to 6 % noise: sampled pictures are never as clean as rendered ones.
        noise_level = 0.06 * torch.rand(BATCH, 1, 1, 1, generator=generator)
        images = (images + noise_level * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
        token_ids_BL = token_ids_NKL[picks, which]
        wrong_BL = swap_a_word(token_ids_BL, word_classes, generator)
        # float32 for text: on a CPU the bfloat16 backward of torch's attention takes three times as long.
        text_2BD = clip.encode_text(torch.cat([token_ids_BL, wrong_BL]).to(shop.device), normalize=True)
        with torch.autocast(shop.device.type, dtype=torch.bfloat16):
            images = images.to(shop.device, memory_format=torch.channels_last)
            image_BD = clip.encode_image(images, normalize=True).float()
        logits_B2B = clip.logit_scale.exp().clamp(max=100) * image_BD @ text_2BD.T
        logits_BB, wrong_B = logits_B2B[:, :BATCH], logits_B2B[:, BATCH:].diag()
        target_B = torch.arange(BATCH, device=shop.device)
        to_text = F.cross_entropy(torch.cat([logits_BB, wrong_B[:, None]], dim=1), target_B)
        contrast = (to_text + F.cross_entropy(logits_BB.T, target_B)) / 2
        label_B = corpus.aesthetic_N[picks].to(shop.device)
        label_error: Tensor = ((head(image_BD) - label_B) / head.scale).square().mean()
        return contrast + LABEL_WEIGHT * label_error

    train(
        shop,
        "image-text",
        modules={"clip": clip, "head": head},
        optimizer=optimizer,
        num_steps=num_steps,
        loss_of=loss_of,
        learning_rate_of=lambda step, _: PEAK_LR * cosine_rate(step, num_steps, warmup=80),
    )
    model = ImageText(clip.eval(), head.eval())
    if shop.load_figures("image-text") is None:
        shop.save_figures("image-text", _measure(shop, model, tokenizer, word_classes, heldout))
    return model


def swap_a_word(token_ids_BL: Tensor, word_classes: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The same captions with one word each, of those in ``word_classes``, replaced by another of its class."""
    width = max(len(words) for words in word_classes)
    size = int(max(int(words.max()) for words in word_classes)) + 1
    # Per token, the other words of its class, repeated up to the largest class; -1 where it has none.
    others = torch.full((max(size, int(token_ids_BL.max()) + 1), width - 1), -1)
    for words in word_classes:
        for word in words.tolist():
            rest = words[words != word]
            others[word] = rest.repeat(width)[: width - 1]
    can_swap_BL = others[token_ids_BL, 0] >= 0
    position_B = torch.multinomial(can_swap_BL.float(), 1, generator=generator)[:, 0]
    rows_B = torch.arange(len(token_ids_BL))
    which_B = torch.randint(width - 1, (len(token_ids_BL),), generator=generator)
    swapped_BL = token_ids_BL.clone()
    swapped_BL[rows_B, position_B] = others[token_ids_BL[rows_B, position_B], which_B]
    return swapped_BL


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


def _measure(
    shop: Workshop,
    model: ImageText,
    tokenizer: CLIPTokenizer,
    word_classes: Sequence[Tensor],
    heldout: Corpus,
) -> dict[str, float]:
    """Retrieval among held-out scenes of distinct content, and the head against the label on all held-out pictures.

    ``swap_accuracy`` is how often a picture prefers its caption to the same with one word swapped; chance is a half.
    """
    scenes = distinct_scenes(shop.seed, shop.scaled(NUM_RETRIEVED, at_least=8), is_heldout=True)
    images = (render(scenes) * 255).round().to(torch.uint8)
    token_ids = encode(tokenizer, [scene.canonical_caption() for scene in scenes])
    wrong_ids = swap_a_word(token_ids, word_classes, shop.generator("image-text", "swap"))
    image_ND, text_ND, wrong_ND = (
        embed_images(model, images, shop.device),
        embed_texts(model, token_ids, shop.device),
        embed_texts(model, wrong_ids, shop.device),
    )
    similarity = image_ND @ text_ND.T
    ranks = (similarity > similarity.diag()[:, None]).sum(1)
    with torch.no_grad():
        score_N = model.head(embed_images(model, heldout.images_N3HW, shop.device).to(shop.device)).cpu()
    label_N = heldout.aesthetic_N
    return {
        "num_captions": float(len(scenes)),
        "retrieval_r1": (ranks == 0).float().mean().item(),
        "retrieval_r5": (ranks < 5).float().mean().item(),
        "swap_accuracy": (similarity.diag() > (image_ND * wrong_ND).sum(1)).float().mean().item(),
        "aesthetic_r2": 1 - ((score_N - label_N).square().mean() / label_N.var()).item(),
        "aesthetic_corr": torch.corrcoef(torch.stack([score_N, label_N]))[0, 1].item(),
    }
