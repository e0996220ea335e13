"""What ray.nodes() says, read into nodes."""

from typing import Any

from rltune.orchestration.nodes import Node, read_nodes


def row(resources: dict[str, float], *, is_alive: bool = True) -> dict[str, Any]:
    """A row as Ray 2.60 gives it, less what is not read."""
    return {"NodeID": "a", "Alive": is_alive, "Resources": {"memory": 1e9, "node:10.0.0.1": 1.0, **resources}}


def test_nodes_that_are_alive_are_read() -> None:
    rows = [
        row({"CPU": 16.0, "GPU": 2.0, "accelerator_type:H100": 1.0}),
        row({"CPU": 4.0}, is_alive=False),
        row({"node:__internal_head__": 1.0}),
    ]
    assert read_nodes(rows) == (Node(16.0, 2.0, frozenset({"H100"}), 80), Node(0.0, 0.0))
