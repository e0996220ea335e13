"""A cache used by run after run: each gives the numbers of a run in a fresh process, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rltune.config.experiment import RunConfig
from rltune.diffusion import loading
from rltune.diffusion.lora import add_lora, lora_parameters, remove_lora
from rltune.errors import UserError
from rltune.training.loop import base_run, train_run
from rltune.training.model_cache import ModelCache, load_base_model
from rltune.training.reporter import FolderReporter
from tests.original_layout import write_original
from tests.training.runs import Make, adapters, train

CPU = torch.device("cpu")
OTHERS: list[dict[str, Any]] = [
    {"model": {"lora": {"rank": 4, "targets": "all"}}, "optim": {"lr": 5e-2}},
    {"rewards": {"contrast": {"weight": 1.0}}, "seed": 7},
    {"estimator": {"name": "dpok", "k": None, "draw": None}, "sampler": {"eta": 1.0}},
    {"prompts": {"train": ["a whale", "a bat", "a yak", "a cat"]}},
    {"resources": {"prefix_precision": "bf16"}},
]


def train_on(cache: ModelCache, config: RunConfig, root: Path) -> FolderReporter:
    reporter = FolderReporter(root / "checkpoints", num_to_keep=10)
    train_run(config, trial_dir=root / "trial", base_dir=root / "base", reporter=reporter, cache=cache)
    return reporter


@pytest.fixture(scope="module")
def alone(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FolderReporter]:
    """A run that no other came before, and its folder."""
    root = tmp_path_factory.mktemp("alone")
    return root, train(make_config(seed=3), root)


@pytest.mark.long
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(other, id=name, marks=[] if name == "lora" else pytest.mark.long)
        for name, other in zip(("lora", "rewards", "estimator", "prompts", "precision"), OTHERS, strict=True)
    ],
)
def test_a_run_after_another_is_bitwise_the_same_as_alone(
    make_config: Make, tmp_path: Path, alone: tuple[Path, FolderReporter], other: Any
) -> None:
    cache = ModelCache()
    train_on(cache, make_config(**other), tmp_path / "other")
    torch.manual_seed(5)  # whatever a run before has drawn
    after = train_on(cache, make_config(seed=3), tmp_path / "after")
    root, fresh = alone
    assert [{key: value for key, value in report.items() if key != "eval_s"} for report in after.reports] == [
        {key: value for key, value in report.items() if key != "eval_s"} for report in fresh.reports
    ]
    for step in (2, 4):
        ours, theirs = adapters(tmp_path / "after", step), adapters(root, step)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.long
def test_the_base_model_is_measured_without_the_adapters_of_the_run_before(make_config: Make, tmp_path: Path) -> None:
    cache = ModelCache()
    train_on(cache, make_config(optim={"lr": 5e-2}), tmp_path / "other")
    values = []
    for name, used in (("after", cache), ("alone", None)):
        reporter = FolderReporter(tmp_path / name)
        places = {"trial_dir": tmp_path / name / "trial", "base_dir": tmp_path / name / "base"}
        base_run(make_config(), reporter=reporter, cache=used, **places)
        values.append(reporter.reports[-1])
    assert values[0] == values[1]


def test_a_shelf_loads_once_and_lets_go_of_what_is_replaced(
    make_config: Make, tiny_v_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(config: RunConfig, device: torch.device) -> Any:
        loaded.append(config.model.base)
        return load_base_model(config, device)

    monkeypatch.setattr("rltune.training.model_cache.load_base_model", load)
    cache, config = ModelCache(), make_config()
    first = cache.model(config, CPU)
    assert cache.model(make_config(model={"lora": {"rank": 8}}, seed=9), CPU) is first
    assert cache.rewards(config, (), CPU) is cache.rewards(make_config(optim={"lr": 0.5}), (), CPU)
    heavier = make_config(rewards={"brightness": {"weight": 0.1}, "smoothness": {"weight": 0.9}})
    assert cache.rewards(heavier, (), CPU) is cache.rewards(config, (), CPU)  # a weight is not the reward's
    negated = make_config(rewards={"brightness": {"negate": True}, "smoothness": {}})
    assert cache.rewards(negated, (), CPU) is not cache.rewards(config, (), CPU)
    other = make_config(model={"base": str(tiny_v_pipeline)})
    assert cache.model(other, CPU) is not first
    assert loaded == [config.model.base, str(tiny_v_pipeline)]


def test_adapters_come_off_and_leave_the_very_weights(make_config: Make) -> None:
    network = load_base_model(make_config(), CPU).network
    before = dict(network.named_parameters())
    remove_lora(network)  # none is fine
    add_lora(network, rank=2, alpha=2, targets="all", seed=0)
    assert len(dict(network.named_parameters())) > len(before)
    remove_lora(network)
    after = dict(network.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    add_lora(network, rank=4, alpha=2, targets="attention", seed=0)  # and others go on
    assert lora_parameters(network)


@pytest.mark.parametrize(("precision", "decoder"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_decoder_may_have_a_precision_of_its_own(make_config: Make, precision: str, decoder: str) -> None:
    resources = {"precision": precision, "decoder_precision": decoder}
    cache = ModelCache()
    mixed = cache.model(make_config(resources=resources), CPU)
    network_dtype = next(mixed.network.parameters()).dtype
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image = mixed.decode(latents)
    whole = cache.model(make_config(resources={"precision": decoder}), CPU)  # not what the cache held for the other
    assert torch.equal(image, whole.decode(latents))
    assert network_dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert next(whole.network.parameters()).dtype != network_dtype


@pytest.mark.slow
def test_a_base_is_quantised_unless_it_is_loaded_to_prove_an_export(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(loading, "quantise", lambda network, kind: done.append(kind))
    cache, plain, rounded = ModelCache(), make_config(), make_config(model={"quantise": "nf4"})
    first = cache.model(plain, CPU)
    assert cache.model(rounded, CPU) is not first
    load_base_model(rounded, CPU, dtype=torch.bfloat16)
    assert done == ["nf4"]


@pytest.mark.slow
def test_a_checkpoint_in_one_file_is_loaded_with_the_settings_that_are_named(
    make_config: Make, tiny_pipeline: Path, tmp_path: Path
) -> None:
    file = write_original(tiny_pipeline, tmp_path / "model.safetensors")
    config = make_config(model={"base": str(file), "config": str(tiny_pipeline)})
    one, other = load_base_model(config, CPU), load_base_model(make_config(), CPU)
    assert torch.equal(one.network.state_dict()["conv_in.weight"], other.network.state_dict()["conv_in.weight"])
    assert load_base_model(config, CPU, dtype=torch.bfloat16).network.dtype == torch.bfloat16
    with pytest.raises(UserError, match="cannot do without its text_encoder, got"):
        load_base_model(make_config(model={"base": str(tiny_pipeline), "drop": ["text_encoder"]}), CPU)
