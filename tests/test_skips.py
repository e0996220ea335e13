"""What CI makes of tests that are skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(folder: Path, *more: str, **modules: str) -> tuple[int, str]:
    for name, body in modules.items():
        (folder / f"test_{name}.py").write_text(f"import pytest\n{body}\n")
    options = ["-p", "tests.skips", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(folder)]
    command = [sys.executable, "-m", "pytest", "-q", *options, *more, str(folder)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_skip_on_the_list_and_an_expected_failure_pass(tmp_path: Path) -> None:
    skipped = "def test_a(): pytest.skip('says that it is not differentiable')"
    code, text = run(tmp_path, listed=skipped, failing="@pytest.mark.xfail(reason='known')\ndef test_a(): assert False")
    assert code == 0, text


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("-p", "xdist", "-n", "2")], ids=["in one process", "side by side"])
def test_any_other_skip_fails_the_run(tmp_path: Path, more: tuple[str, ...]) -> None:
    code, text = run(
        tmp_path,
        *more,
        library="def test_a(): pytest.importorskip('no_such_library')",
        mark="@pytest.mark.skipif(True, reason='not today')\ndef test_a(): pass",
        module="pytest.skip('not here', allow_module_level=True)\ndef test_a(): pass",
    )
    assert code == 1, text
    assert "test_library.py::test_a: could not import 'no_such_library'" in text
    assert "test_mark.py::test_a: not today" in text
    assert "test_module.py: not here" in text
    assert "add the reason to ALLOWED" in text
