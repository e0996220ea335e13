"""Room for activations: what is kept, computed again or decoded in tiles, and what none of that may change."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.compiler.config as compiler

from rltune.diffusion.blocks import blocks_of
from rltune.diffusion.memory import Stored, measure_call, stored_bytes
from rltune.diffusion.tiles import Tiling
from rltune.errors import UserError
from rltune.training import room, setup
from rltune.training.room import with_room
from tests.training.runs import Make, adapted_run, adapters, train

GIB = 2**30
STEP, DECODER = 1 * GIB, 2 * GIB


def storing(monkeypatch: pytest.MonkeyPatch, *, outside: int = STEP // 8, largest: int = STEP // 4) -> None:
    monkeypatch.setattr(room, "measure_call", lambda *_: Stored(STEP, outside, largest))
    monkeypatch.setattr(room, "stored_bytes", lambda *_: DECODER)


@pytest.mark.parametrize(
    ("activation_gib", "num_kept", "is_decoder_kept"),
    [(0, 0, False), (0.9, 0, False), (1, 1, False), (1.9, 1, False), (2, 0, True), (4.5, 2, True), (100, 4, True)],
)
def test_the_decoder_and_then_as_many_steps_are_kept_as_fit(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, activation_gib: float, num_kept: int, is_decoder_kept: bool
) -> None:
    config = make_config(estimator={"activation_gib": activation_gib})
    run = setup.build_run(config)
    storing(monkeypatch)
    sampler = with_room(run, config)
    assert (sampler.num_kept, sampler.is_decoder_kept) == (num_kept, is_decoder_kept)


def test_what_is_free_is_the_room_unless_it_is_given(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    run = setup.build_run(config)
    storing(monkeypatch)
    monkeypatch.setattr(room, "free_bytes", lambda device: 3 * GIB)
    sampler = with_room(run, config)
    assert (sampler.num_kept, sampler.is_decoder_kept) == (1, True)


@pytest.mark.parametrize(("activation_gib", "num_kept", "is_decoder_kept"), [(0, 0, False), (1, 3, True)])
def test_nothing_or_everything_is_kept_as_the_tiny_model_needs(
    make_config: Make, activation_gib: float, num_kept: int, is_decoder_kept: bool
) -> None:
    config = make_config(estimator={"activation_gib": activation_gib}, sampler={"base_steps": 1})
    run = adapted_run(config)
    sampler = with_room(run, config)
    assert (sampler.num_kept, sampler.is_decoder_kept) == (num_kept, is_decoder_kept)
    assert sampler.num_base_steps == 1


@pytest.mark.slow
def test_a_micro_batch_is_measured_with_gradient(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[int] = []

    def measure_step(call: Callable[[], torch.Tensor], network: torch.nn.Module) -> Stored:
        found = measure_call(call, network)
        assert found.plain == stored_bytes(call, network)
        stored.append(found.plain)
        return found

    def measure_decoder(call: Callable[[], torch.Tensor], frozen: torch.nn.Module) -> int:
        stored.append(stored_bytes(call, frozen))
        return stored[-1]

    monkeypatch.setattr(room, "measure_call", measure_step)
    monkeypatch.setattr(room, "stored_bytes", measure_decoder)
    for micro_batch in (1, 4):
        config = make_config(optim={"micro_batch": micro_batch})
        with_room(adapted_run(config), config)
    step, decoder, steps, decoders = stored
    # what does not grow with images, such as the adapters themselves, is a few percent
    assert steps == pytest.approx(4 * step, rel=0.1)
    assert decoders == pytest.approx(4 * decoder, rel=0.1)
    assert step > 2 * 4 * 16 * 64 * 4  # one image, two branches: the input of four projections, 16 x 8 x 8 float32


@pytest.mark.parametrize(
    ("checkpoint", "num_kept", "is_decoder_kept"),
    [("always", 0, False), ("serial", 0, False), ("never", 3, True)],
)
def test_a_mode_is_not_measured(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, checkpoint: str, num_kept: int, is_decoder_kept: bool
) -> None:
    monkeypatch.setattr(room, "stored_bytes", None)
    monkeypatch.setattr(room, "measure_call", None)
    config = make_config(
        estimator={"checkpoint": checkpoint}, sampler={"base_steps": 1}, resources={"checkpoint_blocks": False}
    )
    sampler = with_room(setup.build_run(config), config)
    assert (sampler.num_kept, sampler.is_decoder_kept) == (num_kept, is_decoder_kept)


# ---- checkpoints around blocks, tiles


@pytest.mark.parametrize(
    ("wanted", "free", "is_on"),
    [("auto", STEP, False), ("auto", STEP - 1, True), (True, 100 * GIB, True), (False, 0, False)],
)
@pytest.mark.parametrize("checkpoint", ["auto", "always", "serial"])
def test_blocks_are_checkpointed_where_a_step_does_not_fit(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, wanted: Any, free: int, is_on: bool, checkpoint: str
) -> None:
    config = make_config(
        resources={"checkpoint_blocks": wanted}, estimator={"checkpoint": checkpoint, "activation_gib": 0.5}
    )
    run = setup.build_run(config)
    storing(monkeypatch)
    monkeypatch.setattr(room, "free_bytes", lambda device: free)
    sampler = with_room(run, config)
    assert {"forward" in vars(block) for block in blocks_of(run.model.network)} == {is_on}
    # 0.5 GiB hold two steps' block inputs of 1/8 GiB beside the largest block, and no whole step
    assert sampler.num_kept == (2 if is_on and checkpoint == "auto" else 0)
    with_room(run, make_config(resources={"checkpoint_blocks": False}))  # a later run of the same process
    assert not any("forward" in vars(block) for block in blocks_of(run.model.network))


def test_who_keeps_everything_checkpoints_no_block_unless_told_to(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: 0)
    for wanted, is_on in (("auto", False), (True, True)):
        config = make_config(resources={"checkpoint_blocks": wanted}, estimator={"checkpoint": "never"})
        run = setup.build_run(config)
        assert with_room(run, config).num_kept == run.sampler.num_steps
        assert any("forward" in vars(block) for block in blocks_of(run.model.network)) == is_on


@pytest.mark.slow
def test_blocks_that_nobody_names_cannot_be_checkpointed(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(resources={"checkpoint_blocks": True})
    run = setup.build_run(config)
    monkeypatch.setattr(room, "blocks_of", lambda network: [])
    with pytest.raises(UserError, match=r"^resources\.checkpoint_blocks: UNet2DConditionModel of .* write auto or"):
        with_room(run, config)


@pytest.mark.parametrize(
    ("wanted", "native_px", "size_px", "is_tiled"),
    [
        ("auto", 1024, 1024, True),
        ("auto", 1024, 768, False),
        ("auto", 768, 1024, False),
        ("auto", 512, 2048, False),  # Stable Diffusion 1.5, however large
        (False, 1024, 1024, False),
        (True, 16, 16, True),
    ],
)
def test_tiles_follow_from_the_image_and_the_model(
    make_config: Make, wanted: Any, native_px: int, size_px: int, is_tiled: bool
) -> None:
    config = make_config(
        resources={"decoder_tiles": wanted}, sampler={"height": size_px, "width": size_px}, optim={"batch": 2}
    )
    model = setup.ModelCache().model(config, torch.device("cpu"))
    model.size_px = (native_px, native_px)
    sampler = setup.make_sampler(config, model)
    assert sampler.tiling == (Tiling.of(2) if is_tiled else None)
    is_large = min(native_px, size_px) > 768
    assert sampler.is_decoded_singly == is_large  # in evaluation, whatever becomes of tiles
    run = replace(setup.build_run(config), sampler=sampler)
    assert run.eval_batch == (4 if is_large else 16)


def test_the_decoder_is_not_measured_whole_where_it_runs_in_tiles(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(resources={"decoder_tiles": True})
    run = setup.build_run(config)
    storing(monkeypatch)
    monkeypatch.setattr(room, "stored_bytes", None)
    monkeypatch.setattr(room, "free_bytes", lambda device: 2 * GIB)
    sampler = with_room(run, config)
    assert (sampler.num_kept, sampler.is_decoder_kept) == (2, False)


@pytest.mark.long
def test_checkpointed_blocks_train_the_same_adapters(make_config: Make, tmp_path: Path) -> None:
    for is_on in (False, True):
        config = make_config(optim={"steps": 2}, resources={"checkpoint_blocks": is_on})
        train(config, tmp_path / str(is_on), base_dir=tmp_path / "base")
    plain, nested = adapters(tmp_path / "False", 2), adapters(tmp_path / "True", 2)
    assert plain
    assert all(torch.equal(plain[name], nested[name]) for name in plain)


def test_compiled_code_lies_where_the_next_trial_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    monkeypatch.setenv("RLTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "recompile_limit", 8)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    room.compile_kept(torch.nn.Linear(1, 1))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    assert compiler.recompile_limit >= room.NUM_TRACED
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    room.compile_kept(torch.nn.Linear(1, 1))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
