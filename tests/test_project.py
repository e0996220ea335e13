"""The project's own files: dependencies, versions, citation, and what the wheel holds."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import rltune

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
UNDECLARED = {
    "pandas",  # for those who have it
    "pydantic_core",  # pydantic's own other half
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_libraries() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "rltune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"rltune"}


@pytest.mark.long
def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    needed = {canonical(Requirement(text).name) for text in PROJECT["dependencies"]}
    optional = {canonical(Requirement(text).name) for name in EXTRAS for text in EXTRAS[name]}
    distributions = packages_distributions()  # of mlflow there are three
    imported = {name: set(map(canonical, distributions.get(name, [name]))) for name in imported_libraries()}
    assert {name for name, found in imported.items() if not found & (needed | optional)} == set(UNDECLARED)
    assert needed <= set().union(*imported.values())


def test_the_lock_has_a_version_of_each_that_is_allowed() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    for text in [*PROJECT["dependencies"], *(text for name in EXTRAS for text in EXTRAS[name])]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[canonical(requirement.name)]), text


def test_a_library_is_bounded_above_where_its_private_names_are_used() -> None:
    bounded = {
        requirement.name
        for requirement in map(Requirement, PROJECT["dependencies"])
        if any(part.operator in ("<", "==", "~=") for part in requirement.specifier)
    }
    assert bounded == {"ray", "optuna"}


DOCUMENTED = {"_exit"}
"""Of ``os``: Python documents it."""


def private_names(tree: ast.Module, own: set[str]) -> set[str]:
    """Names that begin with an underscore and that nothing in the package defines: modules, members, arguments."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call):
            names |= {keyword.arg or "" for keyword in node.keywords}
    return {name for name in names if name.startswith("_") and not name.startswith("__")} - own - DOCUMENTED


def defined_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


@pytest.mark.long
def test_private_names_of_a_library_are_used_in_one_file_of_its_own() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "rltune").rglob("*.py")}
    own = {path.parent.name for path in trees}.union(*map(defined_names, trees.values()))
    used = {path.name: names for path, tree in trees.items() if (names := private_names(tree, own))}
    assert set(used) == {"ray_private.py", "optuna_private.py"}, used


@pytest.mark.slow
def test_no_file_runs_code_when_it_is_read() -> None:
    """What SECURITY.md says of pickles and of code that comes with a model."""
    safe = {
        "torch.load": ("weights_only", True),
        "np.load": ("allow_pickle", False),
        "numpy.load": ("allow_pickle", False),
    }
    faults, num_safe = [], 0
    for path in (ROOT / "rltune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
            option, value = safe.get(name, ("", None))
            is_pickle = name.startswith(("pickle.load", "pickle.Unpickler", "yaml.load", "yaml.unsafe", "joblib.load"))
            if is_pickle or "trust_remote_code" in given or (option and given.get(option) != str(value)):
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
            num_safe += bool(option)
    assert not faults
    assert num_safe > 0  # the rule still looks at something


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert set(citation) >= {"cff-version", "message", "title", "authors"}  # what the format, 1.2.0, asks for
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == rltune.__version__
    assert citation["license"] == PROJECT["license"]
    assert all(set(reference) >= {"type", "title", "authors"} for reference in citation["references"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, since a build leaves folders beside them, and the next one takes those in."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("rltune", "tests", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "import sys, setuptools.build_meta as backend; sys.stdout.write(backend.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=True)
    return zipfile.ZipFile(folder / done.stdout.splitlines()[-1])


@pytest.mark.long
def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if not name.startswith(f"rltune-{rltune.__version__}.dist-info/")}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "rltune").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert inside == sources
    assert {"rltune/py.typed", "rltune/builtin/weights/judge.safetensors", "rltune/builtin/prompts/train.txt"} <= inside


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    place = f"rltune-{rltune.__version__}.dist-info"
    metadata = wheel.read(f"{place}/METADATA").decode()
    assert metadata.splitlines()[:3][1:] == ["Name: rltune", f"Version: {rltune.__version__}"]
    assert "rltune = rltune.cli.main:main" in wheel.read(f"{place}/entry_points.txt").decode()
    assert f"{place}/licenses/LICENSE" in wheel.namelist()
