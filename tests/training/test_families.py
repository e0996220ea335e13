"""Every family in the loop: three rounds, and the same again from where a kill left it, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rltune.diffusion.quantise import LIBRARIES
from tests.tiny_families import PIPELINES, made, shared_out
from tests.training.runs import Make, adapters, metrics, train

FAST = ("stable_diffusion", "z_image", "sana_sprint")
"""Run each time: one that is as ever, one with texts of their own lengths, one that draws every step anew."""


@pytest.mark.slow
@pytest.mark.parametrize("name", shared_out(PIPELINES, PIPELINES.keys() - set(FAST)))
def test_a_run_that_is_killed_and_resumed_is_bitwise_the_uninterrupted_one(
    name: str, make_config: Make, tmp_path: Path
) -> None:
    check_resumed(name, make_config, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "precision"), [("nf4", "fp32"), ("nf4", "bf16"), ("int8", "fp32"), ("int8", "bf16")])
def test_so_is_one_whose_base_is_in_fewer_bits(kind: str, precision: str, make_config: Make, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[kind], reason=f"{LIBRARIES[kind]}, of the extra quantise, is not installed")
    check_resumed("sdxl", make_config, tmp_path, kind, precision)


def check_resumed(name: str, make_config: Make, tmp_path: Path, kind: str = "none", precision: str = "fp32") -> None:
    made(PIPELINES[name]).save_pretrained(tmp_path / "model")
    sections: dict[str, Any] = {
        "model": {"base": str(tmp_path / "model"), "lora": {"rank": 2}, "quantise": kind},
        "resources": {"precision": precision},
        "sampler": {"steps": 2, "eta": 1.0, "height": 16, "width": 16},
        "optim": {"steps": 3, "batch": 2},
        "evaluate": {"every": 2, "prompts": 1, "images_per_prompt": 1},
    }
    config = make_config(**sections)
    whole = train(config, tmp_path / "whole", base_dir=tmp_path / "base")
    half = tmp_path / "half"
    (half / "trial").mkdir(parents=True)
    rows = (tmp_path / "whole" / "trial" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "trial" / "metrics.jsonl").write_text("".join(rows[:2]) + rows[2][:20])  # its last line was being written
    torch.manual_seed(99)  # the process that resumes has another past
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000002"
    resumed = train(config, half, base_dir=tmp_path / "base", resume_from=checkpoint)
    assert resumed.reports[-1] == whole.reports[-1]
    first, second = adapters(tmp_path / "whole", 3), adapters(half, 3)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    moved = [key for key in first if ".lora_B." in key and bool(first[key].any())]
    assert len(moved) > len(first) // 4  # B begins at zero; half of all are B, and some streams end unused
    assert [row["step"] for row in metrics(half)] == [1, 2, 3]
