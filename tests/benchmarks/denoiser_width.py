"""Which denoiser learns most in the same time? Trains one width for some seconds and prints the held-out loss.

Run two widths side by side, one core each, on the pictures and latents of a finished build (``rltune builtin train``):

    OMP_NUM_THREADS=1 python tests/benchmarks/denoiser_width.py WORK --channels 96 --seconds 600
    OMP_NUM_THREADS=1 python tests/benchmarks/denoiser_width.py WORK --channels 128 --seconds 600

One line a mark: seconds, samples, held-out velocity error of the averaged weights (1 is no skill), ms a sample. The
learning rate does not decay, so the lines of one run are comparable with each other and with the other run's.
"""

import argparse
import copy
import time
from pathlib import Path

import torch

from rltune.builtin import denoiser as dn
from rltune.builtin import image_text as it
from rltune.builtin.corpus import load_corpus
from rltune.builtin.networks import make_scheduler, make_text_encoder, make_unet
from rltune.builtin.tokenizer import build_tokenizer, encode
from rltune.builtin.workshop import Workshop

MARKS = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--channels", type=int, nargs="+", default=[96])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rate", type=float, default=dn.PEAK_LR)
    args = parser.parse_args()

    shop = Workshop(args.work)
    corpus, heldout = load_corpus(shop, is_heldout=False), load_corpus(shop, is_heldout=True)
    tokenizer = build_tokenizer(caption for captions in corpus.captions for caption in captions)
    token_ids, heldout_ids = (it.encode_captions(tokenizer, c) for c in (corpus, heldout))
    latents, heldout_latents = shop.load("latents"), shop.load("latents-heldout")
    empty_L = encode(tokenizer, [""])[0]
    with shop.seeded("pair"):
        live = dn.Denoiser(make_unet(tuple(args.channels)), make_text_encoder(len(tokenizer)))
    average = copy.deepcopy(live)
    dn._use_plain_attention(live)
    scheduler = make_scheduler()
    groups = [
        {"params": list(live.unet.parameters()), "factor": 1.0},
        {"params": list(live.text_encoder.parameters()), "factor": dn.TEXT_LR_FACTOR},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    parameters = [p for group in groups for p in group["params"]]
    print(f"channels {args.channels}: {sum(p.numel() for p in live.unet.parameters()) / 1e6:.2f} M", flush=True)

    spent, step, mark = 0.0, 0, 1
    while mark <= MARKS:
        start = time.perf_counter()
        generator = shop.generator("pair", step)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 200) * group["factor"]
        loss = dn.draw_loss(live, scheduler, latents, token_ids, empty_L, generator, shop.device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(dn.EMA_DECAY, (step + 1) / (step + 12))
        dn._blend(average.unet, live.unet, 1 - decay)
        dn._blend(average.text_encoder, live.text_encoder, 1 - decay)
        step += 1
        spent += time.perf_counter() - start
        if spent >= mark * args.seconds / MARKS:
            loss = dn._measure(shop, average, scheduler, heldout_latents, heldout_ids)["val_loss"]
            samples = step * dn.BATCH
            print(f"{spent:6.0f} s {samples:8d} samples  loss {loss:.4f}  {1e3 * spent / samples:.1f} ms", flush=True)
            mark += 1


if __name__ == "__main__":
    main()
