"""Bytes that autograd stores, by hand."""

import os

import pytest
import torch
from torch import nn

from rltune.diffusion import memory
from rltune.diffusion.lora import add_lora
from rltune.diffusion.memory import free_bytes, stored_bytes
from tests.toys import Adaptable

FLOAT = 4


@pytest.fixture
def x() -> torch.Tensor:
    return torch.ones(4, 6)


def test_a_linear_layer_stores_its_input(x: torch.Tensor) -> None:
    """For the gradient of its weight; for that of its input it stores the weight, which is there anyway."""
    layer = nn.Linear(6, 5)
    assert stored_bytes(lambda: layer(x), layer) == 4 * 6 * FLOAT
    layer.requires_grad_(False)
    assert stored_bytes(lambda: layer(x), layer) == 0
    x.requires_grad_()
    assert stored_bytes(lambda: layer(x), layer) == 0
    assert stored_bytes(lambda: layer(x), nn.Linear(1, 1)) == 6 * 5 * FLOAT  # another's weight counts


def test_what_two_layers_share_is_counted_once(x: torch.Tensor) -> None:
    """tanh stores its output, which is the next layer's input; a view stores what it is a view of."""
    first, second = nn.Linear(6, 5), nn.Linear(5, 2)
    both = nn.Sequential(first, nn.Tanh(), second)
    assert stored_bytes(lambda: both(x), both) == (4 * 6 + 4 * 5) * FLOAT
    assert stored_bytes(lambda: first(x[:2]) + first(x[2:]).sum(), both) == 4 * 6 * FLOAT


def test_an_adapter_stores_the_input_and_its_inner_values(x: torch.Tensor) -> None:
    class Net(Adaptable):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

    net = Net().requires_grad_(False)
    add_lora(net, rank=2, alpha=2, targets=["layer"], seed=0)
    assert stored_bytes(lambda: net.layer(x), net) == (4 * 6 + 4 * 2) * FLOAT


def test_it_counts_where_gradients_are_off_too(x: torch.Tensor) -> None:
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        assert stored_bytes(lambda: layer(x), layer) == 4 * 6 * FLOAT
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("free", "fraction", "reserved", "expected"),
    [(1000, 1.0, 0, 600), (400, 1.0, 500, 240), (1000, 0.5, 100, 240), (1000, 0.5, 700, 0), (300, 0.5, 100, 180)],
)
def test_a_gpu_s_memory_is_what_is_free_and_within_the_workers_part(
    monkeypatch: pytest.MonkeyPatch, free: int, fraction: float, reserved: int, expected: int
) -> None:
    """Of 1000 bytes in all."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    assert free_bytes(torch.device("cuda")) == expected


def test_a_cpu_s_free_memory_is_shared_by_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_host_bytes", lambda: 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert free_bytes(torch.device("cpu")) == 200


def test_a_host_has_no_more_free_than_it_has() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_bytes(torch.device("cpu")) < total
