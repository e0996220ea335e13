"""Every export format on every family: a fresh pipeline with the file draws the trained adapter's very image."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import add_lora, lora_state
from rltune.diffusion.sampler import Sampler
from rltune.errors import RunError
from rltune.export.base import EXPORT_FORMATS, Adapter
from tests.family_calls import CASES, PROMPTS, Case, theirs
from tests.tiny_families import family_of, fresh, made, shared_out
from tests.toys import fill

CALLS = (
    "sd eta 1",
    "sdxl",
    "sd3",
    "flux dev",
    "flux2 klein",
    "flux2 dev",
    "qwen-image",
    "z-image",
    "chroma",
    "sana",
    "sana-sprint",
    "lumina2",
    "aura-flow",
)
"""One of each family."""
UNKNOWN_TO_COMFYUI = ("sana", "sana-sprint", "lumina2")


def drawn(model: ModelFamily, case: Case) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, *noises = torch.randn(case.steps + 1, 2, *model.latent_shape(*case.sizes[0]), generator=generator)
    return x, noises


@torch.no_grad()
def images_of(model: ModelFamily, case: Case, embeddings: PromptEmbeddings) -> Tensor:
    table = model.read_table(num_steps=case.steps, eta=case.eta, shape=model.latent_shape(*case.sizes[0]))
    sampler = Sampler(model, embeddings, table, case.guidance, negative_prompt=case.negative)
    x, noises = drawn(model, case)
    return sampler.decode(sampler.open(PROMPTS, x, noises.__getitem__).run())


@pytest.mark.long
@pytest.mark.parametrize("name", shared_out(CALLS, ("sdxl", "flux2 dev", "sana")))
def test_a_file_draws_the_trained_adapter_s_image_in_rltune_and_in_plain_diffusers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    embeddings = PromptEmbeddings(family_of(made(case.make)))
    model = family_of(fresh(case.make))
    base = images_of(model, case, embeddings)
    layers = model.lora_layers("all")
    add_lora(model.network, rank=2, alpha=4, targets=layers, seed=0)
    fill(model.network, 0.05)
    trained = images_of(model, case, embeddings)
    assert float((trained - base).abs().max()) > 0.01
    adapter = Adapter(lora_state(model.network), rank=2, alpha=4, targets=layers)
    for kind in EXPORT_FORMATS.names():
        format = EXPORT_FORMATS.build(kind, {})
        if kind == "comfyui" and name in UNKNOWN_TO_COMFYUI:
            with pytest.raises(RunError, match=r"ComfyUI has no names for the layers of \w+; export it for diffusers"):
                format.write(model, adapter, tmp_path / kind)
            continue
        format.write(model, adapter, tmp_path / kind)
        other = family_of(fresh(case.make))
        list(format.load(other, tmp_path / kind))
        torch.testing.assert_close(images_of(other, case, embeddings), trained, rtol=0, atol=1e-5)
    plain = fresh(case.make)
    plain.load_lora_weights(tmp_path / "diffusers")  # at weight 1: the scale is in the numbers
    x, noises = drawn(model, case)
    image = theirs(plain, case, case.sizes[0], x, noises)
    torch.testing.assert_close(image, trained, rtol=0, atol=5e-5)
