"""rltune: align text-to-image diffusion models with differentiable rewards, and search the knobs.

What it offers is in ``rltune.api``, which is imported when first asked for: ``load``, ``plan``, ``sweep``, ``train``,
``open_run``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rltune.api import load as load
    from rltune.api import open_run as open_run
    from rltune.api import plan as plan
    from rltune.api import sweep as sweep
    from rltune.api import train as train
    from rltune.runs.run import Run as Run
    from rltune.runs.status import RunStatus as RunStatus

__version__ = "0.1.0"
__all__ = ["Run", "RunStatus", "__version__", "load", "open_run", "plan", "sweep", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import rltune.api

        return getattr(rltune.api, name)
    raise AttributeError(
        f"module 'rltune' has no attribute {name!r}; it offers {', '.join(sorted(set(__all__) - {'__version__'}))}"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
