"""The page of full-size memory is what its script writes, and the script for a GPU runs."""

import pytest
import torch

from tests.benchmarks import gpu_step, memory_table
from tests.benchmarks.architectures import Architecture, architectures

TINY = Architecture(
    name="tiny",
    pipeline="FluxPipeline",
    network=(
        "FluxTransformer2DModel",
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    vae=(
        "AutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "latent_channels": 16,
            "norm_num_groups": 4,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
    ),
    guidance=1.0,
    px=(32,),
)


@pytest.mark.slow
def test_the_page_has_the_lines_of_its_script() -> None:
    """Of one model, which is quickly counted."""
    page = memory_table.PAGE.read_text().splitlines()
    found = architectures()
    stored, peaks = next(memory_table.lines(found["flux2-klein-4b"]))
    assert stored in page
    assert peaks in page
    for architecture in found.values():
        assert sum(line.startswith(f"| {architecture.name}") for line in page) >= 2 * len(architecture.px)


@pytest.mark.slow
@pytest.mark.parametrize("has_blocks", [False, True])
def test_a_step_is_measured_beside_what_was_predicted(has_blocks: bool) -> None:
    setting = gpu_step.Setting("tiny", 32, 1, 2, "fp32", has_blocks)
    cells = gpu_step.measure(TINY, setting, torch.device("cpu")).strip("| ").split(" | ")
    assert cells[:5] == ["tiny", "fp32", "32", "1", "2"]
    _, peak, expected, share = cells[5:]
    assert float(peak) > 0
    assert 1.5 <= float(expected) < 2
    assert share.endswith("%")


@pytest.mark.slow
def test_a_step_s_operations_are_those_of_its_matrices() -> None:
    """What carries gradient counts three times, four with blocks in checkpoints; the decoder three times."""
    config = gpu_step.Setting("tiny", 32, 1, 2, "fp32", has_blocks=False).config(TINY)
    outline = TINY.family(dtype=torch.float32)
    counts = [
        gpu_step.operations(outline, gpu_step.Setting("tiny", 32, k, 4, "fp32", has_blocks), config)
        for k, has_blocks in ((0, False), (1, False), (2, False), (1, True))
    ]
    call = (counts[1] - counts[0]) / 2
    assert call > 0
    assert counts[2] - counts[1] == 2 * call
    assert counts[3] - counts[1] == call
