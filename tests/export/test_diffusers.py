"""A LoRA file means the same to every reader: plain diffusers, one that ignores alpha, and W + B A by hand."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import add_lora, lora_parameters, lora_state
from rltune.errors import RunError
from rltune.export.diffusers import TOLERANCE, WEIGHT_FILE, check_reload, write_card, write_lora
from rltune.training.evaluation import draw_images
from rltune.training.loading import load_base_model
from rltune.training.setup import eval_image_set, make_sampler

RANK, ALPHA = 2, 8.0
CPU = torch.device("cpu")
ROUNDING = 2e-4
"""Of RGB in [0, 1]. Float32 through 4 steps and the decoder, with updates larger than the weights, differs by up to
5e-5 when products are added up in another order; the adapter itself changes images by a thousand times that."""


def config_of(pipeline: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"base": str(pipeline), "lora": {"rank": RANK, "alpha": ALPHA}},
            "prompts": {"eval": ["a snail", "an octopus"]},
            "sampler": {"steps": 4, "guidance": 2.0},
            "rewards": {"brightness": {}},
            "evaluate": {"prompts": 2, "images_per_prompt": 1},
            **sections,
        }
    )


def drawing(config: RunConfig) -> Callable[[ModelFamily], Tensor]:
    def draw(model: ModelFamily) -> Tensor:
        return draw_images(make_sampler(config, model), eval_image_set(config, model), range(2), CPU)

    return draw


class Trained:
    """A model with a random adapter of alpha / rank 4, its images, and the file it was written to."""

    def __init__(self, pipeline: Path, folder: Path, targets: str = "attention") -> None:
        self.config = config_of(pipeline)
        self.draw = drawing(self.config)
        model = load_base_model(self.config, CPU)
        self.base_B3HW = self.draw(model)
        add_lora(model.network, rank=RANK, alpha=ALPHA, targets=targets, seed=0)
        generator = torch.Generator().manual_seed(5)
        for parameter in lora_parameters(model.network):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.state = lora_state(model.network)
        self.images_B3HW = self.draw(model)
        self.model = model
        self.path = write_lora(model, self.state, rank=RANK, alpha=ALPHA, targets=targets, folder=folder)

    def fresh(self) -> ModelFamily:
        return load_base_model(self.config, CPU)


@pytest.fixture(scope="module", params=["attention", "all"])
def trained(request: pytest.FixtureRequest, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tiny_pipeline, tmp_path_factory.mktemp("lora") / "exports" / "001", request.param)


def greatest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_the_adapter_under_test_changes_the_images(trained: Trained) -> None:
    assert greatest_difference(trained.images_B3HW, trained.base_B3HW) > 0.05


def test_a_reload_gives_the_images_of_the_adapter(trained: Trained) -> None:
    difference = check_reload(trained.path, trained.fresh(), trained.draw, trained.images_B3HW)
    assert difference < ROUNDING
    assert TOLERANCE < 1 / 255  # what passes cannot be seen in 8 bits


PLAIN_DIFFUSERS = """
import json, sys
import torch
from diffusers import StableDiffusionPipeline
pipeline_dir, jobs_file, inputs_file = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(pipeline_dir, safety_checker=None, requires_safety_checker=False)
x, t, text = torch.load(inputs_file)
for folder, name, output_file in json.load(open(jobs_file)):
    pipeline.load_lora_weights(folder, weight_name=name)
    with torch.no_grad():
        torch.save(pipeline.unet(x, t, encoder_hidden_states=text).sample, output_file)
    pipeline.unload_lora_weights()
assert not [name for name in sys.modules if name.partition(".")[0] == "rltune"]
"""


def without_metadata(path: Path, target: Path) -> Path:
    """Copy the file as a reader sees it that knows nothing of adapter settings."""
    with safe_open(path, framework="pt") as file:
        assert "lora_alpha" in json.dumps(file.metadata()), "the file says nothing that could be ignored"
    save_file(load_file(path), target)
    with safe_open(target, framework="pt") as file:
        assert not file.metadata()
    return target


@pytest.mark.slow
def test_plain_diffusers_in_another_process_sees_the_same_network(tiny_pipeline: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(500)
    text = torch.randn(2, 16, 32, generator=generator)
    torch.save((*inputs, text), tmp_path / "inputs.pt")

    def output_of(model: ModelFamily) -> Tensor:
        with torch.no_grad():
            return model.network(*inputs, encoder_hidden_states=text).sample

    jobs, expected = [], []
    for targets in ("attention", "all"):
        trained = Trained(tiny_pipeline, tmp_path / targets, targets)
        stripped = without_metadata(trained.path, tmp_path / f"{targets}.safetensors")
        for path in (trained.path, stripped):
            jobs.append([str(path.parent), path.name, str(tmp_path / f"output{len(jobs)}.pt")])
            expected.append(output_of(trained.model))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    files = [tiny_pipeline, tmp_path / "jobs.json", tmp_path / "inputs.pt"]
    command = [sys.executable, "-c", PLAIN_DIFFUSERS, *map(str, files)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    base = output_of(trained.fresh())
    for (_, name, output_file), wanted in zip(jobs, expected, strict=True):
        output = torch.load(output_file)
        # outputs are of order 1; float32 rounding through some ten layers
        assert greatest_difference(output, wanted) < 1e-5, name
        assert greatest_difference(output, base) > 0.05, name


def test_a_reader_that_ignores_alpha_gets_the_same_images(trained: Trained, tmp_path: Path) -> None:
    path = without_metadata(trained.path, tmp_path / "plain.safetensors")
    assert check_reload(path, trained.fresh(), trained.draw, trained.images_B3HW) < ROUNDING


def test_the_weights_plus_b_times_a_give_the_same_images(trained: Trained) -> None:
    model = trained.fresh()
    state = load_file(trained.path)
    weights = dict(model.network.named_parameters())
    downs = [name for name in state if name.endswith(".lora_A.weight")]
    assert 2 * len(downs) == len(state)  # nothing else is in the file
    for name in downs:
        module = name.removeprefix("unet.").removesuffix(".lora_A.weight")
        a, b = state[name], state[name.replace(".lora_A.", ".lora_B.")]
        weight = weights[f"{module}.weight"]
        # a convolution's A is a convolution of its own, its B a 1 x 1 one: their product over the rank is the update
        weight.data += (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    images_B3HW = trained.draw(model)
    assert greatest_difference(images_B3HW, trained.images_B3HW) < ROUNDING


def test_the_file_is_readable_by_others(trained: Trained) -> None:
    assert trained.path.name == WEIGHT_FILE
    assert trained.path.stat().st_mode & 0o777 == 0o644


def tampered(trained: Trained, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    with safe_open(trained.path, framework="pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(trained.path)), target, metadata=metadata)
    return target


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")  # the missing part
@pytest.mark.parametrize(
    "change",
    [
        lambda state: {name: 0.5 * tensor if ".lora_B." in name else tensor for name, tensor in state.items()},
        lambda state: {name: tensor for i, (name, tensor) in enumerate(sorted(state.items())) if i >= 4},
        lambda state: {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()},
    ],
    ids=["half as strong", "a part is missing", "not finite"],
)
def test_a_file_that_gives_other_images_is_refused(
    tiny_pipeline: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    trained = Trained(tiny_pipeline, tmp_path / "lora")
    path = tampered(trained, tmp_path / "other.safetensors", change)
    with pytest.raises(RunError, match=r"other\.safetensors: reloaded with diffusers it gives other images .* not fit"):
        check_reload(path, trained.fresh(), trained.draw, trained.images_B3HW)


def test_an_adapter_whose_scale_is_one_is_written_as_it_is(tiny_pipeline: Path, tmp_path: Path) -> None:
    model = load_base_model(config_of(tiny_pipeline), CPU)
    add_lora(model.network, rank=RANK, alpha=RANK, targets="attention", seed=0)
    state = lora_state(model.network)
    path = write_lora(model, state, rank=RANK, alpha=RANK, targets="attention", folder=tmp_path)
    assert {name.removeprefix("unet."): tensor.tolist() for name, tensor in load_file(path).items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }


def test_the_card_is_json(tmp_path: Path) -> None:
    write_card(tmp_path, {"trial": "001", "settings": {"optim.lr": 1e-3}})
    assert json.loads((tmp_path / "rltune.json").read_text()) == {"trial": "001", "settings": {"optim.lr": 1e-3}}
