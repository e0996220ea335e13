"""Every setting that a page shows is one: blocks and snippets of YAML, and dotted names, go through the validation."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment, parse_experiment
from rltune.config.schema import node_at
from rltune.errors import ExperimentError
from rltune.orchestration.nodes import Node
from rltune.orchestration.plan import plan
from rltune.runs.layout import RunFolder
from tests.docs.pages import PAGES, README, Page, known

SECTIONS = set(RunConfig.model_fields)
AROUND = {
    "rewards": {"aesthetic": {"weight": 1.0}},
    "model": {"lora": {"rank": {"choice": [2, 4, 8]}}},
    "optim": {"lr": {"log_float": [1e-4, 1e-2]}},
    "evaluate": {"every": 10, "judges": ["diversity", "drift", "faithful"]},
    "constraints": {"faithful": {"min_ratio_to_base": 0.8}},
}
"""What a snippet may rely on."""
FILES = (".safetensors", ".json")
LACKING = re.compile(
    r"no module 'my_rewards'|not on this machine: |model\.base: no such folder|is not installed|variable \w+ is not set"
    r"|options\.head: no such file|'centroid': images: no such file"
)
"""Faults of an experiment that another machine would not find: published weights, the reader's own code and files, a
secret, a library of an extra."""
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def loaded(content: Any, *overrides: str) -> Experiment:
    """Return the experiment; raises ``ExperimentError`` for what is none."""
    return parse_experiment(yaml.safe_dump(content), "page", overrides, known(), must_find_files=False)


def is_experiment(content: Any) -> bool:
    return isinstance(content, dict) and content.keys() <= SECTIONS


def has_placeholder(code: str) -> bool:
    return "..." in code or bool(re.search(r"\b(NAME|FOLDER|OPTION|VALUE)\b", code))


@pytest.mark.long
@every_page
def test_every_block_of_yaml_is_an_experiment_that_could_start(page: Page, tmp_path: Path) -> None:
    """On a cluster that is large enough, but for what this machine lacks."""
    node = Node(64.0, 8.0, accelerators=frozenset({"H100"}))
    for block in page.blocks("yaml"):
        content = yaml.safe_load(block)
        assert is_experiment(content), f"{page.name}: {block}"
        try:
            plan(loaded(content), [node], RunFolder(tmp_path / "run"))
        except ExperimentError as error:
            faults = [str(fault) for fault in error.faults]
            assert [fault for fault in faults if not LACKING.search(fault)] == [], page.name


@every_page
def test_every_snippet_of_yaml_is_part_of_an_experiment(page: Page) -> None:
    for span in page.spans():
        if not re.match(r"\w+: ", span) or has_placeholder(span):
            continue
        content = yaml.safe_load(span)
        if is_experiment(content):
            sections = {key: AROUND.get(key, {}) | value for key, value in content.items() if isinstance(value, dict)}
            assert loaded(AROUND | content | sections), f"{page.name}: {span}"


@every_page
def test_every_dotted_name_is_a_setting(page: Page) -> None:
    for span in page.spans():
        found = re.fullmatch(r"([a-z_]+(?:\.[A-Za-z_]+)+)(?:(?:: |=)(\S+))?", span)
        if found is None or found[1].split(".")[0] not in SECTIONS or found[1].endswith(FILES):
            continue
        path, value = found.groups()
        assert node_at(tuple(path.split("."))) is not None, f"{page.name}: there is no setting {path}"
        if value and value != "n" and "NAME" not in path:
            assert loaded(AROUND, f"{path}={value}"), f"{page.name}: {span}"


def test_the_readmes_experiment_is_searched() -> None:
    (experiment,) = README.blocks("yaml")
    assert loaded(yaml.safe_load(experiment)).is_searched
