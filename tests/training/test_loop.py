"""The loop in this process: resuming, workers, micro-batches, controls, faults."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.errors import NonFiniteError, RunError, UserError
from rltune.rewards.base import REWARDS
from rltune.rewards.pixel import Brightness
from rltune.training.checkpoint import load_adapter
from rltune.training.loop import base_run, train_run
from rltune.training.reporter import FolderReporter, read_metrics
from rltune.training.setup import NUM_CALIBRATION_IMAGES, build_run

Make = Callable[..., RunConfig]


def train(config: RunConfig, root: Path, *, resume_from: Path | None = None) -> FolderReporter:
    reporter = FolderReporter(root / "checkpoints", num_to_keep=10)
    places = {"trial_dir": root / "trial", "base_dir": root / "base"}
    train_run(config, reporter=reporter, resume_from=resume_from, **places)
    return reporter


def test_a_run_reports_the_base_then_every_evaluation(make_config: Make, tmp_path: Path) -> None:
    reporter = train(make_config(optim={"steps": 5}, evaluate={"every": 2}), tmp_path)
    assert [report["step"] for report in reporter.reports] == [0, 2, 4, 5]
    assert [report["is_final"] for report in reporter.reports] == [0, 0, 0, 1]
    assert reporter.reports[0]["eval/drift"] == 0
    assert reporter.reports[-1]["eval/drift"] > 0
    assert reporter.reports[-1]["images_seen"] == 20
    rows = read_metrics(tmp_path / "trial" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        parts = row["sampling_s"] + row["reward_s"] + row["backward_s"] + row["optimizer_s"]
        assert 0 < parts <= row["step_s"]
        # the mixed reward is the weighted sum of the standardised ones
        expected = 0.75 * row["train/brightness_z"] + 0.25 * row["train/smoothness_z"]
        assert row["train/reward"] == pytest.approx(expected, rel=1e-4)
        assert row["k"] in (1, 2)
    assert (tmp_path / "trial" / "samples" / "step-000005.png").is_file()


def test_the_trained_reward_rises(make_config: Make, tmp_path: Path) -> None:
    config = make_config(rewards={"brightness": {}}, optim={"steps": 12, "lr": 2e-2}, evaluate={"every": 12})
    reporter = train(config, tmp_path)
    first, last = reporter.reports[0], reporter.reports[-1]
    assert last["eval/brightness"] - first["eval/brightness"] > 3 * last["eval/brightness_se"]


def test_learning_rate_zero_changes_nothing(make_config: Make, tmp_path: Path) -> None:
    reporter = train(make_config(optim={"lr": 0.0, "weight_decay": 0.1}), tmp_path)
    first, last = reporter.reports[0], reporter.reports[-1]
    assert last["eval/drift"] == 0
    assert last["eval/brightness"] == first["eval/brightness"]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(make_config: Make, tmp_path: Path, eta: float) -> None:
    config = make_config(optim={"steps": 4}, evaluate={"every": 2}, sampler={"eta": eta})
    whole = train(config, tmp_path / "whole")
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole" / "base", half / "base")
    (half / "trial").mkdir(parents=True)
    # as a kill leaves it: the file is ahead of the checkpoint, and its last line is cut short
    rows = (tmp_path / "whole" / "trial" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "trial" / "metrics.jsonl").write_text("".join(rows[:3]) + rows[3][:20])
    torch.manual_seed(99)  # the process that resumes has another past
    resumed = train(config, half, resume_from=tmp_path / "whole" / "checkpoints" / "step-000002")
    ignored = {"eval_s"}
    for report in (whole.reports[-1], resumed.reports[-1]):
        for name in ignored:
            report.pop(name)
    assert resumed.reports[-1] == whole.reports[-1]
    first, second = (load_adapter(root / "checkpoints" / "step-000004") for root in (tmp_path / "whole", half))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["step"] for row in read_metrics(half / "trial" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_killed_before_its_result_was_taken_says_it_again(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    whole = train(config, tmp_path)
    again = train(config, tmp_path, resume_from=tmp_path / "checkpoints" / "step-000004")
    assert len(again.reports) == 1
    assert again.reports[0]["is_final"] == 1
    assert again.reports[0]["eval/brightness"] == whole.reports[-1]["eval/brightness"]


def test_micro_batches_add_up_to_the_whole_batch(make_config: Make, tmp_path: Path) -> None:
    whole = train(make_config(), tmp_path / "whole")
    split = train(make_config(optim={"micro_batch": 1}), tmp_path / "split")
    for name in ("eval/brightness", "eval/smoothness"):
        # Adam turns rounding of tiny gradients into steps of lr: agreement to a hundredth of the step taken
        gain = abs(whole.reports[-1][name] - whole.reports[0][name])
        assert split.reports[-1][name] == pytest.approx(whole.reports[-1][name], abs=1e-2 * gain + 1e-6)


def test_a_base_run_reports_the_base_model_once(make_config: Make, tmp_path: Path) -> None:
    reporter = FolderReporter(tmp_path / "checkpoints")
    base_run(make_config(), trial_dir=tmp_path / "trial", base_dir=tmp_path / "base", reporter=reporter)
    assert [(report["step"], report["is_final"]) for report in reporter.reports] == [(0, 1)]
    trained = train(make_config(), tmp_path)
    assert trained.reports[0]["eval/brightness"] == reporter.reports[0]["eval/brightness"]
    assert len(list((tmp_path / "base").iterdir())) == 1


@REWARDS.register("nan_when_two")
class NanWhenTwo(Brightness):
    """Not finite for prompts that hold 'two'."""

    def __call__(self, images_B3HW: Tensor, prompts: Any) -> Tensor:
        """Return brightness, or nan."""
        hole = torch.tensor([float("nan") if "two" in prompt else 0.0 for prompt in prompts])
        return super().__call__(images_B3HW, prompts) + hole


@REWARDS.register("blind")
class Blind(Brightness):
    """Looks at the prompt alone, so that its gradient is zero."""

    def __call__(self, images_B3HW: Tensor, prompts: Any) -> Tensor:
        """Return the prompts' lengths."""
        return 0 * super().__call__(images_B3HW, prompts) + torch.tensor([float(len(p)) for p in prompts])


@REWARDS.register("opaque")
class Opaque(Brightness):
    """Says that it has no gradient."""

    is_differentiable = False


def test_a_reward_without_gradient_is_measured_but_not_trained_on(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one with a positive weight has no gradient, which alignprop needs"):
        train(make_config(rewards={"opaque": {"weight": 1.0}}), tmp_path)
    reporter = train(make_config(rewards={"opaque": {"weight": 0.0}, "brightness": {}}), tmp_path)
    assert reporter.reports[-1]["eval/opaque"] == reporter.reports[-1]["eval/brightness"]


def test_a_reward_that_is_not_finite_names_itself_and_the_prompt(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"'nan_when_two'.*two red birds"):
        train(make_config(rewards={"nan_when_two": {}}), tmp_path)


def test_a_gradient_of_exactly_zero_is_an_error(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 1: the gradient of the mixed reward is exactly zero"):
        train(make_config(rewards={"blind": {}}), tmp_path)


def test_a_truncated_checkpoint_names_its_folder(make_config: Make, tmp_path: Path) -> None:
    train(make_config(), tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    content = (checkpoint / "trainer.pt").read_bytes()
    (checkpoint / "trainer.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match="step-000002: cannot be resumed from"):
        train(make_config(), tmp_path, resume_from=checkpoint)


def test_too_few_held_out_prompts_are_refused(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.prompts: 9 prompts are wanted, but prompts\.eval holds 3"):
        train(make_config(evaluate={"prompts": 9}), tmp_path)


def test_lora_targets_that_match_nothing_are_refused(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.targets: .*nothing_like_this"):
        train(
            make_config(model={"lora": {"targets": ["nothing_like_this"]}, "base": make_config().model.base}), tmp_path
        )


WORKER = """
import json, sys
from pathlib import Path
from rltune.config.experiment import RunConfig
from rltune.training.loop import train_run
from rltune.training.reporter import FolderReporter
root = Path(sys.argv[2])
reporter = FolderReporter(root / "checkpoints", num_to_keep=10)
train_run(RunConfig.model_validate(json.loads(Path(sys.argv[1]).read_text())),
          trial_dir=root / "trial", base_dir=root / "base", reporter=reporter)
"""


def run_workers(config: RunConfig, root: Path, count: int) -> Mapping[str, Tensor]:
    """Train with ``count`` processes and a gloo group, as Ray Train and torchrun start them."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        command = [sys.executable, "-c", WORKER, str(root / "config.json"), str(root)]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    return load_file(root / "checkpoints" / "step-000001" / "adapter.safetensors")


@pytest.mark.slow
def test_two_workers_take_the_step_of_one_with_the_whole_batch(make_config: Make, tmp_path: Path) -> None:
    config = make_config(optim={"steps": 1, "max_grad_norm": 1e9})
    one, two = (run_workers(config, tmp_path / str(count), count) for count in (1, 2))
    first, second = (read_metrics(tmp_path / str(count) / "trial" / "metrics.jsonl")[0] for count in (1, 2))
    for name in ("grad_norm", "train/reward", "train/brightness", "eval/brightness", "eval/diversity"):
        assert second[name] == pytest.approx(first[name], rel=1e-4), name  # float32, another order of additions
    assert second["k"] == first["k"]
    assert (first["workers"], second["workers"]) == (1, 2)
    assert one.keys() == two.keys()


def test_one_training_prompt_is_enough_to_measure_the_unit_of_a_reward(make_config: Make, tmp_path: Path) -> None:
    config = make_config(prompts={"train": ["a cat"]}, optim={"steps": 1})
    assert len(build_run(config).calibration_images) == NUM_CALIBRATION_IMAGES
    train(config, tmp_path)
