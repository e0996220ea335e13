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
from rltune.diffusion.lora_files import WEIGHT_FILE
from rltune.errors import RunError
from rltune.export.diffusers import TOLERANCE, Reload, check_adapter, check_reload, rounding_of, write_card, write_lora
from rltune.training.evaluation import draw_images
from rltune.training.model_cache import load_base_model
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

    def __init__(self, pipeline: Path, folder: Path, targets: str = "attention", size: float = 0.3) -> None:
        self.config = config_of(pipeline)
        self.draw = drawing(self.config)
        model = load_base_model(self.config, CPU)
        self.base_B3HW = self.draw(model)
        add_lora(model.network, rank=RANK, alpha=ALPHA, targets=targets, seed=0)
        generator = torch.Generator().manual_seed(5)
        for parameter in lora_parameters(model.network):
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
        self.state = lora_state(model.network)
        self.images_B3HW = self.draw(model)
        self.model = model
        self.path = write_lora(model, self.state, rank=RANK, alpha=ALPHA, targets=targets, folder=folder)

    def fresh(self) -> ModelFamily:
        return load_base_model(self.config, CPU)

    def check(self, path: Path) -> Reload:
        images = {"base_B3HW": self.base_B3HW, "expected_B3HW": self.images_B3HW}
        return check_reload(path, self.fresh(), self.draw, state=self.state, scale=ALPHA / RANK, **images)


@pytest.fixture(scope="module", params=["attention", "all"])
def trained(request: pytest.FixtureRequest, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tiny_pipeline, tmp_path_factory.mktemp("lora") / "exports" / "001", request.param)


def greatest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_the_adapter_under_test_changes_the_images(trained: Trained) -> None:
    assert greatest_difference(trained.images_B3HW, trained.base_B3HW) > 0.05


def test_a_reload_gives_the_images_of_the_adapter(trained: Trained) -> None:
    reload = trained.check(trained.path)
    assert reload.difference < ROUNDING
    assert reload.effect == greatest_difference(trained.images_B3HW, trained.base_B3HW)
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
    assert trained.check(path).difference < ROUNDING


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


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("unet.down_blocks", "unet.lower_blocks"): tensor for name, tensor in state.items()}


def swapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first layer's weights in the second and the other way round, of the same shapes."""
    one, other = sorted({name.rpartition(".lora_")[0] for name in state if "attn1.to_" in name})[:2]
    places = {one: other, other: one}

    def place(name: str) -> str:
        layer, mark, rest = name.rpartition(".lora_")
        return places.get(layer, layer) + mark + rest

    return {place(name): tensor for name, tensor in state.items()}


CHANGES: dict[str, tuple[Change, str]] = {
    "half as strong": (
        lambda state: {name: 0.5 * tensor if ".lora_B." in name else tensor for name, tensor in state.items()},
        "its update of .* is another than the trained one",
    ),
    "in the wrong layers": (swapped, "its update of .* is another than the trained one"),
    "a part is missing": (
        lambda state: {name: tensor for i, (name, tensor) in enumerate(sorted(state.items())) if i >= 4},
        "it leaves out down_blocks",
    ),
    "half a layer is missing": (
        lambda state: {name: tensor for i, (name, tensor) in enumerate(sorted(state.items())) if i >= 1},
        "a part is missing: it names layers that it has no values for",
    ),
    "a part binds to nothing": (renamed, "a part would be missing: of its .* tensors, .* have no place"),
    "nothing binds": (
        lambda state: {name.replace("blocks", "layers").replace("mid_", "m_"): t for name, t in state.items()},
        "not a LoRA that this base model can load",
    ),
    "not finite": (
        lambda state: {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()},
        "holds values that are not finite",
    ),
}


@pytest.fixture(scope="module")
def faint(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Far below what 8 bits show, so that images alone would let any file pass."""
    trained = Trained(tiny_pipeline, tmp_path_factory.mktemp("faint"), size=1e-4)
    assert 0 < greatest_difference(trained.images_B3HW, trained.base_B3HW) < 1e-5
    assert trained.check(trained.path).difference < 1e-5
    return trained


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_not_the_adapter_is_refused_however_small_its_effect(
    faint: Trained, tmp_path: Path, change: str
) -> None:
    path = tampered(faint, tmp_path / "other.safetensors", CHANGES[change][0])
    with pytest.raises(RunError, match=rf"other\.safetensors: .*{CHANGES[change][1]}.*; the file is not fit for use"):
        faint.check(path)


def test_images_are_compared_too(trained: Trained) -> None:
    """By their size, and by the share of the effect: the layers of the file are right here, what draws them is not."""
    images = {"base_B3HW": trained.base_B3HW, "expected_B3HW": trained.images_B3HW}

    def check(error: Tensor, size: float = 1.0) -> Reload:
        """Draw images whose effect is ``size`` times that of the adapter, off by ``error``."""
        shown = {**images, "expected_B3HW": trained.base_B3HW + size * (trained.images_B3HW - trained.base_B3HW)}
        drawn = {"draw": lambda model: shown["expected_B3HW"] + error}
        return check_reload(trained.path, trained.fresh(), **drawn, state=trained.state, scale=ALPHA / RANK, **shown)

    flat = torch.ones_like(trained.images_B3HW)
    assert check(0.9 * TOLERANCE * flat).difference == pytest.approx(0.9 * TOLERANCE, rel=1e-3)
    with pytest.raises(RunError, match=r"it gives other images than the trained adapter, by 0\.0022 where 0\.002"):
        check(1.1 * TOLERANCE * flat)
    # an effect of a thousandth, the images of the base model: not to be seen, and all of the effect
    effect = trained.images_B3HW - trained.base_B3HW
    with pytest.raises(RunError, match=r"its images differ from the trained adapter's by .*, and those from the base"):
        check(-1e-3 * effect, size=1e-3)


def test_an_adapter_that_does_nothing_is_named() -> None:
    state = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.zeros(3, 2)}
    with pytest.raises(RunError, match="the adapter is exactly zero, so that the LoRA would be the base model"):
        check_adapter(state)
    check_adapter({**state, "x.lora_B.weight": torch.tensor([[0.0, 1e-30]])})
    with pytest.raises(RunError, match=r"the adapter's x\.lora_A\.weight is not finite"):
        check_adapter({**state, "x.lora_A.weight": torch.tensor([[0.0, torch.inf]])})


def test_what_another_number_format_changes_is_a_figure(trained: Trained) -> None:
    """By hand: peft casts a loaded adapter to the format of its base."""
    half = config_of(trained.config.model.base, resources={"precision": "bf16"})
    by_hand = load_base_model(half, CPU)
    by_hand.pipeline.load_lora_weights(trained.path)
    assert {p.dtype for p in lora_parameters(by_hand.network)} == {torch.bfloat16}
    expected = greatest_difference(drawing(half)(by_hand).float(), trained.images_B3HW)
    assert rounding_of(trained.path, load_base_model(half, CPU), trained.draw, trained.images_B3HW) == expected
    assert expected > TOLERANCE  # the very difference that says nothing of the file


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
