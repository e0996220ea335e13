"""The allow-list below is the architecture diagram: which room may import which."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rltune"
BASE = {"errors", "registry", "assets", "intervals", "records", "redaction"}
ALLOWED = {
    "__main__": {"cli"},
    "redaction": set(),
    "errors": {"redaction"},
    "registry": {"errors"},
    "assets": set(),
    "intervals": set(),
    "records": {"errors"},
    "config": BASE,
    "pareto": BASE,
    "diffusion": BASE,
    "builtin": BASE,
    "rewards": BASE | {"builtin"},
    "estimators": BASE | {"diffusion", "rewards"},
    "training": BASE | {"config", "diffusion", "rewards", "estimators"},
    "export": BASE | {"diffusion"},
    "orchestration": BASE | {"config", "pareto", "diffusion", "rewards", "estimators", "training", "export"},
    "cli": BASE
    | {"config", "pareto", "diffusion", "rewards", "estimators", "training", "builtin", "export", "orchestration"},
}
"""Room -> the rooms it may import from (besides itself)."""
CONFINED = {
    "ray": {"orchestration"},
    "optuna": {"orchestration"},
    "typer": {"cli"},
    "rich": {"cli"},
    "pydantic": {"config"},
    "yaml": {"config"},
}
"""Library -> the only rooms that may import it."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert not imported_modules(path)
        return
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "rltune" and len(parts) > 1:
            assert parts[1] == room or parts[1] in ALLOWED[room], f"{room} must not import {name}"
        assert room in CONFINED.get(parts[0], {room}), f"{parts[0]} belongs to {CONFINED[parts[0]]}, not {room}"


def test_every_room_is_on_the_plan() -> None:
    assert {room_of(path) for path in MODULES} - {"__init__"} <= set(ALLOWED)
