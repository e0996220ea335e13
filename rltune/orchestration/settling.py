"""Where the sampler settings that an experiment leaves open become numbers: the base model's own, once and for all.

A run that was started has them in its record, and goes on with those whatever the model's own are by now.
"""

from collections.abc import Mapping
from typing import Any

from rltune.config.load import Experiment
from rltune.config.sampling import OWN
from rltune.diffusion.defaults import fetch_defaults, read_defaults
from rltune.diffusion.outline import find_pipeline
from rltune.errors import UserError
from rltune.orchestration.known import known_names
from rltune.runs.layout import RunFolder
from rltune.runs.record import leaves, read_record
from rltune.training.sampling import dotted

PATHS = tuple(f"sampler.{name}" for name in OWN)


def settle(experiment: Experiment, folder: RunFolder, *, may_fetch: bool) -> Experiment:
    """Return an experiment that says how images are drawn; what is not known yet stays open.

    Args:
        experiment: As it was loaded.
        folder: Of its run, which need not be there.
        may_fetch: Whether to ask the hub for a few kilobytes of a model that is not on this machine.

    Raises:
        ExperimentError: What it leaves open does not go together with what it says.
    """
    record = read_record(folder)
    then = leaves(record.settings) if record is not None else {}
    recorded = {path: then[path] for path in PATHS if then.get(path) is not None}
    defaults = {**_own(experiment, may_fetch=may_fetch), **recorded}
    return experiment.settled(defaults, known_names()) if defaults else experiment


def still_open(experiment: Experiment) -> tuple[str, ...]:
    """Return the settings that every model has a value of its own for and that are not known yet."""
    sampler = experiment.shared.sampler
    return tuple(f"sampler.{name}" for name in ("steps", "guidance", "eta") if getattr(sampler, name) is None)


def _own(experiment: Experiment, *, may_fetch: bool) -> Mapping[str, Any]:
    model = experiment.shared.model
    base, revision = model.base, model.revision
    try:
        here = find_pipeline(base, revision, model.config)
        if here is not None:
            return dotted(read_defaults(here, base=base))
        return dotted(fetch_defaults(base, revision)) if may_fetch else {}
    except UserError:  # the inspection says what is wrong with the model
        return {}
