"""Every export format on every family: a fresh pipeline with the file draws the trained adapter's very image."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, lora_state
from rltune.diffusion.sampler import Sampler
from rltune.export.base import EXPORT_FORMATS, Adapter
from tests.tiny_families import PIPELINES, lively
from tests.toys import fill

PROMPTS = ["a cat", "two red birds"]


@torch.no_grad()
def images_of(model: ModelFamily) -> Tensor:
    shape = model.latent_shape(16, 16)
    sampler = Sampler(model, PromptEmbeddings(model), model.read_table(num_steps=2, eta=0.0, shape=shape), 2.0)
    x_BCHW = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    return sampler.decode(sampler.open(PROMPTS, x_BCHW, None).run())


@pytest.mark.parametrize("preset", ["attention", "all"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_file_draws_the_trained_adapter_s_image(name: str, preset: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = str(tmp_path / "model")
    lively(PIPELINES[name]()).save_pretrained(folder)
    model = load_model(folder)
    base = images_of(model)
    layers = model.lora_layers(preset)
    add_lora(model.network, rank=2, alpha=4, targets=layers, seed=0)
    fill(model.network, 0.05)
    trained = images_of(model)
    assert float((trained - base).abs().max()) > 0.01
    adapter = Adapter(lora_state(model.network), rank=2, alpha=4, targets=layers)
    for kind in EXPORT_FORMATS.names():
        format = EXPORT_FORMATS.build(kind, {})
        format.write(model, adapter, tmp_path / kind)
        fresh = load_model(folder)
        list(format.load(fresh, tmp_path / kind))
        torch.testing.assert_close(images_of(fresh), trained, rtol=0, atol=1e-5)  # the scale is in the weights
