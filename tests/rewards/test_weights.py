"""Published files of weights: found, fetched whole or not at all, and never waited for without a network."""

import fcntl
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import close_session

from rltune.errors import RunError, UserError
from rltune.rewards import weights as module
from rltune.rewards.base import REWARDS
from rltune.rewards.clip_loading import load_clip
from rltune.rewards.weights import WeightsFile, cache_dir, check_hub, explain, format_size, is_offline, locate

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HUB = WeightsFile(file="model.safetensors", licence="MIT", size_mb=7, repo="some/model")


class Host(BaseHTTPRequestHandler):
    """Gives ``CONTENT``, or half of it and hangs up, or an error, by the path; keeps what was asked."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/slow":
            time.sleep(1)
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/broken" else CONTENT)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a local host of files."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # whatever the machine's way to the network is
    monkeypatch.setattr(Host, "asked", [], raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says of the hub, unless a test says otherwise."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of files that are not on the hub; not there yet."""
    monkeypatch.setenv("RLTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def at(url: str, sha256: str = SHA256) -> WeightsFile:
    return WeightsFile(file="head.pth", licence="MIT", size_mb=0.007, url=url, sha256=sha256)


def cached(folder: Path, file: WeightsFile, content: bytes = CONTENT) -> Path:
    """Put a file into a Hugging Face cache as the hub's library lays it out."""
    repo = folder / f"models--{file.repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
    link = repo / "snapshots" / commit / file.file
    for path in (blob, link, repo / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(blob)
    (repo / "refs" / "main").write_text(commit)
    return link


# ---- files at an address


def test_a_file_is_fetched_once(folder: Path, host: str) -> None:
    file = at(f"{host}/head.pth")
    assert file.find() is None
    path = file.fetch()
    assert path == folder / "head.pth"
    assert path.read_bytes() == CONTENT
    assert file.find() == path
    assert file.fetch() == path
    assert Host.asked == ["/head.pth"]
    assert [entry.name for entry in folder.iterdir()] == ["head.pth"]


def test_workers_of_a_machine_that_start_together_fetch_a_file_once(folder: Path, host: str) -> None:
    file = at(f"{host}/head.pth")
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # by a first worker, which is at it
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(file.fetch) for _ in range(3)]
        time.sleep(0.05)
        assert not any(worker.done() for worker in waiting)
        os.close(descriptor)  # it was killed before it was done
        assert {worker.result() for worker in waiting} == {folder / "head.pth"}
    assert Host.asked == ["/head.pth"]


@pytest.mark.parametrize(
    ("path", "sha256", "reason"),
    [
        ("/missing", SHA256, "127.0.0.1 answers 404"),
        ("/broken", "", "the connection broke off"),  # without a digest that would notice
        ("/head.pth", "0" * 64, "what http://127.0.0.1:.*/head.pth gives has the sha256 " + SHA256),
    ],
)
def test_what_does_not_come_whole_leaves_nothing(folder: Path, host: str, path: str, sha256: str, reason: str) -> None:
    file = at(host + path, sha256)
    with pytest.raises(RunError, match=rf"^head\.pth could not be fetched: {reason}") as caught:
        file.fetch()
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
    assert file.find() is None


def test_a_download_that_failed_does_not_harm_what_another_process_put_there(
    folder: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = at(f"{host}/broken")
    folder.mkdir()
    (folder / "head.pth.other.part").write_bytes(b"half")
    with pytest.raises(RunError):
        file.fetch()
    assert [entry.name for entry in folder.iterdir()] == ["head.pth.other.part"]


def test_a_host_that_is_not_there_is_said_so(folder: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: it refuses connections
        taken.bind(("127.0.0.1", 0))
        file = at(f"http://127.0.0.1:{taken.getsockname()[1]}/head.pth")
        with pytest.raises(RunError, match=r"^head\.pth could not be fetched: no way to 127\.0\.0\.1: Connection ref"):
            file.fetch()


def test_a_host_that_does_not_answer_is_given_up(folder: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    get = requests.get
    monkeypatch.setattr(requests, "get", lambda url, **options: get(url, **{**options, "timeout": 0.1}))
    with pytest.raises(RunError, match=r"head\.pth could not be fetched: 127\.0\.0\.1 took too long to answer$"):
        at(f"{host}/slow").fetch()


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLTUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RunError, match=r"^head\.pth could not be fetched: Not a directory$"):
        at(f"{host}/head.pth").fetch()


def test_a_file_that_is_here_and_not_the_published_one_is_refused_and_kept(folder: Path, host: str) -> None:
    folder.mkdir()
    (folder / "head.pth").write_bytes(b"mine")
    with pytest.raises(UserError, match=rf"head\.pth is not the published head\.pth, its sha256 is .* be {SHA256}"):
        at(f"{host}/head.pth").fetch()
    assert (folder / "head.pth").read_bytes() == b"mine"
    assert Host.asked == []


def test_a_digest_is_that_of_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    at("").check(tmp_path / "a")
    (tmp_path / "a").write_bytes(CONTENT + b".")
    with pytest.raises(UserError):
        at("").check(tmp_path / "a")
    at("", sha256="").check(tmp_path / "a")  # not pinned: anything goes


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLTUNE_CACHE", "~/here")
    assert cache_dir() == Path.home() / "here"
    monkeypatch.setenv("RLTUNE_CACHE", "")  # as good as not set; it would be the current folder
    assert cache_dir() == Path.home() / ".cache" / "rltune"
    monkeypatch.delenv("RLTUNE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "rltune"


# ---- files on the hub


def test_a_file_of_the_hub_is_found_in_its_cache(hub_cache: Path) -> None:
    assert HUB.find() is None
    link = cached(hub_cache, HUB)
    assert HUB.find() == link
    assert WeightsFile(file="other.bin", licence="MIT", size_mb=1, repo="some/model").find() is None
    link.resolve().unlink()  # a link to nothing
    assert HUB.find() is None


def test_a_cached_file_is_fetched_without_asking_the_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = cached(hub_cache, HUB)
    monkeypatch.setattr(module, "check_hub", lambda *_: pytest.fail("the hub was asked"))
    assert HUB.fetch() == link


def test_a_file_is_downloaded_into_the_cache_of_the_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **_: asked.append(url))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(cached(hub_cache, HUB)))
    path = HUB.fetch()
    assert path == HUB.find()
    assert path.read_bytes() == CONTENT
    assert asked == ["https://huggingface.co/some/model/resolve/main/model.safetensors"]


def test_a_download_from_the_hub_that_is_not_the_published_file_is_not_kept(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = WeightsFile(file=HUB.file, licence="MIT", size_mb=7, repo=HUB.repo, sha256="0" * 64)
    monkeypatch.setattr(module, "check_hub", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(cached(hub_cache, HUB)))
    with pytest.raises(RunError, match=rf"could not be fetched: what https://huggingface.co/some/.* sha256 {SHA256}"):
        pinned.fetch()
    assert pinned.find() is None
    assert not [path for path in hub_cache.rglob("*") if path.is_file() and path.name != "main"]


def hub_answer(kind: type[Any], status: int) -> Exception:
    """The error that the hub's library makes of an answer, multi-line as it is."""
    import httpx2

    request = httpx2.Request("HEAD", "https://huggingface.co/some/model")
    text = f"{status} Client Error. (Request ID: Root=1-abc)\n\nRepository Not Found for url: x.\nPlease make sure"
    error: Exception = kind(text, response=httpx2.Response(status, request=request))
    return error


GATED = (
    r"its owner gives it to those who ask; accept its licence at https://huggingface\.co/some/model, then run "
    r"'hf auth login' on this machine or set HF_TOKEN"
)


@pytest.mark.parametrize("kind", [hub_errors.GatedRepoError, hub_errors.RepositoryNotFoundError])
def test_a_repository_that_is_not_given_is_known_before_it_is_asked_for_files(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any]
) -> None:
    answer: list[Exception] = []

    def metadata(url: str, timeout: float) -> None:
        raise answer[0]

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    answer[:] = [hub_answer(kind, 401)]
    assert module.check_hub("some/model", "x") is answer[0]
    answer[:] = [hub_answer(hub_errors.HfHubHTTPError, 503)]
    assert module.check_hub("some/model", "x") is None


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        (hub_errors.RepositoryNotFoundError, 401, "there is no such repository on the hub, or it is private"),
        (hub_errors.GatedRepoError, 403, GATED),
        (hub_errors.RemoteEntryNotFoundError, 404, "the repository has no such file"),
        (hub_errors.HfHubHTTPError, 503, "huggingface.co answers 503"),
    ],
)
def test_what_the_hub_says_becomes_one_line(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Any], status: int, reason: str
) -> None:
    error = hub_answer(kind, status)

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "check_hub", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(RunError, match=rf"^model\.safetensors could not be fetched: {reason}") as caught:
        HUB.fetch()
    assert "\n" not in str(caught.value)


def because_of(error: Exception, cause: Exception | None) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "cause", "reason"),
    [
        (OSError(28, "No space left on device"), None, "No space left on device"),
        (hub_errors.LocalEntryNotFoundError("not here"), TimeoutError("timed out"), "the hub took too long to answer"),
        (
            hub_errors.LocalEntryNotFoundError("not here"),
            hub_answer(hub_errors.HfHubHTTPError, 500),
            "huggingface.co answers 500",
        ),
        (RuntimeError("first\nsecond"), None, "first"),
        (RuntimeError(), None, "RuntimeError"),
        (RunError("as it is"), None, "as it is"),
    ],
)
def test_the_reason_is_what_lies_beneath(error: Exception, cause: Exception | None, reason: str) -> None:
    assert explain(because_of(error, cause)) == reason


# ---- no network


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that would have been made."""
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    return pauses


def point_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """A hub that answers as the settings say; the hub's own library talks to it."""
    settings: dict[str, float] = {"status": 200, "wait_s": 0, "num_asked": 0}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            settings["num_asked"] += 1
            threading.Event().wait(settings["wait_s"])
            self.send_response(int(settings["status"]))
            self.send_header("ETag", '"abc"')
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        point_hub(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
        yield settings
        server.shutdown()
    close_session()


@pytest.mark.slow
@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_a_hub_that_answers_is_there(hub: dict[str, float], no_pause: list[float], status: int) -> None:
    hub["status"] = status
    check_hub("some/model", "a.bin")
    assert (hub["num_asked"], no_pause) == (1, [])


@pytest.mark.usefixtures("hub_cache")
def test_a_slow_hub_is_left_to_the_patience_of_its_library(
    hub: dict[str, float], no_pause: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub["wait_s"] = 0.5
    monkeypatch.setattr(module, "TIMEOUT_S", 0.1)
    check_hub("some/model", "a.bin")
    assert no_pause == []


@pytest.mark.usefixtures("hub_cache")
def test_without_a_network_nothing_is_retried_for_long(monkeypatch: pytest.MonkeyPatch, no_pause: list[float]) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("it would retry for 23 s"))
    with socket.socket() as taken:  # bound and not listening: it refuses connections
        taken.bind(("127.0.0.1", 0))
        point_hub(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RunError) as caught:
            HUB.fetch()
    assert str(caught.value) == "model.safetensors could not be fetched: no way to 127.0.0.1: Connection refused"
    assert no_pause == [module.RETRY_S]


@pytest.mark.usefixtures("hub_cache")
def test_a_name_server_that_fails_once_is_asked_again(monkeypatch: pytest.MonkeyPatch, no_pause: list[float]) -> None:
    answers = [socket.gaierror(-3, "Temporary failure in name resolution")]

    def ask(url: str, **_: object) -> None:
        if answers:
            raise RuntimeError("the transport's own") from answers.pop()

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    check_hub("some/model", "a.bin")
    assert no_pause == [module.RETRY_S]


@pytest.mark.usefixtures("hub_cache")
def test_open_clip_is_not_left_to_retry_without_a_network(
    monkeypatch: pytest.MonkeyPatch, no_pause: list[float]
) -> None:
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("it would retry for 46 s"))
    monkeypatch.setattr("rltune.rewards.clip_loading.weights_gb", lambda model: 1.7)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        point_hub(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            RunError, match=r"could not be fetched \(no way to 127\.0\.0\.1: Connection refused\); they"
        ):
            load_clip("ViT-L-14/openai")


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clip_loads_what_is_in_the_cache_without_asking(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    cached(hub_cache, WeightsFile(file, "MIT", 1, repo="timm/vit_large_patch14_clip_224.openai"))
    monkeypatch.setattr("rltune.rewards.clip_loading.check_hub", lambda *_: pytest.fail("the hub was asked"))

    def create(*_: object, **__: object) -> None:
        raise RuntimeError("as far as this test goes")

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr("rltune.rewards.clip_loading.weights_gb", lambda model: 1.7)
    with pytest.raises(RunError, match="as far as this test goes"):
        load_clip("ViT-L-14/openai")


def test_a_published_clip_is_fetched_to_where_open_clip_looks() -> None:
    (file,) = REWARDS.card("clip_score").weights
    assert file.repo + "/" == open_clip.get_pretrained_cfg("ViT-L-14", "openai")["hf_hub"]
    assert file.file == open_clip.constants.HF_SAFE_WEIGHTS_NAME


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_user_who_says_offline_is_believed(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: pytest.fail("the hub was asked"))
    for value, is_said in (("1", True), ("yes", True), ("0", False), ("", False)):
        monkeypatch.setenv(variable, value)
        assert is_offline() == is_said
    monkeypatch.setenv(variable, "on")
    with pytest.raises(RunError, match="HF_HUB_OFFLINE is set"):
        check_hub("some/model", "a.bin")


# ---- what rewards ask


def test_a_given_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.pth").touch()
    assert locate("r", HUB, tmp_path / "own.pth") == tmp_path / "own.pth"
    assert locate("r", HUB, "~/own.pth") == tmp_path / "own.pth"


@pytest.mark.parametrize("given", [7, True, ["a"]])
def test_what_is_no_path_is_refused(given: object) -> None:
    with pytest.raises(UserError, match="reward 'r': head must be the path of a file, got"):
        locate("r", HUB, given, option="head")


def test_a_given_path_that_is_not_there_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"'r': there is no file .*; weights must be model.safetensors \(7 MB, MIT\) of h"
    ):
        locate("r", HUB, tmp_path / "no.pth")
    with pytest.raises(RunError, match="there is no file"):
        locate("r", HUB, tmp_path)  # a folder


@pytest.mark.usefixtures("folder")
def test_a_file_that_cannot_be_fetched_says_what_to_do(host: str) -> None:
    with pytest.raises(RunError) as caught:
        locate("r", at(f"{host}/missing"), option="head")
    assert str(caught.value) == (
        f"reward 'r': head.pth (< 1 MB, MIT) of {host}/missing is not on this machine (head.pth could not be fetched: "
        "127.0.0.1 answers 404); run 'rltune models fetch r' where there is a network, or put the file here and give "
        "its path as the option 'head'"
    )


def test_a_file_is_found_then_fetched(folder: Path, host: str) -> None:
    file = at(f"{host}/head.pth")
    assert locate("r", file) == locate("r", file) == folder / "head.pth"
    assert Host.asked == ["/head.pth"]


@pytest.mark.parametrize(
    ("size_mb", "text"), [(0.4, "< 1 MB"), (1, "1 MB"), (346, "346 MB"), (999.4, "999 MB"), (3945, "3.9 GB")]
)
def test_sizes_are_for_people(size_mb: float, text: str) -> None:
    assert format_size(size_mb) == text
    assert WeightsFile("a", "MIT", size_mb, repo="b/c").size == text


def test_where_a_file_is_from() -> None:
    assert HUB.source == "https://huggingface.co/some/model/blob/main/model.safetensors"
    assert (HUB.origin, at("https://host.org/a/head.pth").origin) == ("some/model", "host.org")
