"""The loop in this process: what it reports and leaves, how it resumes and ends, controls, faults."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rltune.diffusion.lora import load_lora_state
from rltune.errors import NonFiniteError, RunError, UserError
from rltune.estimators.alignprop import AlignProp
from rltune.runs.events import read_events, read_notices
from rltune.runs.rows import read_metrics
from rltune.training.evaluation import sample_and_score
from rltune.training.loop import base_run
from rltune.training.reporter import FolderReporter
from rltune.training.setup import NUM_CALIBRATION_IMAGES, build_run
from rltune.training.streams import Stream, generator
from tests.training.runs import Make, adapted_run, adapters, metrics, train


@pytest.mark.slow
def test_a_run_reports_the_base_then_every_evaluation(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    reporter = train(make_config(optim={"steps": 5}, evaluate={"every": 2}, seed=3), tmp_path, base_dir=base_dir)
    assert [report["step"] for report in reporter.reports] == [0, 2, 4, 5]
    assert [report["is_final"] for report in reporter.reports] == [0, 0, 0, 1]
    assert reporter.reports[0]["eval/drift"] == 0
    assert reporter.reports[-1]["eval/drift"] > 0
    assert reporter.reports[-1]["images_seen"] == 20
    rows = read_metrics(tmp_path / "trial" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        parts = row["sampling_s"] + row["reward_s"] + row["backward_s"]
        assert 0 < parts <= row["step_s"]
        # the mixed reward is the weighted sum of the standardised ones
        expected = 0.75 * row["train/brightness_z"] + 0.25 * row["train/smoothness_z"]
        assert row["train/reward"] == pytest.approx(expected, rel=1e-4)
    draws = [AlignProp(k=2).draw_k(4, generator(3, Stream.ESTIMATOR, step)) for step in range(5)]
    assert [row["k"] for row in rows] == draws
    assert set(draws) == {1, 2}
    assert (tmp_path / "trial" / "samples" / "step-000005.png").is_file()


@pytest.mark.slow
def test_the_trained_reward_rises(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    config = make_config(rewards={"brightness": {}}, optim={"steps": 12, "lr": 2e-2}, evaluate={"every": 12})
    reporter = train(config, tmp_path, base_dir=base_dir)
    first, last = reporter.reports[0], reporter.reports[-1]
    assert last["eval/brightness"] - first["eval/brightness"] > 3 * last["eval/brightness_se"]


@pytest.mark.slow
def test_learning_rate_zero_changes_nothing(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    reporter = train(make_config(optim={"lr": 0.0, "weight_decay": 0.1}), tmp_path, base_dir=base_dir)
    first, last = reporter.reports[0], reporter.reports[-1]
    assert last["eval/drift"] == 0
    assert last["eval/brightness"] == first["eval/brightness"]


@pytest.mark.slow
def test_a_killed_run_goes_on_bitwise_like_one_that_never_was(
    make_config: Make, tmp_path: Path, base_dir: Path
) -> None:
    config = make_config()
    whole = train(config, tmp_path / "whole", base_dir=base_dir)
    half = tmp_path / "half"
    (half / "trial").mkdir(parents=True)
    # as a kill leaves it: the file is ahead of the checkpoint, and its last line is cut short
    rows = (tmp_path / "whole" / "trial" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "trial" / "metrics.jsonl").write_text("".join(rows[:3]) + rows[3][:20])
    torch.manual_seed(99)  # the process that resumes has another past
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000002"
    resumed = train(config, half, base_dir=base_dir, resume_from=checkpoint)
    assert resumed.reports[-1] == whole.reports[-1]
    assert resumed.reports[-1]["queries"] >= 16
    first, second = adapters(tmp_path / "whole", 4), adapters(half, 4)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["step"] for row in metrics(half)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_killed_before_its_result_was_taken_says_it_again(
    make_config: Make, tmp_path: Path, base_dir: Path
) -> None:
    config = make_config()
    whole = train(config, tmp_path, base_dir=base_dir)
    again = train(config, tmp_path, resume_from=tmp_path / "checkpoints" / "step-000004", base_dir=base_dir)
    assert len(again.reports) == 1
    assert again.reports[0]["is_final"] == 1
    assert again.reports[0]["eval/brightness"] == whole.reports[-1]["eval/brightness"]


@pytest.mark.long
def test_micro_batches_add_up_to_the_whole_batch(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    whole = train(make_config(), tmp_path / "whole", base_dir=base_dir)
    split = train(make_config(optim={"micro_batch": 1}), tmp_path / "split", base_dir=base_dir)
    for name in ("eval/brightness", "eval/smoothness"):
        # Adam turns rounding of tiny gradients into steps of lr: agreement to a hundredth of the step taken
        gain = abs(whole.reports[-1][name] - whole.reports[0][name])
        assert split.reports[-1][name] == pytest.approx(whole.reports[-1][name], abs=1e-2 * gain + 1e-6)


@pytest.mark.long
def test_what_happens_to_a_run_is_noted(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    config = make_config(optim={"steps": 4}, evaluate={"every": 2})
    train(config, tmp_path, base_dir=base_dir)
    train(config, tmp_path, base_dir=base_dir, resume_from=tmp_path / "checkpoints" / "step-000002")
    noted = [(event.event, event.fields.get("step")) for event in read_events(tmp_path / "trial" / "events.jsonl")]
    first = [("loaded", None), ("first_step", 0), ("reported", 2), ("reported", 4), ("trained", None)]
    assert noted == [*first, ("loaded", None), ("first_step", 2), ("reported", 4), ("trained", None)]


@pytest.mark.long
def test_a_base_run_reports_the_base_model_once(make_config: Make, tmp_path: Path) -> None:
    reporter = FolderReporter(tmp_path / "checkpoints")
    base_run(make_config(), trial_dir=tmp_path / "trial", base_dir=tmp_path / "base", reporter=reporter)
    assert [(report["step"], report["is_final"]) for report in reporter.reports] == [(0, 1)]
    assert not read_notices(tmp_path / "trial")
    trained = train(make_config(), tmp_path)
    assert trained.reports[0]["eval/brightness"] == reporter.reports[0]["eval/brightness"]
    assert len(list((tmp_path / "base").iterdir())) == 1


@pytest.mark.slow
def test_a_base_run_tells_of_prompts_that_are_cut_off(make_config: Make, tmp_path: Path) -> None:
    prompts = {"train": ["a cat", "two lobsters in a row"]}
    places = {"trial_dir": tmp_path / "trial", "base_dir": tmp_path / "base"}
    base_run(make_config(prompts=prompts), reporter=FolderReporter(tmp_path / "checkpoints"), **places)
    assert read_notices(tmp_path / "trial") == [
        "1 of 5 prompts is longer than the text encoder reads: of 'two lobsters in a row' it does not see 'row'"
    ]


def test_a_target_without_layers_beside_one_that_has_some_ends_a_run(make_config: Make, tmp_path: Path) -> None:
    lora = {"rank": 2, "targets": ["to_q", "to_z"]}
    with pytest.raises(UserError, match=r"^model\.lora\.targets: no layer is called so, got 'to_z'; did you mean"):
        base_run(
            make_config(model={"lora": lora}),
            trial_dir=tmp_path / "trial",
            base_dir=tmp_path / "base",
            reporter=FolderReporter(tmp_path / "checkpoints"),
        )


@pytest.mark.long
def test_a_reward_without_gradient_is_measured_but_not_trained_on(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one with a positive weight has no gradient, which alignprop needs"):
        train(make_config(rewards={"opaque": {"weight": 1.0}}), tmp_path)
    reporter = train(make_config(rewards={"opaque": {"weight": 0.0}, "brightness": {}}), tmp_path)
    assert reporter.reports[-1]["eval/opaque"] == reporter.reports[-1]["eval/brightness"]


@pytest.mark.slow
def test_a_reward_that_is_not_finite_names_itself_and_the_prompt(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"'nan_when_two'.*two red birds"):
        train(make_config(rewards={"nan_when_two": {}}), tmp_path)


@pytest.mark.slow
def test_a_gradient_of_exactly_zero_is_an_error(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 1: the gradient of the mixed reward is exactly zero"):
        train(make_config(rewards={"blind": {}}), tmp_path)


@pytest.mark.slow
def test_a_truncated_checkpoint_names_its_folder(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    train(make_config(), tmp_path, base_dir=base_dir)
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    content = (checkpoint / "trainer.pt").read_bytes()
    (checkpoint / "trainer.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match="step-000002: cannot be resumed from"):
        train(make_config(), tmp_path, resume_from=checkpoint, base_dir=base_dir)


def test_too_few_held_out_prompts_are_refused(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.prompts: 9 prompts are wanted, but prompts\.eval holds 3"):
        train(make_config(evaluate={"prompts": 9}), tmp_path)


def test_lora_targets_that_match_nothing_are_refused(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.targets: .*nothing_like_this"):
        train(
            make_config(model={"lora": {"targets": ["nothing_like_this"]}, "base": make_config().model.base}), tmp_path
        )


@pytest.mark.slow
def test_one_training_prompt_is_enough_to_measure_the_unit_of_a_reward(make_config: Make, tmp_path: Path) -> None:
    config = make_config(prompts={"train": ["a cat"]}, optim={"steps": 1})
    assert len(build_run(config).calibration_images) == NUM_CALIBRATION_IMAGES
    train(config, tmp_path)


# ---- how it ends


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "rounds"),
    [pytest.param(24, 2, marks=pytest.mark.long), (25, 3), pytest.param(1000, 4, marks=pytest.mark.long)],
)
def test_a_run_ends_with_the_round_that_uses_up_its_queries(
    make_config: Make, tmp_path: Path, base_dir: Path, queries: int, rounds: int
) -> None:
    estimator = {"name": "draft_lv", "k": None, "draw": None, "options": {"n": 2}}  # 3 queries an image, 12 a round
    config = make_config(estimator=estimator, optim={"queries": queries}, evaluate={"every": 3, "images_per_prompt": 1})
    reporter = train(config, tmp_path, base_dir=base_dir)
    assert [report["step"] for report in reporter.reports] == ([0, rounds] if rounds <= 3 else [0, 3, rounds])
    assert [report["is_final"] for report in reporter.reports] == [0] * (len(reporter.reports) - 1) + [1]
    assert reporter.reports[-1]["queries"] == 12 * rounds
    assert [row["queries"] for row in metrics(tmp_path)] == [12 * (i + 1) for i in range(rounds)]
    again = train(config, tmp_path, base_dir=base_dir, resume_from=tmp_path / "checkpoints" / f"step-{rounds:06d}")
    assert [(report["step"], report["is_final"]) for report in again.reports] == [(rounds, 1)]


# ---- what is trained on


@pytest.mark.slow
def test_a_cap_that_every_image_has_reached_changes_nothing_and_is_no_fault(
    make_config: Make, tmp_path: Path, base_dir: Path
) -> None:
    rewards = {"brightness": {"loss": "hinge", "target": -1.0}}
    reporter = train(make_config(rewards=rewards, optim={"weight_decay": 0.1}), tmp_path, base_dir=base_dir)
    assert reporter.reports[-1]["is_final"] == 1
    assert reporter.reports[-1]["eval/drift"] == 0
    assert [row["grad_norm"] for row in metrics(tmp_path)] == [0, 0, 0, 0]
    first, last = adapters(tmp_path, 2), adapters(tmp_path, 4)
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert any(bool(values.any()) for values in first.values())  # the half that does not start at 0


@pytest.mark.slow
def test_a_cap_out_of_reach_is_no_cap(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    for name, reward in (("linear", {}), ("capped", {"loss": "hinge", "target": 2.0})):
        train(make_config(rewards={"brightness": reward}, optim={"steps": 2}), tmp_path / name, base_dir=base_dir)
    linear, capped = adapters(tmp_path / "linear", 2), adapters(tmp_path / "capped", 2)
    assert all(torch.equal(linear[name], capped[name]) for name in linear)


@pytest.mark.slow
def test_a_target_below_every_score_pulls_the_other_way(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    for name, reward in (("up", {}), ("down", {"loss": "target", "target": -1.0})):
        train(
            make_config(rewards={"brightness": reward}, optim={"steps": 1, "weight_decay": 0.0}),
            tmp_path / name,
            base_dir=base_dir,
        )
    up, down = adapters(tmp_path / "up", 1), adapters(tmp_path / "down", 1)
    moved = [name for name in up if ".lora_B." in name]
    assert moved
    # the gradient is negated, and so is Adam's first step from 0
    assert all(torch.equal(up[name], -down[name]) for name in moved)
    assert metrics(tmp_path / "down")[0]["train/reward"] < 0 < metrics(tmp_path / "down")[0]["train/brightness"]


# ---- the average


@pytest.mark.long
def test_the_average_is_what_is_evaluated_and_exported_while_training_goes_on(
    make_config: Make, tmp_path: Path, base_dir: Path
) -> None:
    sections: dict[str, Any] = {"optim": {"steps": 3}, "evaluate": {"every": 1}}
    train(make_config(**sections), tmp_path / "raw", base_dir=base_dir)
    sections["optim"] |= {"ema": 0.5}
    config = make_config(**sections)
    reporter = train(config, tmp_path / "average", base_dir=base_dir)
    own = [adapters(tmp_path / "raw", step) for step in (1, 2, 3)]
    for step, weights in ((1, [1.0]), (2, [1 / 3, 2 / 3]), (3, [1 / 7, 2 / 7, 4 / 7])):
        exported = adapters(tmp_path / "average", step)
        for name, values in exported.items():
            expected = sum((w * raw[name] for w, raw in zip(weights, own, strict=False)), torch.zeros_like(values))
            # three float32 products; elements of the order of lr = 1e-2 and of 1
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-7)
        # training went on from the adapters' own values: every round's first numbers are those of the raw run
        raw_row, row = (metrics(tmp_path / name)[step - 1] for name in ("raw", "average"))
        assert (row["train/reward"], row["grad_norm"]) == (raw_row["train/reward"], raw_row["grad_norm"])
    run = adapted_run(config)
    load_lora_state(run.model.network, adapters(tmp_path / "average", 3))
    samples = sample_and_score(run.sampler, run.eval_images, run.rewards, run.workers, batch_size=run.eval_batch)
    assert reporter.reports[-1]["eval/brightness"] == pytest.approx(samples.values["brightness"].mean(), rel=1e-6)
    assert metrics(tmp_path / "raw")[2]["eval/brightness"] != reporter.reports[-1]["eval/brightness"]


# ---- steps left to the base model


@pytest.mark.slow
def test_steps_of_the_base_model_hold_the_images_near_it(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    sections = {"estimator": {"draw": "fixed", "k": 1}, "optim": {"steps": 1, "lr": 2e-2}}
    drifts = {}
    for base_steps in (0, 2, 3):
        config = make_config(**sections, sampler={"base_steps": base_steps})
        root = tmp_path / str(base_steps)
        drifts[base_steps] = train(config, root, base_dir=base_dir).reports[-1]["eval/drift"]
    assert 0 < drifts[3] < drifts[2] < drifts[0]
    # the adapters are the same, since the only step that carries gradient is the last, and they start at 0
    whole, last = adapters(tmp_path / "0", 1), adapters(tmp_path / "3", 1)
    assert all(torch.equal(whole[name], last[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_at_learning_rate_zero_steps_of_the_base_model_change_no_bit(
    make_config: Make, tmp_path: Path, eta: float
) -> None:
    for base_steps in (0, 3):  # the first run measures the base model for both
        config = make_config(
            sampler={"base_steps": base_steps, "eta": eta}, estimator={"k": 1}, optim={"lr": 0.0, "steps": 1}
        )
        reporter = train(config, tmp_path / str(base_steps), base_dir=tmp_path / "base")
        assert reporter.reports[-1]["eval/drift"] == 0
        assert reporter.reports[-1]["gain/brightness"] == 0
    assert len(list((tmp_path / "base").iterdir())) == 1


# ---- speed


@pytest.mark.long
def test_steps_without_gradient_in_bfloat16_are_nearly_the_same(
    make_config: Make, tmp_path: Path, base_dir: Path
) -> None:
    sections = {"estimator": {"draw": "fixed", "k": 1}, "optim": {"steps": 1, "lr": 0.0}}
    exact = train(make_config(**sections), tmp_path / "same", base_dir=base_dir).reports[-1]
    rough = train(make_config(**sections, resources={"prefix_precision": "bf16"}), tmp_path / "bf16", base_dir=base_dir)
    report = rough.reports[-1]
    assert report["eval/brightness"] != exact["eval/brightness"]
    assert report["eval/brightness"] == pytest.approx(exact["eval/brightness"], rel=1e-2)  # 8 bits of mantissa
    assert report["eval/drift"] == 0  # measured against a base model that is sampled in bfloat16 too


@pytest.mark.long
def test_steps_of_the_base_model_are_sampled_in_bfloat16_like_those_of_the_reference(
    make_config: Make, tmp_path: Path
) -> None:
    for base_steps in (0, 3):
        config = make_config(
            sampler={"base_steps": base_steps},
            estimator={"k": 1},
            optim={"lr": 0.0, "steps": 1},
            resources={"prefix_precision": "bf16"},
        )
        reporter = train(config, tmp_path / str(base_steps), base_dir=tmp_path / "base")
        assert reporter.reports[-1]["eval/drift"] == 0


# tracing looks at every input's .grad, which PyTorch warns of where the input is no leaf
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_network_trains_the_same_adapters(
    make_config: Make, tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.nn.Module.compile
    # traced but not translated: the translation alone takes minutes on a CPU
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend="eager"))
    sections = {"sampler": {"base_steps": 1}, "optim": {"steps": 2}}
    for is_compiled in (False, True):
        config = make_config(**sections, resources={"compile": is_compiled})
        train(config, tmp_path / str(is_compiled), base_dir=base_dir)
    plain, compiled = adapters(tmp_path / "False", 2), adapters(tmp_path / "True", 2)
    assert plain.keys() == compiled.keys()
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)
