"""A basis of LoRAs: gradients in closed form, a batch of mixes against a loop over images, in every family."""

import pytest
import torch
from torch import Tensor, nn

from rltune.diffusion.basis import BasisGate, add_basis, alpha_together, at_weights, only, weighted
from rltune.diffusion.lora import ADAPTER, add_lora, lora_layers, lora_parameters, lora_state
from rltune.diffusion.lora_start import attached_factors
from tests.toys import Adaptable

B, M, R = 5, 3, 2


class Layer(Adaptable):
    """A linear layer, y = W x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w(x)
        return out


class Picture(Adaptable):
    """A convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w(x)
        return out


def basis(network: nn.Module, *, alpha: float = 3.0, use_rslora: bool = False) -> BasisGate:
    network.requires_grad_(False)
    add_basis(network, num_loras=M, rank=R, alpha=alpha, targets=["w"], seed=0, use_rslora=use_rslora)
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_parameters(network):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    gate = BasisGate(R)
    gate.watch(network)
    return gate


def drawn(seed: int = 2) -> Tensor:
    return torch.rand(B, M, generator=torch.Generator().manual_seed(seed))


def test_gradients_are_those_of_the_closed_form() -> None:
    """y = (W + c sum_i s_i B_i A_i) x, with g = dL/dy and c = alpha / rank.

    dL/dB_i = c sum_b s_bi g_b (A_i x_b)^T, and dL/dA_i = c sum_b s_bi B_i^T g_b x_b^T.
    """
    network = Layer().double()
    gate = basis(network)
    network.double()
    (layer,) = lora_layers(network)
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    strengths_BM, c = drawn().double(), 3.0 / R
    x, g = torch.randn(B, 4, dtype=torch.float64), torch.randn(B, 3, dtype=torch.float64)
    y = gate.bound(lambda x, t: network(x), strengths_BM)(x, torch.zeros(()))
    (y * g).sum().backward()
    for i in range(M):
        rows = slice(i * R, (i + 1) * R)
        a_i, b_i, s_B1 = a.data[rows], b.data[:, rows], strengths_BM[:, i : i + 1]
        torch.testing.assert_close(b.grad[:, rows], c * (s_B1 * g).T @ (x @ a_i.T))
        torch.testing.assert_close(a.grad[rows], c * b_i.T @ (s_B1 * g).T @ x)
    for image, s_M in enumerate(strengths_BM):
        update = sum(s_M[i] * b[:, i * R : i * R + R] @ a[i * R : i * R + R] for i in range(M))
        torch.testing.assert_close(y[image], (network.w.base_layer.weight + c * update) @ x[image])


@pytest.mark.parametrize("kind", [Layer, Picture])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_batch_of_mixes_is_a_loop_over_images(kind: type[nn.Module], dtype: torch.dtype, copies: int) -> None:
    network = kind().to(dtype)
    gate = basis(network)
    strengths_BM = drawn()
    shape = (B, 7, 4) if kind is Layer else (B, 4, 5, 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    run = gate.bound(lambda x, t: network(x), strengths_BM)
    together = run(torch.cat([x] * copies), torch.zeros(())).float()
    for i in range(B):
        gate.strengths_BM = None
        with at_weights(network, strengths_BM[i].tolist()):
            alone = network(x[i : i + 1]).float()[0]
        for copy in range(copies):
            # in bfloat16 the output, of up to 40, keeps 8 bits; the factor is weighted here, the activation there
            near = 1e-4 if dtype == torch.float32 else 0.3
            torch.testing.assert_close(together[copy * B + i], alone, rtol=0, atol=near)


def test_rows_that_belong_to_no_image_are_refused() -> None:
    network = Layer()
    gate = basis(network)
    with pytest.raises(ValueError, match="a layer sees 7 rows of 5 images"):
        gate.bound(lambda x, t: network(x), drawn())(torch.zeros(7, 4), torch.zeros(()))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_each_starts_as_a_lora_of_its_own_rank_and_scale(use_rslora: bool) -> None:
    alone, wide = Layer(), Adaptable()
    wide.w = nn.Linear(2000, 3)
    wide.requires_grad_(False)
    add_basis(wide, num_loras=M, rank=R, alpha=3.0, targets=["w"], seed=0, use_rslora=use_rslora)
    (layer,) = lora_layers(wide)
    assert float(layer.lora_A[ADAPTER].weight.data.std()) == pytest.approx(1 / R, rel=0.03)  # of 12,000 draws
    assert not layer.lora_B[ADAPTER].weight.any()
    add_lora(alone.requires_grad_(False), rank=R, alpha=3.0, targets=["w"], seed=0, use_rslora=use_rslora)
    assert layer.scaling[ADAPTER] == pytest.approx(lora_layers(alone)[0].scaling[ADAPTER])


def test_a_weighted_state_is_the_weighted_sum_of_its_loras() -> None:
    network = Layer()
    basis(network, alpha=2.0)
    state, weights = lora_state(network), (0.2, 0.5, 0.3)

    def update(values: dict[str, Tensor]) -> Tensor:
        a, b = (next(tensor for name, tensor in values.items() if f"lora_{factor}" in name) for factor in "AB")
        return b @ a

    parts = sum(w * update(only(state, i, M)) for i, w in enumerate(weights))
    torch.testing.assert_close(update(weighted(state, weights)), parts)
    with at_weights(network, weights):
        (factors,) = attached_factors(network).values()
        torch.testing.assert_close(factors.b @ factors.a, parts)  # alpha / rank of each is 1
    torch.testing.assert_close(update(lora_state(network)), update(state))
    assert alpha_together(2.0, M, use_rslora=False) / (M * R) == 1
