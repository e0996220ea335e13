"""The memory of an experiment, from counts: what is in it, what changes it, and that the run stays within."""

from dataclasses import replace
from typing import Any

import pytest

from rltune.diffusion.memory import measure_call
from rltune.diffusion.outline import load_outline
from rltune.diffusion.quantise import NF4_BYTES, quantised_layers
from rltune.rewards.base import REWARDS
from rltune.training import forecast as module
from rltune.training import room
from rltune.training.forecast import BYTES_PER_ADAPTED, forecast, micro_batch, reward_bytes, smaller
from tests.training.runs import Make, adapted_run


def outline_of(config: Any) -> Any:
    from rltune.diffusion.outline import find_pipeline

    return load_outline(find_pipeline(config.model.base), base=config.model.base)


@pytest.mark.long
def test_what_is_counted_is_what_a_run_measures(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the step, within 5 percent; the tiny pipeline has as many tokens of text as its tokenizer says."""
    config = make_config(optim={"micro_batch": 2})
    run = adapted_run(config)
    measured: list[Any] = []
    monkeypatch.setattr(room, "measure_call", lambda *args: measured.append(measure_call(*args)) or measured[-1])
    room.with_room(run, config)
    outline = outline_of(config)
    found = forecast(config, outline, precision="fp32")
    (step,) = measured
    assert found.phases["a training step"] - 3 * step.tensor == pytest.approx(step.plain, rel=0.05)
    assert found.fixed["network"] == pytest.approx(
        sum(p.nbytes for p in run.model.network.parameters() if not p.requires_grad), rel=0.01
    )
    trained = sum(p.numel() for p in run.model.network.parameters() if p.requires_grad)
    assert found.fixed["adapters"] == BYTES_PER_ADAPTED * trained
    nested = forecast(
        make_config(optim={"micro_batch": 2}, resources={"checkpoint_blocks": True}),
        outline,
        precision="fp32",
    )
    assert nested.phases["a training step"] - 3 * step.tensor == pytest.approx(step.outside + step.largest, rel=0.05)


def test_blocks_are_counted_in_checkpoints_where_the_run_would_put_them_there(make_config: Make) -> None:
    config = make_config()
    outline = outline_of(config)
    settings: dict[str, Any] = {"precision": "fp32"}
    plain = forecast(config, outline, **settings)
    assert not plain.has_blocks
    assert not forecast(config, outline, **settings, room_gib=2 * plain.peak_gib).has_blocks
    assert forecast(config, outline, **settings, room_gib=plain.peak_gib).has_blocks
    never = make_config(estimator={"checkpoint": "never"})
    assert not forecast(never, outline, **settings, room_gib=0.1).has_blocks


@pytest.mark.long
def test_every_setting_that_is_proposed_makes_it_smaller(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_PX", 16)  # what the tiny pipeline draws
    config = make_config(optim={"batch": 4}, sampler={"height": 32, "width": 32})
    outline = outline_of(config)
    found = forecast(config, outline, precision="fp32")
    changes = smaller(config, outline, found)
    assert list(changes) == [
        "resources.checkpoint_blocks: true",
        "optim.micro_batch: 1",
        "resources.precision: bf16",
        "resources.decoder_tiles: true",
        "estimator.guidance_gradient: text",
        "sampler.height: 16 and sampler.width: 16",
    ]
    for name, change in changes.items():
        after = change(config)
        precision = "bf16" if "precision" in name else "fp32"
        smaller_one = forecast(after, outline, precision=precision)
        phase = "decoding" if "tiles" in name else "a training step"
        assert smaller_one.phases[phase] < found.phases[phase] or "tiles" in name, name
    best = replace(found, precision="bf16", has_blocks=True)
    assert "resources.checkpoint_blocks: true" not in smaller(config, outline, best)
    assert "resources.precision: bf16" not in smaller(config, outline, best)


@pytest.mark.slow
def test_a_quantised_network_is_counted_packed_with_one_layer_unpacked(make_config: Make) -> None:
    config, rounded = make_config(), make_config(model={"quantise": "nf4"})
    outline = outline_of(config)
    plain, found = (forecast(given, outline, precision="fp32") for given in (config, rounded))
    layers = [layer for _, _, layer in quantised_layers(outline.network, "nf4")]
    weights = sum(layer.weight.numel() for layer in layers)
    assert found.fixed["network"] == pytest.approx(plain.fixed["network"] - (4 - NF4_BYTES) * weights, abs=len(layers))
    largest = max(layer.weight.nbytes for layer in layers)
    assert found.phases["a training step"] == plain.phases["a training step"] + largest
    assert found.phases["sampling"] < plain.phases["sampling"] + largest  # nothing is merged


def test_rewards_count_by_their_published_files_each_once(make_config: Make) -> None:
    section = {"weight": 1.0}
    config = make_config(rewards={"hpsv2": section}, evaluate={"judges": ["pickscore"]})
    files = {*REWARDS.card("hpsv2").weights, *REWARDS.card("pickscore").weights}
    assert reward_bytes(config) == pytest.approx(1e6 * sum(file.size_mb for file in files))
    both = make_config(rewards={"hpsv2": section}, evaluate={"judges": ["hpsv2"]})
    assert reward_bytes(both) == pytest.approx(1e6 * REWARDS.card("hpsv2").size_mb)
    assert reward_bytes(make_config(rewards={"brightness": section}, evaluate={"judges": []})) == 0


def test_the_peak_is_what_stays_and_the_largest_phase(make_config: Make) -> None:
    config = make_config()
    found = forecast(config, outline_of(config), precision="fp32")
    assert found.peak_bytes == sum(found.fixed.values()) + max(found.phases.values())
    assert found.fixed["process"] == module.PROCESS_BYTES + int(module.GAPS * found.fixed["network"])
    assert sum(found.parts.values()) == pytest.approx(found.peak_gib)
    assert micro_batch(make_config(optim={"batch": 8}, resources={"workers": 3})) == 3
