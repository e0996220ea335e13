"""A user's function and a user's server: what they are asked, what they may answer, what is said when they do not."""

import base64
import io
import json
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rltune.errors import RunError, UserError
from rltune.rewards import blackbox
from rltune.rewards.base import REWARDS, Card, Ready, has_gradient
from rltune.rewards.blackbox import FunctionReward, HttpReward

PROMPTS = ["a", "b", "c"]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 10, 14, generator=torch.Generator().manual_seed(0))


def levels(image_3HW: Tensor) -> np.ndarray:
    """The image as it is to be seen: rows, columns, channels of rounded levels."""
    return (255 * image_3HW.permute(1, 2, 0)).round().byte().numpy()


def ask(function: Callable[..., Any], images_B3HW: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
    return Ready(FunctionReward(function, path="my:score"), Card())(images_B3HW, prompts)


# ---- callable


def test_the_function_sees_the_pictures_and_their_prompts(images: Tensor) -> None:
    seen: list[Any] = []

    def score(pictures: list[Image.Image], prompts: list[str]) -> list[float]:
        seen.extend([pictures, prompts, torch.is_grad_enabled()])
        return [0.5, -2, 3e4]

    values = ask(score, images.requires_grad_())
    assert values.tolist() == [0.5, -2, 3e4]
    assert values.dtype == torch.float32
    assert not values.requires_grad
    pictures, prompts, is_grad = seen
    assert isinstance(pictures, list)
    assert [picture.mode for picture in pictures] == ["RGB"] * 3
    for picture, image in zip(pictures, images.detach(), strict=True):
        assert np.array_equal(np.asarray(picture), levels(image))
    assert prompts == PROMPTS
    assert not is_grad


@pytest.mark.parametrize(
    "answer",
    [
        (1, 2.5, -3),
        np.array([1, 2.5, -3]),
        np.array([1, 2.5, -3], dtype=np.float16),
        list(np.array([1, 2.5, -3], dtype=np.float32)),
        torch.tensor([1, 2.5, -3], requires_grad=True),
        torch.tensor([1, 2.5, -3], dtype=torch.bfloat16),
        [torch.tensor(1), np.array(2.5), -3],
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_numbers_may_come_in_any_row(images: Tensor, answer: Any) -> None:
    assert ask(lambda pictures, prompts: answer, images).tolist() == [1, 2.5, -3]


def test_what_is_not_finite_is_let_through(images: Tensor) -> None:
    values = ask(lambda pictures, prompts: [float("nan"), float("inf"), 1e300], images)
    assert values.isnan().tolist() == [True, False, False]
    assert values[1:].tolist() == [float("inf")] * 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0, 2.0], "2 scores for 3 images"),
        (torch.zeros(4), "4 scores for 3 images"),
        (None, "NoneType None"),
        (1.0, "float 1.0"),
        (torch.tensor(0.5), "Tensor tensor(0.5000)"),
        ("abc", "str 'abc'"),
        ({"a": 1}, "dict {'a': 1}"),
        ([1, "2", 3], "str '2' as score 1"),
        ([1, 2, None], "NoneType None as score 2"),
        ([1, True, 3], "bool True as score 1"),
        (torch.zeros(3, 1), "list [0.0] as score 0"),
        ([1, 2, 10**400], "int 1" + "0" * 201 + " as score 2"),
        ([1, 2j, 3], "complex 2j as score 1"),
    ],
)
def test_another_answer_is_named(images: Tensor, answer: Any, said: str) -> None:
    with pytest.raises(RunError) as caught:
        ask(lambda pictures, prompts: answer, images)
    assert str(caught.value) == f"reward 'callable': my:score must return one number an image, got {said}"


def test_a_function_that_fails_is_named_with_its_reason(images: Tensor) -> None:
    def score(pictures: list[Image.Image], prompts: list[str]) -> list[float]:
        raise KeyError("colour")

    with pytest.raises(RunError, match=r"^reward 'callable': my:score failed with KeyError: 'colour'$") as caught:
        ask(score, images)
    assert isinstance(caught.value.__cause__, KeyError)


def test_nobody_is_asked_about_no_images(images: Tensor) -> None:
    assert ask(lambda pictures, prompts: 1 / 0, images[:0], []).shape == (0,)
    with pytest.raises(ValueError, match="prompts must be one an image"):
        ask(lambda pictures, prompts: [1.0], images, ["a"])


def test_the_function_is_required_and_loaded_by_its_path(images: Tensor) -> None:
    with pytest.raises(UserError, match="reward 'callable': function must be given, the 'module:name' of a function"):
        REWARDS.build("callable", {})
    with pytest.raises(UserError, match="reward 'callable': function 'nowhere_at_all:score': there is no module"):
        REWARDS.build("callable", {"function": "nowhere_at_all:score"})
    with pytest.raises(RunError, match=r"callable': math:fsum failed with TypeError: math.fsum\(\) takes exactly one"):
        REWARDS.build("callable", {"function": "math:fsum"})(images, PROMPTS)
    assert not has_gradient("callable")
    assert not has_gradient("http")


# ---- http


class Server:
    """A server of the test's own, on 127.0.0.1: answers as it is told, in turn, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Mapping[str, str], bytes]] = []
        """What to answer first; when none are left, the scores are each picture's top left level of red."""
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.url = ""
        self.is_silent = False
        self.num_connections = 0
        self.closed = threading.Semaphore(0)
        self.end = threading.Event()

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.answers.append((status, headers, body))

    def scores(self, asked: Mapping[str, Any]) -> bytes:
        pictures = [Image.open(io.BytesIO(base64.b64decode(text, validate=True))) for text in asked["images"]]
        return json.dumps({"scores": [int(np.asarray(picture)[0, 0, 0]) for picture in pictures]}).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, for the reward to close

        def setup(self) -> None:
            told.num_connections += 1
            super().setup()

        def finish(self) -> None:
            super().finish()
            told.closed.release()

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.asked.append(asked)
            told.headers.append(dict(self.headers))
            if told.is_silent:
                told.end.wait(60)
                self.close_connection = True
                return
            status, headers, body = told.answers.pop(0) if told.answers else (200, {}, told.scores(asked))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(blackbox, "BACKOFF_S", 0.001)  # retries that are not waited for
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        told.url = f"http://127.0.0.1:{http.server_address[1]}/score"
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield told
        told.end.set()
        http.shutdown()


def fault(server: Server, images_B3HW: Tensor, **options: Any) -> str:
    """What the reward says when it fails."""
    reward = REWARDS.build("http", {"url": server.url, **options})
    with pytest.raises(RunError) as caught:
        reward(images_B3HW, PROMPTS)
    text = str(caught.value)
    assert text.startswith(f"reward 'http': {server.url}: got ")
    return text.removeprefix(f"reward 'http': {server.url}: got ")


def test_the_server_is_asked_as_the_protocol_says(
    server: Server, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORER_AUTH", "Bearer 1")
    monkeypatch.setenv("SCORER_TEAM", "a")
    names = {"Authorization": "SCORER_AUTH", "X-Team": "SCORER_TEAM"}
    reward = REWARDS.build("http", {"url": server.url, "headers_from": names})
    values = reward(images.clone().requires_grad_(), PROMPTS)
    assert values.dtype == torch.float32
    assert not values.requires_grad
    assert values.tolist() == [float(levels(image)[0, 0, 0]) for image in images]
    (asked,), (headers,) = server.asked, server.headers
    assert set(asked) == {"images", "prompts"}
    assert asked["prompts"] == PROMPTS
    for text, image in zip(asked["images"], images, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            assert np.array_equal(np.asarray(picture), levels(image))
    assert headers["Content-Type"] == "application/json"
    assert (headers["Authorization"], headers["X-Team"]) == ("Bearer 1", "a")
    assert "Bearer" not in repr(reward)


def test_images_may_go_as_jpeg(server: Server, images: Tensor) -> None:
    REWARDS.build("http", {"url": server.url, "format": "jpeg"})(images, PROMPTS)
    for text, image in zip(server.asked[0]["images"], images, strict=True):
        ours, theirs = base64.b64decode(text), io.BytesIO()
        Image.fromarray(levels(image)).save(theirs, "JPEG", quality=95)
        assert ours == theirs.getvalue()


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (16, [3])])
def test_batches_are_split_and_stay_in_order(server: Server, images: Tensor, batch: int, sizes: list[int]) -> None:
    values = REWARDS.build("http", {"url": server.url, "batch": batch})(images, PROMPTS)
    assert [len(asked["images"]) for asked in server.asked] == sizes
    assert [prompt for asked in server.asked for prompt in asked["prompts"]] == PROMPTS
    assert values.tolist() == [float(levels(image)[0, 0, 0]) for image in images]


def test_no_images_are_not_sent(server: Server, images: Tensor) -> None:
    assert REWARDS.build("http", {"url": server.url})(images[:0], []).shape == (0,)
    assert server.asked == []


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(server: Server, images: Tensor, status: int) -> None:
    for _ in range(2):
        server.answer(status, b"busy")
    values = REWARDS.build("http", {"url": server.url, "retries": 2})(images, PROMPTS)
    assert values.tolist() == [float(levels(image)[0, 0, 0]) for image in images]
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[1] == server.asked[2]


def test_a_server_that_stays_busy_is_left_and_its_answer_shown(server: Server, images: Tensor) -> None:
    for _ in range(3):
        server.answer(503, b"x" * 300)
    text = fault(server, images, retries=2)
    assert text == f"status 503 (Service Unavailable) with '{'x' * 200}'; see what the server has logged"
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 204])
def test_another_status_is_not_asked_again(server: Server, images: Tensor, status: int) -> None:
    server.answer(status, b"" if status == 204 else b"no \xff way")
    text = fault(server, images)
    shown = "''" if status == 204 else "'no \ufffd way'"
    assert re.fullmatch(rf"status {status} \(.+\) with {shown}; see what the server has logged", text)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(server: Server, images: Tensor, status: int) -> None:
    server.answer(status, b"", Location="http://127.0.0.1:9/other")
    text = fault(server, images)
    assert text.startswith(f"status {status} (")
    assert text.endswith(") to http://127.0.0.1:9/other; give the address that it leads to as url")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "no JSON but '<html>'"),
        (b"", "no JSON but ''"),
        (b"[1, 2, 3]", "no scores but '[1, 2, 3]'"),
        (b'{"score": [1, 2, 3]}', "no scores but '{\"score\": [1, 2, 3]}'"),
        (b'{"scores": [1, 2]}', "2 scores for 3 images"),
        (b'{"scores": 1}', "int 1"),
        (b'{"scores": {"0": 1}}', "dict {'0': 1}"),
        (b'{"scores": [1, "2", 3]}', "str '2' as score 1"),
        (b'{"scores": [1, null, 3]}', "NoneType None as score 1"),
        (b'{"scores": [1, true, 3]}', "bool True as score 1"),
        (b'{"scores": [[1], [2], [3]]}', "list [1] as score 0"),
    ],
)
def test_another_answer_of_the_server_is_named(server: Server, images: Tensor, body: bytes, said: str) -> None:
    server.answer(200, body)
    remedy = 'the server must answer {"scores": [...]}, one number an image (3 here)'
    assert fault(server, images) == f"{said}; {remedy}"


def test_nan_of_the_server_is_let_through(server: Server, images: Tensor) -> None:
    server.answer(200, b'{"scores": [NaN, 1, 2.5], "model": "m"}')
    values = REWARDS.build("http", {"url": server.url})(images, PROMPTS)
    assert values[0].isnan()
    assert values[1:].tolist() == [1, 2.5]


@pytest.mark.parametrize("retries", [0, 1])
def test_a_silent_server_is_named_with_the_time_it_had(server: Server, images: Tensor, retries: int) -> None:
    server.is_silent = True
    text = fault(server, images, timeout_s=0.2, retries=retries)
    assert text.startswith("ReadTimeoutError: ")
    assert text.endswith("; see that the server is up and answers within timeout_s (0.2 s)")
    assert len(server.asked) == 1 + retries


def test_a_server_that_is_not_there_is_named(server: Server, images: Tensor) -> None:
    with socket.socket() as free:  # bound and not listening: whoever calls is refused
        free.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
        text = fault(server, images, retries=1)
    assert re.match(r"NewConnectionError: .*refused; see that the server is up", text)


def test_a_call_opens_one_connection_and_closes_it(server: Server, images: Tensor) -> None:
    reward = REWARDS.build("http", {"url": server.url, "batch": 1})
    reward(images, PROMPTS)
    assert len(server.asked) == 3
    assert server.num_connections == 1
    assert server.closed.acquire(timeout=30)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "url must be given, the address of a server that scores images, as in 'http://127.0.0.1:8000/score'"),
        ({"url": "127.0.0.1:8000"}, "url must be the address of a server .*, got '127.0.0.1:8000'"),
        ({"url": "ftp://host/"}, "url must be .*, got 'ftp://host/'"),
        ({"url": "http:///score"}, "url must be .*, got 'http:///score'"),
        ({"url": "http://host:port/"}, "url must be .*, got 'http://host:port/'"),
        ({"url": 8000}, "url must be .*, got 8000"),
        ({"url": None}, "url must be .*, got None"),
        ({"timeout_s": 0}, "timeout_s must be a number of seconds above 0, got 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be a number of seconds above 0, got nan"),
        ({"timeout_s": float("inf")}, "timeout_s must be a number of seconds above 0, got inf"),
        ({"timeout_s": "60"}, "timeout_s must be a number of seconds above 0, got '60'"),
        ({"retries": -1}, "retries must be a whole number, 0 or more, got -1"),
        ({"retries": 1.5}, "retries must be a whole number, 0 or more, got 1.5"),
        ({"batch": 0}, "batch must be a whole number, 1 or more, got 0"),
        ({"batch": True}, "batch must be a whole number, 1 or more, got True"),
        ({"format": "webp"}, "format must be 'png' or 'jpeg', got 'webp'"),
        ({"headers": {"X": "a"}}, "option 'headers' is unknown; did you mean 'headers_from'.*"),
        ({"headers_from": "Authorization: x"}, "headers_from must be a mapping of headers to names of .*, got str"),
        ({"headers_from": {"X-Number": 3}}, "headers_from must be .*, that of 'X-Number' is not"),
        ({"headers_from": {"X": "Bearer secret"}}, "headers_from must be .*, that of 'X' is not"),
        ({"headers_from": {1: "x"}}, "headers_from must be .*, that of 1 is not"),
        (
            {"headers_from": {"X": "NOT_SET"}},
            "headers_from: X: the environment variable NOT_SET is .*",
        ),
        ({"url_from": "NOT_SET"}, "url and url_from must not both be given; delete one"),
        ({"url": "", "url_from": "NOT_SET"}, "url_from: the environment variable NOT_SET is not .*"),
        ({"url": "http://me:hush@host/"}, r"url must hold no .*, got http://\*\*\*@host/; put it into an .*"),
        ({"url": "http://host/?token=hush"}, r"url must hold no .*, got http://host/\?token=\*\*\*; put it .*"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], said: str) -> None:
    given = options if not options or "url" in options else {"url": "http://127.0.0.1/", **options}
    with pytest.raises(UserError, match=f"^reward 'http': {said}$"):
        REWARDS.build("http", given)
    assert HttpReward(url="https://host:8443/score?model=a").batch == 16
    assert HttpReward(url="http://127.0.0.1/", headers_from=None).headers_from is None


def test_what_is_secret_is_sent_and_never_said(
    server: Server, images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hush-hush-1234"
    monkeypatch.setenv("SCORER_AUTH", f"Bearer {secret}")
    monkeypatch.setenv("SCORER_URL", f"{server.url}?pass={secret}")
    reward = REWARDS.build("http", {"url_from": "SCORER_URL", "headers_from": {"Authorization": "SCORER_AUTH"}})
    server.answer(503, b"busy")
    with caplog.at_level("DEBUG", logger="urllib3"):
        reward(images, PROMPTS)
    assert server.headers[0]["Authorization"] == f"Bearer {secret}"
    server.answer(403, f"{secret} may not".encode())
    with pytest.raises(RunError, match=r"http': SCORER_URL: got status 403 .* with '\*\*\* may not'") as caught:
        reward(images, PROMPTS)
    monkeypatch.setenv("SCORER_URL", f"http://127.0.0.1:9/?pass={secret}")
    with pytest.raises(RunError) as unreachable:
        REWARDS.build("http", {"url_from": "SCORER_URL", "retries": 0})(images, PROMPTS)
    told = [*map(str, (caught.value, unreachable.value, reward)), caplog.text]
    told += traceback.format_exception(caught.value) + traceback.format_exception(unreachable.value)
    assert "?pass=***" in caplog.text
    assert not any(secret in text for text in told)
