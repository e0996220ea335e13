"""The file means the same to every reader: plain diffusers, one that ignores alpha, and W + B A by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import adapters_as_loaded, add_lora, load_lora_state
from rltune.diffusion.lora_files import WEIGHT_FILE
from rltune.export.diffusers import Diffusers
from rltune.export.proof import check_reload
from tests.export.random_lora import RandomLora, greatest_difference

ROUNDING = 2e-4
"""Of RGB in [0, 1]: see test_conformance."""


class Written:
    """A random adapter of alpha / rank 4, and its file."""

    def __init__(self, pipeline: Path, folder: Path, targets: str) -> None:
        self.lora = RandomLora(pipeline, targets)
        (self.path,) = Diffusers().write(self.lora.model, self.lora.adapter, folder)


@pytest.fixture(scope="module", params=["attention", "all"])
def written(request: pytest.FixtureRequest, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tiny_pipeline, tmp_path_factory.mktemp("lora") / "exports" / "001", request.param)


@pytest.mark.slow
def test_the_file_is_where_diffusers_looks_for_it(written: Written) -> None:
    assert written.path.name == WEIGHT_FILE


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


@pytest.mark.long
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
        written = Written(tiny_pipeline, tmp_path / targets, targets)
        stripped = without_metadata(written.path, tmp_path / f"{targets}.safetensors")
        for path in (written.path, stripped):
            jobs.append([str(path.parent), path.name, str(tmp_path / f"output{len(jobs)}.pt")])
            expected.append(output_of(written.lora.model))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    files = [tiny_pipeline, tmp_path / "jobs.json", tmp_path / "inputs.pt"]
    command = [sys.executable, "-c", PLAIN_DIFFUSERS, *map(str, files)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    base = output_of(written.lora.fresh())
    for (_, name, output_file), wanted in zip(jobs, expected, strict=True):
        output = torch.load(output_file)
        # outputs are of order 1; float32 rounding through some ten layers
        assert greatest_difference(output, wanted) < 1e-5, name
        assert greatest_difference(output, base) > 0.05, name


def test_a_reader_that_ignores_alpha_gets_the_same_images(written: Written, tmp_path: Path) -> None:
    without_metadata(written.path, tmp_path / WEIGHT_FILE)
    lora = written.lora
    assert check_reload(Diffusers(), tmp_path, lora.fresh(), lora.trained).difference < ROUNDING


def test_the_weights_plus_b_times_a_give_the_same_images(written: Written) -> None:
    model = written.lora.fresh()
    state = load_file(written.path)
    weights = dict(model.network.named_parameters())
    downs = [name for name in state if name.endswith(".lora_A.weight")]
    assert 2 * len(downs) == len(state)  # nothing else is in the file
    for name in downs:
        module = name.removeprefix("unet.").removesuffix(".lora_A.weight")
        a, b = state[name], state[name.replace(".lora_A.", ".lora_B.")]
        weight = weights[f"{module}.weight"]
        # a convolution's A is a convolution of its own, its B a 1 x 1 one: their product over the rank is the update
        weight.data += (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    trained = written.lora.trained
    assert greatest_difference(trained.draw(model), trained.images_B3HW) < ROUNDING


@pytest.mark.slow
def test_an_adapter_whose_scale_is_one_is_written_as_it_is(tiny_pipeline: Path, tmp_path: Path) -> None:
    lora = RandomLora(tiny_pipeline, rank=2, alpha=2.0)
    (path,) = Diffusers().write(lora.model, lora.adapter, tmp_path)
    assert {name.removeprefix("unet."): tensor.tolist() for name, tensor in load_file(path).items()} == {
        name: tensor.tolist() for name, tensor in lora.adapter.state.items()
    }


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_in_half_precision_it_is_what_an_evaluation_has_drawn(
    tiny_pipeline: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    """Both round the factors, with the scale in them, and DoRA's magnitudes to bfloat16: the same images to the bit."""
    trained = RandomLora(tiny_pipeline, "all", size=0.1, **options)
    Diffusers().write(trained.model, trained.adapter, tmp_path)
    evaluated, loaded = trained.fresh("bf16"), trained.fresh("bf16")
    add_lora(evaluated.network, rank=2, alpha=8.0, targets="all", seed=0, **options)
    load_lora_state(evaluated.network, dict(trained.adapter.state))
    exact = trained.trained.draw(evaluated)
    with adapters_as_loaded(evaluated.network):
        seen = trained.trained.draw(evaluated)
    assert torch.equal(trained.trained.draw(evaluated), exact)
    list(Diffusers().load(loaded, tmp_path))
    assert torch.equal(seen, trained.trained.draw(loaded))
    assert not torch.equal(seen, exact)
