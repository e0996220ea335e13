"""A trial, as it travels from the sweep to its workers. Imports neither ray nor torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rltune.config.experiment import RunConfig
from rltune.runs.layout import RunFolder
from rltune.runs.record import read_record, with_own_prompts
from rltune.runs.remote import worker_folder

PLAIN = re.compile(r"[^A-Za-z0-9_.-]+")
"""What Ray does not take in a name."""
STORAGE_ERROR = "storage_error"
"""Key of a report that says why nothing can go on."""


@dataclass(frozen=True)
class JobSpec:
    """A trial, as it travels to its workers; plain values, so that it pickles anywhere."""

    trial: str
    run_dir: str
    config: Mapping[str, Any]
    """A concrete experiment, in JSON's types."""
    num_gpus_per_worker: float
    work_dir: str
    """Where the user stands; relative paths of the experiment are meant from there."""
    is_loopback: bool
    """Whether the cluster is our own on one machine, where nothing may listen to the network."""
    waits_for_base: bool = False
    """Whether the base model's trial, which was suggested before, measures what this one is compared with."""
    base_key: str = ""
    """Name of the base model's measurements, as the run has recorded it; empty where it has not."""
    uri: str = ""
    """Address of the run, where it lies on object storage: ``run_dir`` is then the driver's copy of it."""
    begun: str = ""
    """When that run was begun: another that lay at the address before has other copies."""
    role: str = "control"
    """Whose copy ``folder`` is there: that of what drives the trial, or of one of its workers."""

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return worker_folder(self.uri, self.begun, self.role) if self.uri else RunFolder(Path(self.run_dir))

    def of_worker(self, rank: int) -> "JobSpec":
        """Return the trial as one of its workers has it."""
        return replace(self, role=f"worker-{rank}")

    @property
    def run_config(self) -> RunConfig:
        """The concrete experiment."""
        return RunConfig.model_validate(self.config)

    @property
    def whole_config(self) -> RunConfig:
        """The concrete experiment with its prompts written out, from the run's own copies."""
        return with_own_prompts(self.run_config, self.folder, read_record(self.folder))

    @property
    def train_name(self) -> str:
        """Name of the Ray Train run, ``mix-007``, as the dashboard lists it and its checkpoints' folder is called.

        A trial that has such a folder keeps its name: Ray finds checkpoints by it, and the run may be renamed. Where
        the run is on object storage, copies differ in what they have, and the name must not hang on them.
        """
        if self.uri:
            return f"trial-{self.trial}"
        ending = f"-{self.trial}"
        folders = sorted(self.folder.checkpoints_dir(self.trial).glob(f"*{ending}"))
        return folders[0].name if folders else (PLAIN.sub("-", self.folder.name).strip("-.") or "run") + ending
