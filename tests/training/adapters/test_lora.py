from pathlib import Path
from typing import Any

import pytest
from peft.tuners.lora import LoraLayer

from rltune.config.model_section import LoraConfig
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import lora_state
from rltune.training.adapters.lora import attach_lora


@pytest.mark.parametrize(
    ("options", "scale", "has_norms"),
    [
        ({}, 1.0, False),
        ({"alpha": 3}, 0.75, False),
        ({"rslora": True}, 2.0, False),
        ({"alpha": 3, "dora": True}, 0.75, True),
    ],
)
def test_what_an_experiment_asks_for_is_attached(
    tiny_pipeline: Path, options: dict[str, Any], scale: float, has_norms: bool
) -> None:
    model = load_model(str(tiny_pipeline))
    attach_lora(model, LoraConfig.model_validate({"rank": 4, "targets": ["to_q"], **options}))
    layers = [layer for layer in model.network.modules() if isinstance(layer, LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {scale}
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in lora_state(model.network)} == {"to_q"}
    assert any("magnitude" in name for name in lora_state(model.network)) == has_norms
