"""Where Ray keeps its files. The limit is the operating system's own: a socket is bound to find it."""

import os
import socket
from pathlib import Path

import pytest

from rltune.errors import UserError
from rltune.orchestration import cluster, places
from rltune.orchestration.places import LONGEST_SOCKET, MAX_SOCKET_PATH, PYTHON_SOCKET, Place, find_place, token_folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short folder to fall back on, and no variables."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name[:4] != "RAY_"})
    os.environ.pop("TMPDIR", None)
    short = tmp_path_factory.mktemp("s")
    monkeypatch.setattr(places, "MAX_SOCKET_PATH", len(str(short)) + 1 + len(LONGEST_SOCKET))
    monkeypatch.setattr(places, "SHORT_FOLDERS", ("/proc/nowhere", str(short)))
    return short


def test_a_longer_path_cannot_be_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for length, fits in ((MAX_SOCKET_PATH, True), (MAX_SOCKET_PATH + 1, False)):
        name = "./" * ((length - 1) // 2) + "ab"[: 1 + (length - 1) % 2]
        assert len(name) == length
        with socket.socket(socket.AF_UNIX) as server:
            if fits:
                server.bind(name)
            else:
                with pytest.raises(OSError, match="too long"):
                    server.bind(name)


def test_ray_s_own_choice_is_taken_where_it_works(environment: Path) -> None:
    os.environ["TMPDIR"] = str(environment)
    assert find_place() == Place(environment, environment)
    os.environ["RAY_TMPDIR"] = str(environment)
    os.environ["TMPDIR"] = "/proc/nope"
    assert find_place() == Place(environment, environment)
    assert list(environment.iterdir()) == []


def test_a_path_that_is_one_too_long_is_left_for_a_short_one(environment: Path) -> None:
    longer = environment.with_name(environment.name + "x")
    os.environ["TMPDIR"] = str(longer)
    place = find_place()
    assert place.folder == environment
    assert place.is_usable
    assert place.fault.endswith(f"leave it {len(str(environment))} characters")


def test_a_folder_that_cannot_be_written_is_left_too(environment: Path) -> None:
    os.environ["TMPDIR"] = "/proc/nope"
    assert find_place() == Place(environment, environment, fault="it cannot be written")


def test_what_names_a_place_for_ray_alone_is_kept_or_refused() -> None:
    os.environ["RAY_TMPDIR"] = "/proc/nope"
    place = find_place()
    assert (place.folder, place.fault, place.is_usable) == (Path("/proc/nope"), "it cannot be written", False)
    message = r"cannot keep its files in /proc/nope: it cannot be written; set RAY_TMPDIR to a folder with a short path"
    with pytest.raises(UserError, match=message), cluster.connect(None):
        pass


def test_python_s_sockets_need_less_room_than_ray_s(environment: Path, tmp_path: Path) -> None:
    """Temporary files may be large: they stay on the disk that TMPDIR names where Ray's sockets cannot."""
    room = places.MAX_SOCKET_PATH - len(f"/{PYTHON_SOCKET}")
    for length, fits in ((room, True), (room + 1, False)):
        longer = environment.with_name("x" * (length - len(str(environment.parent)) - 1))
        assert len(str(longer)) == length
        os.environ["TMPDIR"] = str(longer)
        place = find_place()
        assert place.folder == environment
        assert place.python_folder == (longer if fits else environment)


def test_a_token_is_made_for_whom_ray_cannot_write_one(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_running_here", lambda: None)
    os.environ["HOME"] = str(environment)
    cluster.prepare(None)
    assert "RAY_AUTH_TOKEN" not in os.environ
    os.environ["HOME"] = "/proc/nope"
    assert token_folder() is None
    cluster.prepare("10.0.0.1:6379")  # a cluster that is there has its own
    assert "RAY_AUTH_TOKEN" not in os.environ
    cluster.prepare(None)
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    cluster.prepare(None)
    assert os.environ["RAY_AUTH_TOKEN"] == token


def test_who_has_no_home_has_no_place_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    assert token_folder() is None
