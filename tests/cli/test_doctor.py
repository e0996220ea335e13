from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import requests

from rltune import __version__
from rltune.cli import doctor as doctor_module
from rltune.errors import UserError
from rltune.orchestration import cluster, places, survey
from rltune.orchestration.cluster import Cluster
from rltune.orchestration.nodes import Node
from rltune.orchestration.places import Place
from rltune.orchestration.survey import View
from tests.cli.conftest import Call

A = Path("/a")


@pytest.mark.parametrize(
    ("place", "token", "code", "line"),
    [
        (Place(A, A), Path("/h"), 0, "ok   the Ray cluster of a run keeps its files in /a, while it runs"),
        (
            Place(A, A, fault="it is [b]"),
            Path("/h"),
            0,
            "note the Ray cluster of a run keeps its files in /a, while it runs, not below TMPDIR: it is [b]",
        ),
        (
            Place(A, A, fault="it is bad", is_usable=False),
            Path("/h"),
            1,
            "bad  a Ray cluster of a run cannot keep its files in /a: it is bad; set RAY_TMPDIR to a folder with a "
            "short path that can be written",
        ),
        (
            Place(A, A),
            None,
            0,
            "note HOME is not there or cannot be written; a run keeps Ray's token in its environment",
        ),
    ],
    ids=["ray's own", "another", "none", "no home"],
)
def test_the_doctor_says_where_ray_keeps_its_files(
    call: Call, monkeypatch: pytest.MonkeyPatch, place: Place, token: Path | None, code: int, line: str
) -> None:
    monkeypatch.setattr(places, "find_place", lambda: place)
    monkeypatch.setattr(places, "token_folder", lambda: token)
    got, out, err = call("doctor")
    assert got == code
    assert line in out.splitlines()
    assert err == ("error doctor: 1 finding(s) marked bad stop every run; see above for what to do\n" if code else "")


class Stage:
    """A cluster of two nodes, as the doctor is told of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        head = Node(0.0, id="h", name="10.0.0.1", is_head=True)
        gib = {"memory": 64.0, "disk": 90.0, "shm": 20.0}
        self.views = [View(head, __version__, gib=gib), View(Node(4.0, id="a", name="10.0.0.2"), __version__, gib=gib)]
        self.status: int | None = 200
        self.asked: list[Any] = []

        @contextmanager
        def connect(address: str) -> Iterator[Cluster]:
            yield Cluster(address, is_own=False, dashboard_url="http://10.0.0.1:8265", nodes=(head, Node(4.0)))

        def ask(nodes: Any, look: Any = None) -> list[View]:
            self.asked.append(look)
            return self.views

        def get(url: str, timeout: float) -> SimpleNamespace:
            assert url == "http://10.0.0.1:8265/api/version"
            if self.status is None:
                raise requests.ConnectionError("no route; a long text")
            return SimpleNamespace(status_code=self.status)

        monkeypatch.setattr(cluster, "find_address", lambda address: address)
        monkeypatch.setattr(cluster, "connect", connect)
        monkeypatch.setattr(survey, "survey", ask)
        monkeypatch.setattr(requests, "get", get)


@pytest.fixture
def stage(call: Call, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(doctor_module, "_hardware", lambda: [])
    monkeypatch.setattr(doctor_module, "_weights", lambda: [])
    return Stage(monkeypatch)


def test_a_cluster_that_is_well(call: Call, stage: Stage, tmp_path: Path) -> None:
    stage.status = 401
    code, out, err = call("doctor", "--address", "h:1", "--storage", tmp_path / "runs")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "ok   dashboard http://10.0.0.1:8265 answers, and asks for the token" in lines
    facts = "64 GiB of memory, 90 GiB free for temporary files, 20 GiB of shared memory"
    assert f"ok   node 10.0.0.2: runs a task, {facts}" in lines
    assert f"ok   {tmp_path}/runs is the same folder on every node, and can be written there" in lines
    assert callable(stage.asked[0])
    assert list((tmp_path / "runs").iterdir()) == []
    call("doctor", "--address", "h:1")
    assert stage.asked[1] is None


def test_what_is_wrong_with_a_cluster_is_told_with_what_to_do(call: Call, stage: Stage, tmp_path: Path) -> None:
    stage.status = None
    head, node = (view.node for view in stage.views)
    gib = {"memory": 64.0, "disk": 1.0, "shm": 0.0625}
    stage.views = [View(head, __version__, clock_s=-7.2), View(node, "0.0.7", no_storage="gone", gib=gib)]
    code, out, err = call("doctor", "--address", "h:1", "--storage", tmp_path)
    assert code == 1
    assert err == "error doctor: 3 finding(s) marked bad stop every run; see above for what to do\n"
    marked = [line for line in out.splitlines() if not line.startswith("ok ")]
    assert [line.partition(";")[0] for line in marked if "token" not in line] == [
        "bad  the dashboard http://10.0.0.1:8265 does not answer (ConnectionError)",
        "note node 10.0.0.1: its clock is 7 s behind",
        "note node 10.0.0.2: little room for temporary files",
        "note node 10.0.0.2: 0.0625 GiB of shared memory (/dev/shm)",
        f"bad  node 10.0.0.2: rltune 0.0.7 is installed, here it is {__version__}",
        f"bad  node 10.0.0.2: --storage: {tmp_path} is not the same folder as here: gone",
    ]
    assert "docker run --shm-size=19g" in out


def test_a_cluster_that_cannot_be_attached_to_is_a_finding(
    call: Call, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(address: str) -> NoReturn:
        raise UserError("--address: refuses the token")

    monkeypatch.setattr(cluster, "connect", connect)
    code, out, _ = call("doctor", "--address", "h:1")
    assert code == 1
    assert "bad  --address: refuses the token" in out.splitlines()


def test_the_doctor_says_where_a_token_comes_from_and_not_the_token(
    call: Call, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "5ec7e7" * 6)
    _, out, _ = call("doctor", "--address", "h:1")
    assert "ok   Ray's token comes from RAY_AUTH_TOKEN" in out.splitlines()
    assert "5ec7e7" not in out
