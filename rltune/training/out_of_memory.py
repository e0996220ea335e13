"""Memory that is used up, said in terms of the experiment."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from rltune.diffusion.blocks import blocks_of
from rltune.diffusion.tiles import TILE_PX
from rltune.errors import OutOfMemory, RltuneError, is_out_of_memory
from rltune.training.sampling import image_px
from rltune.training.setup import Run


@contextmanager
def memory_named(run: Run, *, is_evaluation: bool) -> Iterator[None]:
    """Say of memory that is used up within the block with which batch, and what to lower.

    Raises:
        OutOfMemory: It was.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RltuneError) or not is_out_of_memory(error):
            raise
        # the frames hold what did not fit; whoever catches this may want the memory back
        traceback.clear_frames(error.__traceback__)
        raise OutOfMemory(_message(run, error, is_evaluation), is_evaluation=is_evaluation) from None


def _message(run: Run, error: Exception, is_evaluation: bool) -> str:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if is_evaluation:
        what = f"sampling {run.eval_batch} images at a time without gradient"
    else:
        what = f"training on {run.micro_batch} images at a time (optim.micro_batch)"
    return f"out of memory {what} on {run.workers.device}: {detail}; {', or '.join(_remedies(run, is_evaluation))}"


def _remedies(run: Run, is_evaluation: bool) -> Iterator[str]:
    """What takes less memory, that which changes no result first."""
    config = run.config
    if not is_evaluation:
        if run.micro_batch > 1:
            yield "lower optim.micro_batch"
        if config.estimator.checkpoint == "always" and run.estimator.has_serial_mode:
            yield "write estimator.checkpoint: serial"
        elif config.estimator.checkpoint not in ("always", "serial"):
            yield "write estimator.checkpoint: always"
        if config.resources.checkpoint_blocks is not True and blocks_of(run.model.network):
            yield "write resources.checkpoint_blocks: true"
        if run.sampler.tiling is None and max(image_px(config, run.model)) > TILE_PX:
            yield "write resources.decoder_tiles: true"
        if config.estimator.k is not None and config.estimator.k > 1:
            yield "lower estimator.k"
    elif config.evaluate.images_per_prompt > 1:
        yield "lower evaluate.images_per_prompt"
    if config.resources.precision == "fp32":
        yield "write resources.precision: bf16"
    yield "lower sampler.height and sampler.width"
