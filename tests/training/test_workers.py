"""Devices of a worker, where none is at hand."""

import pytest
import torch

from rltune.errors import UserError
from rltune.training.workers import Workers


def workers_on(device: str) -> Workers:
    workers = Workers()
    workers.device = torch.device(device)
    return workers


@pytest.mark.parametrize(("device", "second"), [("cuda", 1), ("cuda:0", 1), ("cuda:2", 3)])
def test_a_workers_gpus_follow_one_another(monkeypatch: pytest.MonkeyPatch, device: str, second: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert workers_on(device).second_gpu() == torch.device("cuda", second)


@pytest.mark.parametrize(("device", "seen"), [("cpu", 0), ("cuda:3", 4)])
def test_a_second_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, device: str, seen: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match=rf"rewards_on: second_gpu: the worker on {device} sees {seen} GPUs; write"):
        workers_on(device).second_gpu()
