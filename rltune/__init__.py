"""rltune: align text-to-image diffusion models with differentiable rewards, and search the knobs."""

__version__ = "0.1.0"
