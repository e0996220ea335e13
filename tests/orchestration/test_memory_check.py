"""What does not fit is refused before it starts, with the settings that would make it fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from rltune.config.experiment import RunConfig
from rltune.diffusion.memory import GIB
from rltune.errors import UserError
from rltune.orchestration import memory_check
from rltune.orchestration.memory_check import check_memory, memory_in_words
from rltune.orchestration.nodes import Node, WorkerNeed, read_nodes, smallest_gpu_gib
from rltune.training.forecast import Forecast
from tests.orchestration.test_nodes import row

SAVED = {"checkpoint_blocks": 10, "micro_batch": 8, "precision": 5, "decoder_tiles": 2}
"""GiB of 40 that each setting saves."""


def forecast_of(config: RunConfig) -> Forecast:
    resources = config.resources
    is_set = {
        "checkpoint_blocks": resources.checkpoint_blocks is True,
        "micro_batch": config.optim.micro_batch == 1,
        "precision": resources.precision == "bf16",
        "decoder_tiles": resources.decoder_tiles is True,
    }
    step = 20 - sum(SAVED[name] for name, flag in is_set.items() if flag)
    return Forecast({"network": 20 * GIB, "adapters": 0}, {"a step": step * GIB, "decoding": GIB}, "fp32", False, False)


def changes() -> dict[str, Any]:
    def changed(section: str, **values: Any) -> Any:
        return lambda config: config.model_copy(update={section: getattr(config, section).model_copy(update=values)})

    return {
        "resources.checkpoint_blocks: true": changed("resources", checkpoint_blocks=True),
        "optim.micro_batch: 1": changed("optim", micro_batch=1),
        "resources.precision: bf16": changed("resources", precision="bf16"),
        "resources.decoder_tiles: true": changed("resources", decoder_tiles=True),
    }


@dataclass(frozen=True)
class Work:
    worker: WorkerNeed
    precision: str = "fp32"

    @property
    def num_gpus_per_worker(self) -> float:
        return self.worker.num_gpus


def check(monkeypatch: pytest.MonkeyPatch, nodes: list[Node], *, num_gpus: float = 1.0, host_gib: int = 64) -> Forecast:
    monkeypatch.setattr(memory_check, "forecast", lambda config, *_, **__: forecast_of(config))
    monkeypatch.setattr(memory_check, "smaller", lambda *_: changes())
    monkeypatch.setattr(memory_check, "host_bytes", lambda: host_gib * GIB)
    config = RunConfig.model_validate({"rewards": {"aesthetic": {}}})
    model: Any = SimpleNamespace()
    work: Any = Work(WorkerNeed(1, num_gpus))
    return check_memory(config, model, work, nodes, is_here=True)


def gpu(gib: float | None, count: float = 1.0) -> Node:
    return Node(8.0, count, None, gib)


@pytest.mark.parametrize("nodes", [[gpu(40)], [gpu(80), gpu(48)], [gpu(None)], [gpu(80), gpu(24, 0.0)]])
def test_what_fits_the_smallest_gpu_that_is_known_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, nodes: list[Node]
) -> None:
    assert check(monkeypatch, nodes).peak_gib == pytest.approx(40)


@pytest.mark.parametrize(
    ("gib", "remedy"),
    [
        (36, "write resources.checkpoint_blocks: true (30.0 GiB), or optim.micro_batch: 1 (32.0 GiB), or "
             "resources.precision: bf16 (35.0 GiB)"),
        (30, "write resources.checkpoint_blocks: true (30.0 GiB)"),
        (24, "write resources.checkpoint_blocks: true (30.0 GiB) and optim.micro_batch: 1 (22.0 GiB with it)"),
        (21, "resources.checkpoint_blocks: true (30.0 GiB) and optim.micro_batch: 1 (22.0 GiB with it) and "
             "resources.precision: bf16 (21.0 GiB with it) are not enough; take a smaller model, or a GPU of 21 GiB "
             "and more"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_settings_that_would_make_it_fit(
    monkeypatch: pytest.MonkeyPatch, gib: float, remedy: str
) -> None:
    if gib == 21:
        gib = 20.5
    with pytest.raises(UserError) as caught:
        check(monkeypatch, [gpu(80), gpu(gib)])
    assert str(caught.value) == (
        f"memory: a worker needs 40.0 GiB (network 20.0, a step 20.0), and the smallest GPU has {gib:.1f}; {remedy}"
    )


def test_a_share_of_a_gpu_has_a_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, [gpu(80)], num_gpus=0.5)
    with pytest.raises(UserError, match=r"the smallest GPU has 20\.0;"):
        check(monkeypatch, [gpu(80)], num_gpus=0.25)


def test_a_machine_without_a_gpu_refuses_what_is_far_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, [Node(8.0)], num_gpus=0, host_gib=20)
    with pytest.raises(UserError, match=r"this machine has 19\.0;"):
        check(monkeypatch, [Node(8.0)], num_gpus=0, host_gib=19)


def test_the_memory_of_a_gpu_follows_from_its_type() -> None:
    kinds: list[Mapping[str, float]] = [{"accelerator_type:L4": 1.0}, {"accelerator_type:A100": 1.0}, {}]
    nodes = read_nodes([row({"CPU": 8.0, "GPU": 1.0, **kind}) for kind in kinds])
    assert [node.gpu_gib for node in nodes] == [24, 80, None]
    assert smallest_gpu_gib(nodes, WorkerNeed(1, 1.0)) == 24
    assert smallest_gpu_gib(nodes, WorkerNeed(1, 1.0, "A100")) == 80
    assert smallest_gpu_gib(nodes, WorkerNeed(1, 0.0)) is None


def test_small_parts_are_not_spelt_out() -> None:
    found = Forecast({"network": 2 * GIB, "adapters": GIB // 100}, {"a step": GIB, "other": 0}, "fp32", False, False)
    assert memory_in_words(found) == "3.0 GiB (network 2.0, a step 1.0)"
