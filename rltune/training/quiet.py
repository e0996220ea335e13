"""The libraries underneath, kept from saying what tells a user nothing."""

import logging
import os
import warnings


def quiet_imports() -> None:
    """Keep libraries from telling of one another while they are imported, in this process and those it starts."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # of a class that this torchao no longer has
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # of how torchao registers its types
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of a package that it does without


def quiet_libraries() -> None:
    """Switch off progress bars and warnings that tell a user nothing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
