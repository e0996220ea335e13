"""What nodes are asked before the first trial; that they are asked over a network is in ``test_ray_hosts.py``."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from rltune import __version__
from rltune.errors import RltuneError, RunError, UserError
from rltune.orchestration import survey as module
from rltune.orchestration.nodes import Node, WorkerNeed
from rltune.orchestration.survey import View, check_nodes, faults_of, folder_probe

NEED = WorkerNeed(1, 0.0)
HEAD, FIRST, SECOND, SMALL = (
    Node(0.0, id="h", name="10.0.0.1", is_head=True),
    Node(4.0, id="a", name="10.0.0.2"),
    Node(4.0, id="b", name="10.0.0.3"),
    Node(0.0, id="c", name="10.0.0.4"),
)


def test_a_folder_that_is_the_same_is_read_and_answered(tmp_path: Path) -> None:
    with folder_probe(tmp_path / "runs" / "mix") as look:
        assert look("a") == ""
        (place,) = (tmp_path / "runs" / "mix").iterdir()
        assert sorted(file.name for file in place.iterdir()) == ["a", "token"]
    assert list((tmp_path / "runs" / "mix").iterdir()) == []


def test_a_folder_that_is_another_or_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with folder_probe(tmp_path) as look:
        (place,) = tmp_path.iterdir()
        (place / "a").mkdir()
        assert look("a") == "it can be read there but not written (Is a directory)"
        (place / "token").write_text("of another")
        assert look("b") == "what was written there cannot be read (another one is there)"
        (place / "token").unlink()
        assert look("b") == "what was written there cannot be read (No such file or directory)"


def test_a_node_without_rltune_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder_probe(tmp_path) as look:
        sent = cloudpickle.dumps((module._question(), look))
        for name in [name for name in sys.modules if name.partition(".")[0] == "rltune"]:
            monkeypatch.setitem(sys.modules, name, None)
        ask, its_look = pickle.loads(sent)
        found = ask("a", its_look)
    assert (found["version"], found["no_storage"]) == ("", "")
    assert found["no_rltune"].startswith("ModuleNotFoundError: ")
    assert found["gib"]["memory"] > 0


def test_faults_are_told_with_the_nodes_that_have_them() -> None:
    well = View(HEAD, __version__)
    gone = View(FIRST, no_rltune="ModuleNotFoundError: No module named 'rltune'", no_storage="cannot be read")
    views = [well, gone, View(SECOND, "0.0.7", no_storage="cannot be read"), View(SMALL, no_answer="nothing in 90 s")]
    assert faults_of(views, Path("/runs")) == [
        "node 10.0.0.2: rltune cannot be imported (ModuleNotFoundError: No module named 'rltune'); install rltune "
        f"{__version__} there, in the Python that runs 'ray start'",
        "nodes 10.0.0.2, 10.0.0.3: --storage: /runs is not the same folder as here: cannot be read; name one that all "
        "nodes mount at the same path",
        f"node 10.0.0.3: rltune 0.0.7 is installed, here it is {__version__}; install the same on all nodes",
        "node 10.0.0.4: no answer (nothing in 90 s); it hangs, is overloaded or was lost: see 'ray status'",
    ]
    many = [View(Node(1.0, id=str(i), name=f"n{i}"), "0.0.7") for i in range(8)]
    assert faults_of(many)[0].startswith("nodes n0, n1, n2, n3, n4 and 3 more: ")


@pytest.mark.parametrize(
    ("fault", "kind"),
    [({}, None), ({"no_rltune": "gone"}, UserError), ({"no_answer": "lost"}, RunError)],
    ids=["none", "rltune", "lost"],
)
def test_nodes_that_a_run_may_come_to_are_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: dict[str, str], kind: type[RltuneError] | None
) -> None:
    asked: list[tuple[Node, Any]] = []

    def survey(nodes: list[Node], look: Any = None) -> list[View]:
        asked.extend((node, look) for node in nodes)
        return [View(node, __version__, **(fault if node is FIRST else {})) for node in nodes]

    monkeypatch.setattr(module, "survey", survey)
    if kind is None:
        check_nodes([HEAD, FIRST, SECOND, SMALL], NEED, tmp_path)
        assert [node.id for node, _ in asked] == ["h", "a", "b"]
        assert all(look is not None for _, look in asked)
        asked.clear()
        check_nodes([FIRST], NEED, tmp_path)  # alone, it shares its storage with itself
        assert asked == [(FIRST, None)]
        return
    with pytest.raises(kind, match=r"^the cluster cannot run this yet\n  node 10\.0\.0\.2: "):
        check_nodes([HEAD, FIRST, SECOND, SMALL], NEED, tmp_path)
    assert list(tmp_path.iterdir()) == []
