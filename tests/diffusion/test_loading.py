"""The frozen weights of a pipeline lie in their files, so that the processes of a node hold them once."""

import sys
from pathlib import Path

import pytest
import torch

from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import MergedLora, add_lora, lora_parameters
from tests.mappings import is_mapped

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")


@pytest.mark.long
def test_weights_in_the_precision_of_their_file_are_mapped(tiny_pipeline: Path) -> None:
    model = load_model(str(tiny_pipeline))
    model.encode_prompts(["a cat"])  # moves the encoder to where it runs and back
    for component, file in FILES.items():
        network = getattr(model.pipeline, component)
        assert all(is_mapped(parameter, tiny_pipeline / file) for parameter in network.parameters()), component


@pytest.mark.long
def test_adapters_and_merged_weights_leave_the_mapping_where_it_is(tiny_pipeline: Path) -> None:
    model, path = load_model(str(tiny_pipeline)), tiny_pipeline / FILES["unet"]
    content = path.read_bytes()
    own = dict(model.network.named_parameters())
    add_lora(model.network, rank=2, alpha=2, targets="attention", seed=0)
    adapters = lora_parameters(model.network)
    for parameter in adapters:
        torch.nn.init.normal_(parameter)
    x_BCHW, text = torch.ones(1, 4, 8, 8), {"text": torch.ones(1, 16, 32)}
    with torch.no_grad(), MergedLora(model.network).swapped_in():
        merged = model.predict(x_BCHW, torch.tensor(1), text)
        adapted = [parameter for parameter in own.values() if not is_mapped(parameter, path)]
        assert adapted
    model.predict(x_BCHW, torch.tensor(1), text).sum().backward()
    torch.optim.SGD(adapters, lr=0.1).step()
    assert all(parameter.grad is not None for parameter in adapters)
    assert all(is_mapped(parameter, path) for parameter in own.values())
    assert path.read_bytes() == content
    assert merged.isfinite().all()
