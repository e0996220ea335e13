"""No secret reaches a file, a log or a tracker: what is known to be one is masked in texts that others may read.

Known are the values that ``remember`` was told, those of environment variables whose names say so, and what stands for
a password in an address. It is a net below the rule that no setting holds a secret, and no licence to break it.
"""

import functools
import json
import logging
import os
import re
from urllib.parse import quote

MASK = "***"
SHORTEST = 8
"""Shorter values are words of a text too often, and no secrets."""
_WORDS = r"(token|secret|passw(or)?d|credentials?|authorization|(api|access|private)[_-]?key)"
_SECRET_NAME = re.compile(rf"(^|[^a-z]){_WORDS}([^a-z]|$)", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
_QUERY = re.compile(
    r"([?&;][\w.-]*(?:token|secret|passw(?:or)?d|key|sig|signature|auth|credential)[\w.-]*=)[^&;\s'\"#)]+",
    re.IGNORECASE,
)
_remembered: set[str] = set()


def remember(secret: str) -> None:
    """Mask a text, and the token of ``Bearer TOKEN``, wherever it is met from now on in this process."""
    _remembered.update(part for part in (secret, *secret.split()) if len(part) >= SHORTEST)


@functools.cache  # every record of a log asks for all names of the environment
def is_secret_name(name: str) -> bool:
    """Return whether what is called so is likely to be a secret: ``api_key``, ``AUTH_TOKEN``, ``Authorization``."""
    return _SECRET_NAME.search(name) is not None


def holds_secret(address: str) -> bool:
    """Return whether an address holds what lets one in: ``user:password@``, or ``?token=``."""
    return _LOGIN.search(address) is not None or _QUERY.search(address) is not None


def redact(text: str) -> str:
    """Return a text with every known secret masked."""
    found = {value for name, value in os.environ.items() if len(value) >= SHORTEST and is_secret_name(name)}
    for secret in sorted(found | _remembered, key=len, reverse=True):
        for form in (secret, json.dumps(secret)[1:-1], quote(secret, safe="")):
            text = text.replace(form, MASK)
    return _QUERY.sub(rf"\1{MASK}", _LOGIN.sub(MASK, text))


class Redacting(logging.Filter):
    """Masks secrets in what a logger or a handler writes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through, masked."""
        record.msg, record.args = redact(record.getMessage()), None
        return True
