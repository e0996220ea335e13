"""What is masked in texts, and what is not."""

import json
import logging

import pytest

from rltune.errors import RunError
from rltune.redaction import Redacting, holds_secret, is_secret_name, redact, remember


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("see https://me:hush@host/path?x=1", "see https://***@host/path?x=1"),
        ("postgresql://me:hush@db:5432", "postgresql://***@db:5432"),
        ("http://host/score?model=a&api_token=hush&b=2", "http://host/score?model=a&api_token=***&b=2"),
        ("exceeded with url: /score?sig=hush (Caused by x)", "exceeded with url: /score?sig=*** (Caused by x)"),
        ("mail me@host, a ratio of 3://4", "mail me@host, a ratio of 3://4"),
        ("http://host/score?model=a", "http://host/score?model=a"),
    ],
)
def test_what_lets_one_in_is_masked_in_addresses(text: str, masked: str) -> None:
    assert redact(text) == masked
    assert holds_secret(text) == (text != masked)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "Authorization", "X-Api-Key", "db_password", "apikey"])
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "max_tokens", "keyword", "monkey", "PATH", "signal"])
def test_other_names_are_not(name: str) -> None:
    assert not is_secret_name(name)


def test_known_secrets_are_masked_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'hush "hush"/1'
    monkeypatch.setenv("SOME_TOKEN", secret)
    monkeypatch.setenv("SOME_NAME", "nothing to hide")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    assert redact(f"a {secret} b") == "a *** b"
    assert secret[:4] not in redact(json.dumps({"reason": secret}))
    assert redact("?q=hush%20%22hush%22%2F1") == "?q=***"
    assert redact("nothing to hide") == "nothing to hide"
    remember("Bearer of-the-ring")
    assert redact("got of-the-ring") == "got ***"
    assert str(RunError(f"got {secret}")) == "got ***"


def test_a_log_is_masked(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hush-hush")
    logger = logging.getLogger("tests.redaction")
    masking = Redacting()
    logger.addFilter(masking)
    logger.warning("with %s", "hush-hush")
    logger.removeFilter(masking)
    assert caplog.messages == ["with ***"]
