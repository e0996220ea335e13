"""What every registered export format must do; a new one joins by its name.

The file is the trained adapter or it is refused: whatever was adapted, at whatever scale, and however small its effect.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, is_dataclass
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rltune.diffusion.lora import adapter_updates
from rltune.errors import RunError, UserError
from rltune.export.base import EXPORT_FORMATS, Adapter, ExportFormat
from rltune.export.proof import check_reload, rounding_of
from tests.export.random_lora import RandomLora, config_of, drawing, greatest_difference

CASES = {
    "attention": {"targets": "attention", "rank": 2, "alpha": 8.0},
    "all": {"targets": "all", "rank": 4, "alpha": 1.0},
    "rslora": {"targets": "all", "rank": 4, "alpha": 2.0, "use_rslora": True},
    "dora": {"targets": "all", "rank": 4, "alpha": 2.0, "use_rslora": True, "use_dora": True, "size": 0.1},
    "time": {"targets": ("linear_1", "linear_2", "time_emb_proj", "conv_in", "conv"), "rank": 16, "alpha": 4.0},
}
"""Linear layers, convolutions of 1 x 1 and 3 x 3 and with a stride, the time embedding. Alpha is never the rank."""
ROUNDING = 2e-4
"""Of RGB in [0, 1]. Float32 through 4 steps and the decoder, with updates larger than the weights, differs by up to
5e-5 when products are added up in another order; the adapter itself changes images by a thousand times that."""
HALF = 2**-7
"""Of an update: bfloat16 has 8 bits, so that each of two factors is rounded by up to 2^-9 of it, and their product."""

WITHOUT_DORA = ("comfyui",)
"""Formats of tools that compute DoRA otherwise, which refuse it."""
IN_WEIGHTS = ("fused",)
"""Formats whose files have the update in the model's own weights: no tensor of theirs is an adapter's, and what is far
fainter than the weights is rounded away. ``test_fused.py`` has what would be another adapter there."""


class Written:
    """A random adapter, and a folder that holds it in every format at once."""

    def __init__(self, lora: RandomLora, folder: Path) -> None:
        self.lora = lora
        self.folder = folder
        left_out = WITHOUT_DORA if lora.adapter.use_dora else ()
        self.formats = [name for name in EXPORT_FORMATS.names() if name not in left_out]
        self.files = {name: build(name).write(lora.model, lora.adapter, folder) for name in self.formats}


def build(name: str) -> ExportFormat:
    return EXPORT_FORMATS.build(name, {})


every_format = pytest.mark.parametrize("name", EXPORT_FORMATS.names())
every_adapter_file = pytest.mark.parametrize("name", [n for n in EXPORT_FORMATS.names() if n not in IN_WEIGHTS])


def is_refused(written: Written, name: str) -> bool:
    """Whether a tool has no form for the adapter, and the format says so."""
    if name in written.formats:
        return False
    with pytest.raises(RunError, match="export it for diffusers or peft"):
        build(name).write(written.lora.model, written.lora.adapter, written.folder)
    return True


@pytest.fixture(scope="module", params=CASES)
def written(
    request: pytest.FixtureRequest, tiny_pipeline: Path, deep_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> Written:
    base = deep_pipeline if request.param in ("all", "time") else tiny_pipeline
    return Written(RandomLora(base, **CASES[request.param]), tmp_path_factory.mktemp("lora") / "exports")


@pytest.fixture(scope="module")
def faint(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Far below what 8 bits show, so that images alone would let any file pass."""
    lora = RandomLora(tiny_pipeline, size=1e-4)
    assert 0 < greatest_difference(lora.trained.images_B3HW, lora.trained.base_B3HW) < 1e-5
    return Written(lora, tmp_path_factory.mktemp("faint"))


@every_format
def test_a_format_says_what_it_is(name: str) -> None:
    form = build(name)
    assert form.reader
    assert is_dataclass(form)
    with pytest.raises(FrozenInstanceError):
        form.reader = "another"


@pytest.mark.slow
def test_formats_share_a_folder(written: Written) -> None:
    files = [file for files in written.files.values() for file in files]
    assert len(files) == len(set(files))
    assert sorted(files) == sorted(file for file in written.folder.rglob("*") if file.is_file())


@pytest.mark.slow
@every_format
def test_a_reload_gives_the_images_of_the_adapter(written: Written, name: str) -> None:
    if is_refused(written, name):
        return
    lora = written.lora
    reload = check_reload(build(name), written.folder, lora.fresh(), lora.trained)
    assert reload.difference < ROUNDING
    assert reload.effect == greatest_difference(lora.trained.images_B3HW, lora.trained.base_B3HW)
    assert reload.effect > 0.05  # or nothing would have been shown


@every_format
def test_every_layer_gets_the_trained_update(written: Written, name: str) -> None:
    if is_refused(written, name):
        return
    expected = dict(adapter_updates(written.lora.model.network))
    loaded = dict(build(name).load(written.lora.fresh(), written.folder))
    assert loaded.keys() == expected.keys()
    for layer, update in loaded.items():
        torch.testing.assert_close(update, expected[layer], rtol=1e-4, atol=1e-5)  # float32, sums of up to 16 products


@pytest.mark.long
@every_format
def test_a_base_model_in_bfloat16_gets_the_same_up_to_its_rounding(written: Written, name: str) -> None:
    if is_refused(written, name):
        return
    lora = written.lora
    half = lora.fresh("bf16")
    weights = dict(half.network.named_parameters())
    exact = dict(adapter_updates(lora.model.network))
    for layer, update in build(name).load(half, written.folder):
        # of DoRA, and of weights that have the update in them, the base model's own weight is rounded, too
        is_whole = lora.adapter.use_dora or name in IN_WEIGHTS
        size = exact[layer].norm() + (weights[f"{layer}.weight"].float().norm() if is_whole else 0)
        assert float((update.float() - exact[layer]).norm()) < HALF * float(size), layer
    base_B3HW = drawing(config_of(lora.pipeline))(lora.fresh("bf16"))
    effect = greatest_difference(lora.trained.draw(half), base_B3HW)
    rounding = rounding_of(build(name), written.folder, lora.fresh("bf16"), lora.trained)
    assert 0 < rounding < effect / 2  # bfloat16 through four steps changes the tiny model's images by some 0.02


@pytest.mark.slow
@every_format
def test_what_a_user_is_told_to_type_loads_it(written: Written, name: str) -> None:
    if is_refused(written, name):
        return
    pipeline = StableDiffusionPipeline.from_pretrained(written.lora.pipeline, safety_checker=None)
    code = build(name).how_to_load(written.lora.model, written.folder)
    scope = {"pipeline": pipeline}
    exec(code, scope)
    pipeline = scope["pipeline"]  # a whole one is another
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 32, generator=generator)
    with torch.no_grad():
        output = pipeline.unet(x, 500, encoder_hidden_states=text).sample
        expected = written.lora.model.network(x, 500, encoder_hidden_states=text).sample
        base = written.lora.fresh().network(x, 500, encoder_hidden_states=text).sample
    assert greatest_difference(output, base) > 0.05
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)  # some ten layers, updates of order 1


# ---- what is not the adapter

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]


SECOND = re.compile(r"\.lora_(B|up)\.weight$")
"""How the second factor of a layer is called."""
ANY = re.compile(r"\.(lora_(A|B|down|up)\.weight|alpha)$")


def scaled(factor: float, which: re.Pattern[str] = ANY) -> Change:
    return lambda state: {name: tensor * factor if which.search(name) else tensor for name, tensor in state.items()}


def renamed(*changes: tuple[str, str]) -> Change:
    def rename(state: Tensors) -> Tensors:
        for old, new in changes:
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
        return state

    return rename


def one_key_renamed(which: Callable[[Tensors], str]) -> Change:
    return lambda state: {f"{name}x" if name == which(state) else name: tensor for name, tensor in state.items()}


def without(count: int) -> Change:
    def remove(state: Tensors) -> Tensors:
        gone = sorted(name for name in state if not name.endswith(".alpha"))[:count]
        left = {name: tensor for name, tensor in state.items() if name not in gone}
        layers = {ANY.sub("", name) for name in left if not name.endswith(".alpha")}
        return {name: tensor for name, tensor in left.items() if ANY.sub("", name) in layers}

    return remove


def swapped(state: Tensors) -> Tensors:
    """The first layer's weights in the second and the other way round, of the same shapes."""
    one, other = sorted({ANY.sub("", name) for name in state if re.search(r"attn1.to_", name)})[:2]
    places = {one: other, other: one}

    def place(name: str) -> str:
        layer = next((layer for layer in places if name.startswith(f"{layer}.")), None)
        return name if layer is None else places[layer] + name.removeprefix(layer)

    return {place(name): tensor for name, tensor in state.items()}


def with_a_stray(state: Tensors) -> Tensors:
    return {**state, min(state).replace("blocks", "knots"): state[min(state)].clone()}


def broken(state: Tensors) -> Tensors:
    name = min(state)
    return {**state, name: torch.full_like(state[name], torch.nan)}


CHANGES: Mapping[str, Change] = {
    "exactly zero": scaled(0.0),
    "half as strong": scaled(0.5, SECOND),
    "in the wrong layers": swapped,
    "one key renamed": one_key_renamed(min),
    "another key renamed": one_key_renamed(max),
    "two layers missing": without(4),
    "half a layer missing": without(1),
    "a tensor that has no place": with_a_stray,
    "a part binds to nothing": renamed(("down_blocks", "lower_blocks")),
    "nothing binds": renamed(("blocks", "layers"), ("mid_", "m_")),
    "not finite": broken,
}


@pytest.mark.slow
@every_adapter_file
def test_the_faint_adapter_passes(faint: Written, name: str) -> None:
    assert check_reload(build(name), faint.folder, faint.lora.fresh(), faint.lora.trained).difference < 1e-5


def altered(faint: Written, form: ExportFormat, change: Change, folder: Path) -> None:
    """Write the faint adapter, and change the tensors of its files."""
    for file in form.write(faint.lora.model, faint.lora.adapter, folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
            save_file(change(load_file(file)), file, metadata=metadata)


@every_adapter_file
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_adapter_is_refused_however_small_its_effect(
    faint: Written, name: str, change: str, tmp_path: Path
) -> None:
    altered(faint, build(name), CHANGES[change], tmp_path)
    with pytest.raises(RunError, match=f"^{tmp_path}.*; it is not fit for use$"):
        check_reload(build(name), tmp_path, faint.lora.fresh(), faint.lora.trained)


@every_adapter_file
@pytest.mark.parametrize(
    "change", ["one key renamed", "half a layer missing", "a tensor that has no place", "a part binds to nothing"]
)
def test_a_tool_that_would_pass_over_a_part_is_not_followed(
    faint: Written, name: str, change: str, tmp_path: Path
) -> None:
    altered(faint, build(name), CHANGES[change], tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}"):
        build(name).load(faint.lora.fresh(), tmp_path)


@pytest.mark.slow
@every_adapter_file
def test_a_file_that_is_gone_or_damaged_is_refused(faint: Written, name: str, tmp_path: Path) -> None:
    form = build(name)
    for file in form.write(faint.lora.model, faint.lora.adapter, tmp_path):
        content = file.read_bytes()
        for remains in (None, b"", content[: len(content) // 2]):
            file.unlink()
            if remains is not None:
                file.write_bytes(remains)
            with pytest.raises(UserError):
                form.load(faint.lora.fresh(), tmp_path)
            file.write_bytes(content)
    form.load(faint.lora.fresh(), tmp_path)


def test_an_adapter_that_does_nothing_is_named() -> None:
    """So no format can be given one."""
    state = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.zeros(3, 2)}
    with pytest.raises(RunError, match="the adapter is exactly zero, so that the LoRA would be the base model"):
        Adapter(state, 2, 2.0, "attention")
    Adapter({**state, "x.lora_B.weight": torch.tensor([[0.0, 1e-30]])}, 2, 2.0, "attention")
    with pytest.raises(RunError, match=r"the adapter's x\.lora_A\.weight is not finite"):
        Adapter({**state, "x.lora_A.weight": torch.tensor([[0.0, torch.inf]])}, 2, 2.0, "attention")


def test_an_unknown_format_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        UserError,
        match=r"^export format 'pft' is unknown; did you mean 'peft'\? known: comfyui, diffusers, fused, peft",
    ):
        EXPORT_FORMATS.build("pft", {})
