"""Where the data files that ship inside the package lie. Imports nothing, so that every room may use it."""

from pathlib import Path

BUILTIN_DIR = Path(__file__).parent / "builtin"
BUILTIN_PIPELINE_DIR = BUILTIN_DIR / "weights" / "pipeline"
"""A diffusers ``StableDiffusionPipeline`` folder."""
BUILTIN_CLIP_DIR = BUILTIN_DIR / "weights" / "clip"
"""An open_clip ``local-dir:`` folder, trained on the same captions."""
BUILTIN_AESTHETIC_HEAD = BUILTIN_DIR / "weights" / "aesthetic_head.safetensors"
"""The aesthetic head on top of that CLIP's normalised image embedding."""
BUILTIN_COUNTER = BUILTIN_DIR / "weights" / "counter.safetensors"
"""The soft object counter, which the rewards ``count`` and ``presence`` read."""
BUILTIN_JUDGE = BUILTIN_DIR / "weights" / "judge.safetensors"
"""The independent reader of pictures; no training sees it."""
BUILTIN_PROMPTS = {
    "builtin": BUILTIN_DIR / "prompts" / "train.txt",
    "builtin-heldout": BUILTIN_DIR / "prompts" / "heldout.txt",
}
"""One prompt a line; held-out scenes are ones the training set never showed."""
