"""The names and options that an experiment may use."""

from rltune.config.options import node_of
from rltune.orchestration.known import known_names


def test_an_option_that_is_nothing_when_left_out_can_be_null() -> None:
    known = known_names()
    found = []
    for kind, sections in (("estimator", known.estimator_options), ("reward", known.reward_options)):
        for name, section in sections.items():
            for key, node in node_of(section).get("properties", {}).items():
                if node.get("default") is None:
                    assert section.model_validate({key: None}), (kind, name, key)
                    found.append((name, key))
    assert ("http", "headers_from") in found
