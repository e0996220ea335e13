"""What goes together with ``task``."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rltune.config.experiment import Context, RunConfig
from rltune.config.load import parse_experiment
from rltune.config.rules import Known
from rltune.errors import ExperimentError

KNOWN = Known(canvas_rewards=("beside",))


def faults(**sections: Any) -> str:
    asked = {"rewards": {"beside": {}}, **sections}
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(asked, context=Context(KNOWN, must_find_files=True))
    return str(caught.value)


def test_text_to_image_is_the_default() -> None:
    assert RunConfig.model_validate({"rewards": {"a": {}}}).task == "text_to_image"


def test_a_reward_that_looks_at_pictures_wants_the_task_that_has_them() -> None:
    what = "beside compares an image with what was given of it, got task: text_to_image; write task: inpaint"
    assert f"rewards.beside: {what}" in faults()
    assert f"rewards.mine: {what}" in faults(rewards={"mine": {"reward": "beside"}})
    assert f"evaluate.judges.0: {what}" in faults(rewards={"a": {}}, evaluate={"judges": ["beside"]})
    RunConfig.model_validate({"task": "inpaint", "rewards": {"beside": {}}}, context=Context(KNOWN))


def test_a_reward_that_looks_at_pictures_is_not_taken_relative_to_words() -> None:
    relative = {"relative": {"positive": "good", "negative": "bad"}}
    found = faults(task="inpaint", rewards={"beside": relative})
    assert "rewards.beside.relative.positive: beside reads no words, got 'good'; leave relative out" in found


def test_pictures_may_be_a_folder_and_prompts_may_not(tmp_path: Path) -> None:
    sets = {"train": str(tmp_path), "eval": str(tmp_path)}
    RunConfig.model_validate(
        {"task": "inpaint", "rewards": {"a": {}}, "prompts": sets}, context=Context(must_find_files=True)
    )
    assert re.search(r"prompts\.train: no such file, got '.*'", faults(rewards={"a": {}}, prompts=sets))


@pytest.mark.parametrize("text", ["task: {choice: [inpaint]}", "prompts: {masks: {choice: [box, border]}}"])
def test_what_is_drawn_is_the_same_for_all_trials(text: str) -> None:
    with pytest.raises(ExperimentError, match="all trials share it; write one value"):
        parse_experiment(f"{text}\nrewards: {{a: {{}}}}\n", "experiment.yaml")
