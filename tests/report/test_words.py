"""What a report says of a run in words."""

from types import SimpleNamespace
from typing import Any

import pytest

from rltune.config.load import parse_experiment
from rltune.report.words import setup

WORDS = """
model:
  adapter: {kind: prompt}
  prompt: {template: "{prompt}, {light}", words: {light: {choice: ["", dim light]}}}
rewards: {aesthetic: {}}
"""


BOTH = WORDS.replace("kind: prompt", "kind: {choice: [prompt, lora]}").replace(
    "dim light]", "dim light], when: {model.adapter.kind: prompt}"
)


@pytest.mark.parametrize(("text", "is_trained"), [(WORDS, False), (BOTH, True), ("rewards: {aesthetic: {}}", True)])
def test_words_alone_have_no_estimator_and_no_steps(text: str, is_trained: bool) -> None:
    run: Any = SimpleNamespace(experiment=parse_experiment(text, "x.yaml"), results=())
    facts = dict(setup(run))
    assert ("estimator" in facts) == ("trained on" in facts) == is_trained
    assert facts["a trial"] == ("100 steps of 8 images" if is_trained else "words alone, nothing is trained")
    assert ("one of '', 'dim light'" in facts.get("searched", "")) == (text != "rewards: {aesthetic: {}}")
