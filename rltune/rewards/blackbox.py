"""Rewards that are asked, not differentiated: a Python function, or a server. For objectives and policy gradients.

B: images in the batch. H, W: image rows and columns.
"""

import base64
import io
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import requests
import torch
from PIL import Image
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.util import Retry

from rltune.errors import RunError, UserError
from rltune.redaction import Redacting, holds_secret, redact, remember
from rltune.rewards.base import REWARDS, Card
from rltune.rewards.imports import load_object
from rltune.rewards.pictures import to_pictures

for _name in ("urllib3.connectionpool", "urllib3.util.retry"):
    logging.getLogger(_name).addFilter(Redacting())  # they tell of retries, with the address

FORMATS = ("png", "jpeg")
JPEG_QUALITY = 95
RETRIED_STATUS = (429, 502, 503, 504)
"""Too many requests, bad gateway, unavailable, gateway timeout: what passes by itself."""
BACKOFF_S = 0.5
"""urllib3's factor: it tries again at once, then after 2, 4, 8 ... times this."""
SHOWN_CHARACTERS = 200
"""How much of an answer a message shows."""


class FunctionReward:
    """Whatever a Python function says of pictures and prompts.

    Args:
        function: Called with a list of RGB ``PIL.Image`` and the list of their prompts; returns a list, tuple, array or
            tensor of one number an image, larger is better, that depends on no other image. NaN is let through.
        path: What messages call the function.
    """

    def __init__(self, function: Callable[..., Any], *, path: str) -> None:
        self._function = function
        self._path = path

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1], clipped and rounded to 8 bits as a PNG is -> ``(B,)`` float32, no gradient.

        Raises:
            RunError: The function fails, or returns anything else than one number an image.
        """
        try:
            with torch.no_grad():  # what it returns comes from rounded pictures, and has no gradient to give
                answer = self._function(to_pictures(images_B3HW), list(prompts))
        except Exception as error:
            raise RunError(f"reward 'callable': {self._path} failed with {type(error).__name__}: {error}") from error
        try:
            return _to_scores(read_numbers(answer, len(prompts)), images_B3HW)
        except ValueError as error:
            raise RunError(f"reward 'callable': {self._path} must return one number an image, got {error}") from error


@REWARDS.register("callable", Card(scale="the function's", is_differentiable=False))
def build_callable(*, function: str | None = None) -> FunctionReward:
    """What a Python function of your own says of pictures and prompts, without gradient.

    Args:
        function: ``module:name`` of it, found on ``sys.path`` or in the current folder; required.

    Raises:
        UserError: It is not given, cannot be imported or cannot be called.
    """
    if function is None:
        raise UserError(
            "reward 'callable': function must be given, the 'module:name' of a function that takes a list of PIL "
            "images and a list of prompts and returns one number an image"
        )
    return FunctionReward(load_object("callable", function), path=function)


@REWARDS.register("http", Card(scale="the server's", is_differentiable=False))
@dataclass(frozen=True)
class HttpReward:
    """What a server of your own says of pictures and prompts, without gradient.

    This is all that the server must do:

    1. Answer ``POST`` at the address that is the option ``url``, with a body of ``application/json`` in UTF-8.
    2. The body is ``{"images": [...], "prompts": [...]}``, two lists of one length, 1 to ``batch``.
    3. An image is a string, the base64 (RFC 4648, no line breaks) of an RGB file of 8 bits a channel: PNG, or JPEG of
       quality 95. Sizes may differ between requests. A prompt is a string.
    4. The answer is status 200 and JSON ``{"scores": [...]}``: a number an image, in their order, larger is better,
       that depends on no other image of the request. ``NaN``, as Python's ``json`` writes it, says that an image could
       not be scored. Further keys are ignored.
    5. A lost connection, silence for ``timeout_s`` and the statuses 429, 502, 503 and 504 make the same request come
       again, ``retries`` times at most: at once, then after 1, 2, 4 ... s, or after what the header ``Retry-After``
       says. So a request must be harmless to repeat.
    6. Any other status ends the run; the message shows the first 200 characters of the body. Redirects are not
       followed, so that headers reach no other host than the one that was named.

    A secret is named, never written: settings are kept in the run folder, go to trackers and stand beside every
    exported LoRA. The variables must be set where ``rltune`` is started and, on a cluster that it does not start
    itself, where ``ray start`` is on every node, since rltune hands no secret to Ray.

    Args:
        url: Address, ``http://`` or ``https://``; required unless ``url_from`` is given.
        url_from: Environment variable that holds the address, where that is a secret.
        timeout_s: Seconds for connecting, and for each wait on the answer.
        retries: How often a request that failed is sent again.
        batch: Most images in a request; requests are sent one after the other.
        format: ``"png"``, the 8-bit picture without loss, or ``"jpeg"``, a fraction of the size.
        headers_from: Header to environment variable, as in ``{Authorization: SCORER_AUTHORIZATION}``; sent with each
            request.

    Raises:
        UserError: The address is not given, an option has a wrong value, or a variable is not set.
    """

    url: str = ""
    url_from: str = ""
    timeout_s: float = 60
    retries: int = 3
    batch: int = 16
    format: Literal["png", "jpeg"] = "png"
    headers_from: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        example = "the address of a server that scores images, as in 'http://127.0.0.1:8000/score'"
        if self.url == "" and self.url_from == "":
            raise UserError(f"reward 'http': url must be given, {example}")
        if self.url and self.url_from:
            raise UserError("reward 'http': url and url_from must not both be given; delete one")
        if isinstance(self.url, str) and holds_secret(self.url):
            raise UserError(
                f"reward 'http': url must hold no password or token, got {redact(self.url)}; put it into an "
                "environment variable, and write url_from: ITS_NAME"
            )
        _check("url_from", "the name of an environment variable", self.url_from, isinstance(self.url_from, str))
        option = "url_from" if self.url_from else "url"
        shown = f"the value of {self.url_from}" if self.url_from else repr(self.url)
        if not _is_address(self._address):
            raise UserError(f"reward 'http': {option} must be {example}, got {shown}")
        is_time = _is_number(self.timeout_s) and 0 < self.timeout_s < math.inf
        _check("timeout_s", "a number of seconds above 0", self.timeout_s, is_time)
        _check("retries", "a whole number, 0 or more", self.retries, _is_whole(self.retries) and self.retries >= 0)
        _check("batch", "a whole number, 1 or more", self.batch, _is_whole(self.batch) and self.batch >= 1)
        _check("format", " or ".join(map(repr, FORMATS)), self.format, self.format in FORMATS)
        self._check_headers()

    def _check_headers(self) -> None:
        what = "reward 'http': headers_from must be a mapping of headers to names of environment variables"
        names = self.headers_from or {}
        if not isinstance(names, Mapping):
            raise UserError(f"{what}, got {type(names).__name__}")
        for header, name in names.items():  # it may be the secret itself, and is not shown
            if not all(
                isinstance(text, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", text) for text in (header, name)
            ):
                raise UserError(f"{what}, that of {header!r} is not")
        for header, value in self._headers.items():
            if not (value.isascii() and value.isprintable()):
                raise UserError(f"{what}, and the value of {names[header]} must be printable ASCII")

    @property
    def _address(self) -> Any:
        return _read_variable(self.url_from, "url_from") if self.url_from else self.url

    @property
    def _headers(self) -> dict[str, str]:
        names = self.headers_from or {}
        return {header: _read_variable(name, f"headers_from: {header}") for header, name in names.items()}

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1], clipped and rounded to 8 bits as a PNG is -> ``(B,)`` float32, no gradient.

        Raises:
            RunError: The server cannot be reached, refuses, or answers anything else than one number an image.
        """
        retry = Retry(
            total=self.retries,
            allowed_methods={"POST"},
            status_forcelist=RETRIED_STATUS,
            backoff_factor=BACKOFF_S,
            raise_on_status=False,  # the last answer is returned, so that its body can be shown
        )
        scores: list[float] = []
        with requests.Session() as session:  # one connection for all requests of a call, closed with it
            session.mount("http://", HTTPAdapter(max_retries=retry))
            session.mount("https://", HTTPAdapter(max_retries=retry))
            for first in range(0, len(prompts), self.batch):
                rows = slice(first, first + self.batch)
                files = [_encode(picture, self.format) for picture in to_pictures(images_B3HW[rows])]
                scores += self._ask(session, files, list(prompts[rows]))
        return _to_scores(scores, images_B3HW)

    def _ask(self, session: requests.Session, files: Sequence[bytes], prompts: Sequence[str]) -> list[float]:
        body = {"images": [base64.b64encode(file).decode("ascii") for file in files], "prompts": prompts}
        try:
            response = session.post(
                self._address, json=body, headers=self._headers, timeout=self.timeout_s, allow_redirects=False
            )
        except requests.RequestException as error:
            remedy = f"see that the server is up and answers within timeout_s ({self.timeout_s:g} s)"
            raise self._fault(_cause(error), remedy) from None  # it shows the whole address
        status = f"status {response.status_code} ({response.reason})"
        if response.is_redirect:
            raise self._fault(f"{status} to {response.headers['Location']}", "give the address that it leads to as url")
        if response.status_code != 200:
            raise self._fault(f"{status} with {_shown(response.content)}", "see what the server has logged")
        remedy = f'the server must answer {{"scores": [...]}}, one number an image ({len(prompts)} here)'
        try:
            answer = response.json()
        except ValueError as error:
            raise self._fault(f"no JSON but {_shown(response.content)}", remedy) from error
        if not isinstance(answer, dict) or "scores" not in answer:
            raise self._fault(f"no scores but {_shown(response.content)}", remedy)
        try:
            return read_numbers(answer["scores"], len(prompts))
        except ValueError as error:
            raise self._fault(str(error), remedy) from error

    def _fault(self, what: str, remedy: str) -> RunError:
        return RunError(f"reward 'http': {self.url or self.url_from}: got {what}; {remedy}")


def read_numbers(answer: Any, num_images: int) -> list[float]:
    """Return one number an image from a list, a tuple, an array or a tensor; NaN and infinities are numbers.

    Raises:
        ValueError: It is anything else; the message says what it is.
    """
    values = answer.tolist() if isinstance(answer, np.ndarray | Tensor) else answer
    if not isinstance(values, list | tuple):
        raise ValueError(f"{type(answer).__name__} {_shown(answer)}")
    if len(values) != num_images:
        raise ValueError(f"{len(values)} scores for {num_images} image{'s' * (num_images != 1)}")
    numbers: list[float] = []
    for i, value in enumerate(values):
        number = value.item() if isinstance(value, np.ndarray | Tensor) and value.ndim == 0 else value
        try:
            if not _is_number(number):
                raise TypeError
            numbers.append(float(number))
        except (TypeError, OverflowError):  # JSON has whole numbers of any length
            raise ValueError(f"{type(number).__name__} {_shown(number)} as score {i}") from None
    return numbers


def _to_scores(numbers: Sequence[float], images_B3HW: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=images_B3HW.device)


def _encode(picture: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **({"quality": JPEG_QUALITY} if format == "jpeg" else {}))
    return buffer.getvalue()


def _read_variable(name: str, option: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise UserError(
            f"reward 'http': {option}: the environment variable {name} is not set here; export it where rltune is "
            "started and, on a cluster that rltune does not start itself, before 'ray start' on every node"
        )
    remember(value)
    return value


def _check(option: str, what: str, value: Any, is_right: bool) -> None:
    if not is_right:
        raise UserError(f"reward 'http': {option} must be {what}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_address(url: Any) -> bool:
    if not isinstance(url, str):
        return False
    try:
        parts = urlsplit(url)
        is_port = parts.port != 0  # reading it raises if it is no number
    except ValueError:
        return False
    return is_port and parts.scheme in ("http", "https") and bool(parts.hostname)


def _cause(error: Exception) -> str:
    """Return what went wrong, without the layers of libraries around it."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    cause = reason if isinstance(reason, Exception) else error
    return f"{type(cause).__name__}: {cause}"


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        value = value[: 4 * SHOWN_CHARACTERS].decode("utf-8", "replace")[:SHOWN_CHARACTERS]
    return repr(value)[: SHOWN_CHARACTERS + len("''")]
