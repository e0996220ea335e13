"""What a run keeps of its activations, computes again, or takes in pieces, so that it fits into memory."""

import logging
import os
from dataclasses import replace

import torch
import torch.compiler.config as compiler
from torch import Tensor, nn

from rltune.config.experiment import RunConfig
from rltune.diffusion.blocks import blocks_of, checkpoint_blocks, compile_blocks
from rltune.diffusion.memory import GIB, Stored, free_bytes, measure_call, stored_bytes
from rltune.diffusion.sampler import Sampler
from rltune.errors import UserError
from rltune.rewards.weights import cache_dir
from rltune.training.setup import Run

logger = logging.getLogger(__name__)

NUM_TRACED = 64
"""Forms of one block that are compiled at most."""


def with_room(run: Run, config: RunConfig) -> Sampler:
    """Return the run's sampler as ``estimator.checkpoint`` and ``resources`` have it; adapters are attached.

    The network's blocks are put into checkpoints, or taken out of them. ``auto`` measures what the image decoder and
    one network call of a micro-batch store, and keeps the decoder's and then as many steps' as fit. None of that
    changes a number; tiles do, so that they never depend on what is free.

    Raises:
        UserError: Blocks are to be checkpointed, and the network names none.
    """
    sampler = run.sampler
    mode = config.estimator.checkpoint
    step = None
    if mode == "auto" or (config.resources.checkpoint_blocks == "auto" and mode != "never"):
        step = _measured_step(run, sampler)
    has_blocks = _set_blocks(run, config, step)
    if mode in ("always", "serial"):
        return sampler
    if mode == "never":
        return replace(sampler, num_kept=sampler.num_steps, is_decoder_kept=True)
    assert step is not None
    return _kept(run, config, sampler, step, has_blocks=has_blocks)


def compile_kept(network: nn.Module) -> None:
    """Compile a network, or its repeated blocks, and keep the code on disk for the next trial, or run, on this machine.

    In the folder that ``TORCHINDUCTOR_CACHE_DIR`` names, or beside the weights that rltune keeps.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    # the code of a block is traced once for every width, image size and precision, with gradient and without, with
    # adapters and without; beyond the 8 that PyTorch allows, blocks would silently run uncompiled
    compiler.recompile_limit = max(compiler.recompile_limit, NUM_TRACED)
    compile_blocks(network)


def _set_blocks(run: Run, config: RunConfig, step: Stored | None) -> bool:
    """Put blocks into checkpoints if that is wanted, or if one step would not fit without; return whether they are."""
    wanted = config.resources.checkpoint_blocks
    network = run.model.network
    if wanted == "auto":
        wanted = step is not None and bool(blocks_of(network)) and step.plain > free_bytes(run.workers.device)
    elif wanted and not blocks_of(network):
        raise UserError(
            f"resources.checkpoint_blocks: {type(network).__name__} of {config.model.base!r} does not say what its "
            "blocks are; write auto or false"
        )
    checkpoint_blocks(network, enabled=wanted, is_told=run.sampler.attention is not None)
    return wanted


def _measured_step(run: Run, sampler: Sampler) -> Stored:
    x_BCHW = _latents(run)
    chain = replace(sampler, num_base_steps=0).open([run.train_prompts[0]] * run.micro_batch, x_BCHW, None)
    return measure_call(lambda: chain.predict(0, x_BCHW), run.model.network)


def _latents(run: Run) -> Tensor:
    """Return latents of a micro-batch that need gradient, as every active step's input but the first's."""
    return torch.zeros(run.micro_batch, *run.latent_shape, device=run.workers.device).requires_grad_()


def _kept(run: Run, config: RunConfig, sampler: Sampler, step: Stored, *, has_blocks: bool) -> Sampler:
    """Return the sampler that keeps the decoder's activations, and then those of as many steps as there is room for."""
    budget = config.estimator.activation_gib
    room = free_bytes(run.workers.device) if budget == "auto" else int(budget * GIB)
    step_bytes = step.plain
    if has_blocks:  # a block is computed again while the others' inputs are still held
        step_bytes, room = step.outside, room - step.largest
    decoder_bytes = 0
    is_decoder_kept = False
    if sampler.tiling is None:
        decoder_bytes = stored_bytes(lambda: run.model.decode(_latents(run)), run.model.decoder)
        is_decoder_kept = decoder_bytes <= room
        room -= decoder_bytes if is_decoder_kept else 0
    num_kept = max(0, min(sampler.num_steps, room // max(1, step_bytes)))
    logger.info(
        "activations: %.2f GiB a step%s, %s for the decoder; keeping %d of up to %d steps%s",
        step_bytes / GIB,
        " with its blocks in checkpoints" if has_blocks else "",
        f"{decoder_bytes / GIB:.2f} GiB" if sampler.tiling is None else "tiles",
        num_kept,
        sampler.num_steps,
        " and the decoder's" if is_decoder_kept else "",
    )
    return replace(sampler, num_kept=num_kept, is_decoder_kept=is_decoder_kept)
