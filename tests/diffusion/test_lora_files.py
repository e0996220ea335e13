"""LoRA files as others write them: drawn as diffusers and peft draw them, or refused in one message."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rltune.config.experiment import RunConfig
from rltune.diffusion.lora_files import find_lora_file, load_lora_file
from rltune.errors import UserError
from rltune.training.grids import draw_rows
from rltune.training.model_cache import load_base_model
from rltune.training.streams import Stream, noise
from tests.tiny import tiny_unet

CPU = torch.device("cpu")
PROMPTS = ["a snail", "an octopus"]
STEPS, GUIDANCE = 3, 2.0
UNET = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
Tensors = dict[str, Tensor]
Config = Callable[..., RunConfig]


def plain_pipeline(folder: str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=dtype)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_diffusers(pipeline: StableDiffusionPipeline) -> np.ndarray[Any, Any]:
    latents = noise(3, Stream.EVAL_LATENT, [(i,) for i in range(len(PROMPTS))], (4, 8, 8))
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    return np.asarray(pipeline(PROMPTS, latents=latents.to(pipeline.dtype), **options).images) * 255


def sampled(config: RunConfig, *files: Path) -> np.ndarray[Any, Any]:
    return draw_rows(config, list(files), PROMPTS, num_images=1, seed=3)[-1].astype(float)


def attach(network: Any, targets: list[str], **settings: Any) -> Tensors:
    """Give a network an adapter of alpha / rank 4 with values of its own, and return its weights."""
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, **settings)
    if isinstance(network, UNet2DConditionModel):
        network.add_adapter(config, adapter_name="default")
    else:
        inject_adapter_in_model(config, network, adapter_name="default")
    fill(network)
    return {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(network).items()}


def fill(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        elif "lora_magnitude" in name:
            parameter.data *= 1 + torch.rand(parameter.shape, generator=generator)


def as_kohya(prefix: str, state: Mapping[str, Tensor]) -> Tensors:
    """kohya's names: dots are underscores, each layer has its alpha."""
    file: Tensors = {}
    factors = {"A": "down", "B": "up"}
    for name, tensor in state.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        key = f"{prefix}_{layer.replace('.', '_')}"
        file[f"{key}.lora_{factors[factor]}.weight"] = tensor
        file[f"{key}.alpha"] = torch.tensor(8.0)
    return file


def write_kohya(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    text = {
        f"text_model.{name.removeprefix('text_model.')}": t for name, t in attach(pipeline.text_encoder, TEXT).items()
    }
    file = as_kohya("lora_unet", attach(pipeline.unet, UNET)) | as_kohya("lora_te", text)
    save_file(file, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def write_dora(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    state = attach(pipeline.unet, UNET, use_dora=True)
    metadata = {"r": 2, "lora_alpha": 8, "target_modules": UNET, "use_dora": True}
    pipeline.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    return folder


def write_peft(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    model = get_peft_model(pipeline.unet, LoraConfig(r=2, lora_alpha=8, target_modules=UNET))
    fill(model)
    model.save_pretrained(folder)
    return folder


def write_unprefixed(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    attach(pipeline.unet, UNET)
    pipeline.unet.save_lora_adapter(folder)
    return folder


def load_as_diffusers(pipeline: StableDiffusionPipeline, path: Path) -> None:
    file = find_lora_file(path)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)


def load_as_peft(pipeline: StableDiffusionPipeline, path: Path) -> None:
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, path).base_model.model


def load_as_its_writer(pipeline: StableDiffusionPipeline, path: Path) -> None:
    name = "pytorch_lora_weights.safetensors"
    pipeline.unet.load_lora_adapter(path, prefix=None, weight_name=name, use_safetensors=True)


FORMATS: dict[str, tuple[Callable[..., Path], Callable[..., None]]] = {
    "kohya": (write_kohya, load_as_diffusers),
    "dora": (write_dora, load_as_diffusers),
    "peft": (write_peft, load_as_peft),
    "unprefixed": (write_unprefixed, load_as_its_writer),
}


@pytest.fixture(scope="module")
def configs(make_config: Config) -> dict[str, RunConfig]:
    sampler = {"steps": STEPS, "guidance": GUIDANCE}
    return {name: make_config(sampler=sampler, resources={"precision": name}) for name in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def files(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write(plain_pipeline(str(tiny_pipeline)), tmp_path_factory.mktemp(name))
        for name, (write, _) in FORMATS.items()
    }


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_another_tool_is_drawn_as_that_tool_draws_it(
    configs: dict[str, RunConfig], files: dict[str, Path], name: str, precision: str
) -> None:
    config = configs[precision]
    pipeline = plain_pipeline(config.model.base, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    base = drawn_by_diffusers(pipeline)
    FORMATS[name][1](pipeline, files[name])
    expected = drawn_by_diffusers(pipeline)
    # diffusers keeps its latents in bfloat16, we in float32
    tolerance = 1 if precision == "fp32" else 0.1 * np.abs(expected - base).max()
    assert np.abs(sampled(config, find_lora_file(files[name])) - expected).max() <= tolerance
    assert np.abs(expected - base).max() > 20


@pytest.mark.long
def test_the_text_encoders_part_is_what_tells(configs: dict[str, RunConfig], files: dict[str, Path]) -> None:
    """Without it the kohya file draws other images; a file after it is drawn without it again."""
    config, kohya = configs["fp32"], files["kohya"]
    assert load_lora_file(load_base_model(config, CPU), kohya) == {"unet", "text_encoder"}
    whole = sampled(config, kohya)
    part = kohya.parent / "unet.safetensors"
    save_file({name: tensor for name, tensor in load_file(kohya).items() if "lora_te" not in name}, part)
    assert load_lora_file(load_base_model(config, CPU), part) == {"unet"}
    alone = sampled(config, part)
    assert np.abs(whole - alone).max() > 5
    assert np.abs(sampled(config, kohya, part) - alone).max() <= 1
    late = config.model_copy(update={"sampler": config.sampler.model_copy(update={"base_steps": 1})})
    sampled(late, part)
    with pytest.raises(UserError, match=r"kohya\.safetensors: reaches the text encoder, .* with --base-steps 0"):
        sampled(late, kohya)


# ---- refused


def changed(file: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, target, metadata)
    return target


def with_nan(state: Tensors) -> Tensors:
    name = next(iter(state))
    return {**state, name: torch.full_like(state[name], torch.nan)}


def with_dora_scale(state: Tensors) -> Tensors:
    layers = {name.partition(".")[0] for name in state}
    return state | {f"{layer}.dora_scale": torch.ones(4, 1) for layer in layers}


REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "another family's": (
        "kohya",
        lambda state: {name.replace("down_blocks_0", "down_blocks_7"): tensor for name, tensor in state.items()},
        "a part would be missing: of its .* tensors, .* have no place in this base model.*; take one that was trained",
    ),
    "of other widths": (
        "kohya",
        lambda state: {n: t.repeat(1, 3) if n.endswith("down.weight") else t for n, t in state.items()},
        "not a LoRA that this base model can load .*size mismatch.*; take one that was trained",
    ),
    "kohya's dora": ("kohya", with_dora_scale, r"a form that diffusers does not read \(.*dora_scale"),
    "nothing fits": (
        "unprefixed",
        lambda state: {f"net.{name}": tensor for name, tensor in state.items()},
        r"this base model can load: it has a place for none of its \d+ tensors \(net\..*; take one that was trained",
    ),
    "half a layer": (
        "unprefixed",
        lambda state: dict(sorted(state.items())[1:]),
        "a part is missing: it names layers that it has no values for",
    ),
    "no tensors": ("kohya", lambda state: {}, "not a LoRA, it holds no tensors"),
    "nan": ("kohya", with_nan, "holds values that are not finite; the LoRA is damaged"),
    "peft's alone": (
        "peft",
        lambda state: state,
        r"it is peft's, and adapter_config\.json, which says its strength, is not beside it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_whole_lora_of_this_model_is_refused(
    configs: dict[str, RunConfig], files: dict[str, Path], tmp_path: Path, case: str
) -> None:
    source, change, message = REFUSED[case]
    file = changed(find_lora_file(files[source]), tmp_path / "x.safetensors", change)
    with pytest.raises(UserError, match=rf"^{tmp_path}/x\.safetensors: .*{message}"):
        load_lora_file(load_base_model(configs["fp32"], CPU), file)


def test_an_update_that_is_exactly_zero_is_said(
    configs: dict[str, RunConfig], files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = changed(
        find_lora_file(files["unprefixed"]),
        tmp_path / "x.safetensors",
        lambda state: {name: 0 * tensor if "lora_B" in name else tensor for name, tensor in state.items()},
    )
    load_lora_file(load_base_model(configs["fp32"], CPU), file)
    assert f"{file}: its update is exactly zero, so that it draws the base model's images" in caplog.text


def test_a_folder_holds_one_lora(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{tmp_path}: holds a\.safetensors, b\.safetensors; name one of these files"):
        find_lora_file(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert find_lora_file(tmp_path) == tmp_path / "a.safetensors"
    (tmp_path / "adapter_model.safetensors").touch()
    assert find_lora_file(tmp_path).name == "adapter_model.safetensors"
    (tmp_path / "x.bin").touch()
    with pytest.raises(UserError, match=r"x\.bin: holds no LoRA; name an exported folder or a \.safetensors file"):
        find_lora_file(tmp_path / "x.bin")  # a pickle may run anything


def test_peft_of_another_kind_is_refused(configs: dict[str, RunConfig], files: dict[str, Path], tmp_path: Path) -> None:
    file = changed(find_lora_file(files["peft"]), tmp_path / "adapter_model.safetensors", lambda state: state)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(UserError, match=r"adapter_config\.json is of LOHA, which is no LoRA"):
        load_lora_file(load_base_model(configs["fp32"], CPU), file)


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # peft's, of its own biases
def test_only_plain_layers_are_merged() -> None:
    """A bias of the adapter is no part of a weight: merged, it would be lost."""
    from rltune.diffusion.lora import MergedLora

    torch.manual_seed(0)
    network = tiny_unet().requires_grad_(False)
    attach(network, ["to_out.0"], lora_bias=True)
    x, text = torch.ones(1, 4, 8, 8), torch.ones(1, 6, 32)
    with torch.no_grad():
        expected = network(x, torch.tensor(3), encoder_hidden_states=text).sample
        with MergedLora(network).swapped_in():
            assert torch.equal(network(x, torch.tensor(3), encoder_hidden_states=text).sample, expected)
