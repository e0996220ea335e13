"""The allow-list below is the architecture diagram: which room may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rltune"
BASE = {"beside", "errors", "registry", "assets", "intervals", "records", "redaction", "canvas"}
ALLOWED = {
    "__main__": {"cli"},
    "redaction": set(),
    "errors": {"redaction"},
    "registry": {"errors"},
    "assets": set(),
    "beside": set(),
    "canvas": set(),
    "intervals": set(),
    "records": {"errors"},
    "config": BASE,
    "pareto": BASE,
    "runs": BASE | {"config", "pareto"},
    "diffusion": BASE,
    "builtin": BASE,
    "rewards": BASE | {"builtin"},
    "estimators": BASE | {"diffusion", "rewards"},
    "training": BASE | {"config", "runs", "diffusion", "rewards", "estimators", "builtin"},
    "search": BASE | {"config", "pareto", "runs", "training"},
    "report": BASE | {"config", "pareto", "runs"},
    "export": BASE | {"config", "runs", "diffusion", "training"},
    "orchestration": BASE
    | {"config", "pareto", "runs", "diffusion", "rewards", "estimators", "training", "search", "report", "export"},
    "api": BASE | {"config", "runs", "orchestration"},
    "cli": BASE
    | {
        "config",
        "runs",
        "diffusion",
        "rewards",
        "estimators",
        "training",
        "builtin",
        "search",
        "report",
        "export",
        "orchestration",
    },
}
"""Room -> the rooms it may import from (besides itself)."""
CONFINED = {
    "ray": {"orchestration"},
    "optuna": {"search"},
    "torch": {"diffusion", "builtin", "rewards", "estimators", "training", "export", "orchestration", "cli"},
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
        assert imported_modules(path) <= {"typing", "rltune.api", "rltune.runs.run", "rltune.runs.status"}
        return
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "rltune" and len(parts) > 1:
            assert parts[1] == room or parts[1] in ALLOWED[room], f"{room} must not import {name}"
        assert room in CONFINED.get(parts[0], {room}), f"{parts[0]} belongs to {CONFINED[parts[0]]}, not {room}"


def test_every_room_is_on_the_plan() -> None:
    assert {room_of(path) for path in MODULES} - {"__init__"} <= set(ALLOWED)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and for types alone count too: who needs such a trick has cut the house wrongly."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    graph = {name: imported_modules(path) & names.keys() - {name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_record_of_a_run_is_read_without_ray_torch_or_optuna() -> None:
    rooms = [room for room in ("config", "pareto", "runs", "report") if (PACKAGE / room).is_dir()]
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in MODULES
        if room_of(path) in rooms and path.name != "__init__.py"
    ]
    heavy = "{'torch', 'ray', 'optuna', 'diffusers', 'transformers', 'peft', 'matplotlib', 'PIL'}"
    code = f"import sys, {', '.join(modules)}; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


LONG = {"rltune.builtin.workshop.train": "one loop, read from top to bottom; a third of it says what its arguments are"}
"""Function that may have more than 60 lines -> why."""


def test_files_and_functions_can_be_read_at_one_go() -> None:
    long_files = {
        str(path.relative_to(PACKAGE)): n for path in MODULES if (n := len(path.read_text().splitlines())) > 350
    }
    assert not long_files
    for path in MODULES:
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 60:
                assert f"{module}.{node.name}" in LONG
