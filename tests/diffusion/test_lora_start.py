"""Training starts from a LoRA of any layout as the very network that the LoRA makes of the base model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rltune.config.model_section import LoraConfig as Settings
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.lora_start import read_lora
from rltune.diffusion.outline import find_pipeline, load_outline
from rltune.errors import UserError
from rltune.training.adapters.lora import attach_started_lora, read_start
from tests.tiny_families import lively, sdxl
from tests.toys import fill

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
Tensors = dict[str, Tensor]


def plain(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


def trained(pipeline: StableDiffusionPipeline, **settings: Any) -> Tensors:
    """Give the network an adapter of alpha / rank 4, and return its weights."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": TARGETS, **settings})
    pipeline.unet.add_adapter(config, adapter_name="default")
    fill(pipeline.unet, 0.2)
    return {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(pipeline.unet).items()}


def as_diffusers(pipeline: StableDiffusionPipeline, folder: Path, **settings: Any) -> None:
    state = trained(pipeline, **settings)
    metadata = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS, **settings}
    pipeline.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)


def as_own(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    trained(pipeline)
    pipeline.unet.save_lora_adapter(folder)


def as_kohya(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    factors = {"A": "down", "B": "up"}
    file: Tensors = {}
    for name, tensor in trained(pipeline).items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        key = f"lora_unet_{layer.replace('.', '_')}"
        file |= {f"{key}.lora_{factors[factor]}.weight": tensor, f"{key}.alpha": torch.tensor(8.0)}
    folder.mkdir()
    save_file(file, folder / "any name.safetensors")


def as_peft(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    model = get_peft_model(pipeline.unet, LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS))
    fill(model, 0.2)
    model.save_pretrained(folder)


LAYOUTS: dict[str, Callable[[StableDiffusionPipeline, Path], None]] = {
    "diffusers": as_diffusers,
    "the network's own": as_own,
    "kohya": as_kohya,
    "peft": as_peft,
    "dora": lambda pipeline, folder: as_diffusers(pipeline, folder, use_dora=True),
    "convolutions": lambda pipeline, folder: as_diffusers(pipeline, folder, target_modules=["conv1", "proj_in"]),
}
X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def output(network: Any) -> Tensor:
    result: Tensor = network(X, torch.tensor(3), encoder_hidden_states=TEXT).sample
    return result


@pytest.mark.slow
@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.long), {"alpha": 3, "rslora": True}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_step_is_taken_from_what_the_lora_draws(
    tiny_pipeline: Path, tmp_path: Path, layout: str, options: dict[str, Any]
) -> None:
    """Whatever alpha the file and the experiment have."""
    pipeline = plain(tiny_pipeline)
    LAYOUTS[layout](pipeline, tmp_path / "lora")
    expected = output(pipeline.unet)
    model = load_model(str(tiny_pipeline))
    base = output(model.network)
    assert float((expected - base).abs().max()) > 0.05
    settings = Settings.model_validate(
        {"rank": 2, "targets": "all", "start": str(tmp_path / "lora"), "dora": layout == "dora", **options}
    )
    attach_started_lora(model, settings, seed=0)
    torch.testing.assert_close(output(model.network), expected, rtol=1e-4, atol=1e-4)
    parameters = lora_parameters(model.network)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters)


@pytest.mark.slow
def test_a_dora_starts_from_a_plain_lora_as_that_lora(tiny_pipeline: Path, tmp_path: Path) -> None:
    pipeline = plain(tiny_pipeline)
    as_diffusers(pipeline, tmp_path)
    model = load_model(str(tiny_pipeline))
    attach_started_lora(model, Settings(rank=2, start=str(tmp_path), dora=True), seed=0)
    torch.testing.assert_close(output(model.network), output(pipeline.unet), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_looked_at_before_any_weights_are(tiny_pipeline: Path, tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](plain(tiny_pipeline), tmp_path / "lora")
    folder = find_pipeline(str(tiny_pipeline))
    assert folder is not None
    outline, model = load_outline(folder, base="tiny"), load_model(str(tiny_pipeline))
    seen, read = (read_lora(each, tmp_path / "lora") for each in (outline, model))
    assert {name: (each.a.shape, each.b.shape) for name, each in seen.items()} == {
        name: (each.a.shape, each.b.shape) for name, each in read.items()
    }
    assert not lora_parameters(outline.network)
    assert not lora_parameters(model.network)


# ---- what cannot be started from


def text_too(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), pipeline.text_encoder, adapter_name="default")
    text = get_peft_model_state_dict(pipeline.text_encoder)
    pipeline.save_lora_weights(folder, unet_lora_layers=trained(pipeline), text_encoder_lora_layers=text)


def of_sdxl(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    other = lively(sdxl())
    other.unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS), adapter_name="default")
    other.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(other.unet))


def cut(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    as_diffusers(pipeline, folder)
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def mixed(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    as_diffusers(pipeline, folder)
    file = next(folder.glob("*.safetensors"))
    state = load_file(file)
    for name in (name for name in state if "down_blocks" in name):
        state[name] = state[name].repeat(*(2, 1) if "lora_A" in name else (1, 2))
    save_file(state, file)


def biased(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    as_diffusers(pipeline, folder, target_modules=["to_out.0"], lora_bias=True)


FAULTS: dict[str, tuple[Callable[[StableDiffusionPipeline, Path], object], str]] = {
    "nothing there": (lambda pipeline, folder: None, "no such file or folder; name an exported folder or a"),
    "nothing in it": (lambda pipeline, folder: folder.mkdir(), "holds no LoRA; name an exported folder"),
    "another family": (of_sdxl, "not a LoRA that this base model can load"),
    "half a file": (cut, "not a LoRA, it cannot be read as safetensors"),
    "another rank": (
        lambda pipeline, folder: as_diffusers(pipeline, folder, r=4),
        r"has rank 4, and model\.lora\.rank is 2; write model\.lora\.rank: 4$",
    ),
    "several ranks": (mixed, "its layers have ranks from 2 to 4; one of a single rank is needed"),
    "more layers": (
        lambda pipeline, folder: as_diffusers(pipeline, folder, target_modules=["to_q", "proj_in", "conv1"]),
        r"which is not among model\.lora\.targets; write all, or model\.lora\.targets: \[proj_in, to_q, conv1\]$",
    ),
    "a bias": (biased, "has a bias in its adapter, which rltune cannot train"),
    "a dora": (LAYOUTS["dora"], r"is a DoRA; write model\.lora\.dora: true$"),
    "the text encoder too": (text_too, "it changes the text_encoder too, which stays frozen here"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # peft's, of its own biases
@pytest.mark.parametrize("case", FAULTS)
def test_what_cannot_be_started_from_is_one_message_with_and_without_weights(
    tiny_pipeline: Path, tmp_path: Path, case: str
) -> None:
    write, message = FAULTS[case]
    write(plain(tiny_pipeline), tmp_path / "lora")
    settings = Settings(rank=2, start=str(tmp_path / "lora"))
    models = [load_model(str(tiny_pipeline)), load_outline(tiny_pipeline, base="tiny")]
    for model in models[: 1 if case == "the text encoder too" else 2]:  # of which an outline has no layers
        with pytest.raises(UserError, match=rf"^model\.lora\.start: {tmp_path / 'lora'}.*{message}"):
            read_start(model, settings)
        assert not lora_parameters(model.network)


@pytest.mark.slow
def test_a_lora_that_fits_is_taken_without_a_word(
    tiny_pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    as_diffusers(plain(tiny_pipeline), tmp_path)
    model = load_outline(tiny_pipeline, base="tiny")
    assert read_start(model, Settings(rank=2, start=str(tmp_path)))
    assert not [record for record in caplog.records if record.name.startswith("rltune")]
    add_lora(model.network, rank=2, alpha=2, targets="attention", seed=0)  # nothing is left in its way
