"""Makes a run fail where a test is skipped for a reason that is not on the list: ``python -m pytest -p tests.skips``.

CI runs with it, lest a library that is not installed or a renamed name leave tests out for ever.
"""

import pytest

ALLOWED = (
    "RLTUNE_TRL_PYTHON names no python with TRL 0.12.2",  # needs an environment of its own, of other versions
    "LAION's head is not there",  # weights that are not shipped
    "no chromium with chromedriver on this machine",  # CI has them; a contributor's laptop need not
    "gcp-storage-emulator is not installed",  # CI has it; an environment of before it was asked for need not
    # by a reward's own contract there is nothing to test
    "says that it is not differentiable",
    "says that it compares the images of a prompt",
    "an image's number depends on the others",
)
"""Reasons, as a test gives them."""

_unlisted: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that was skipped, not one that was expected to fail."""
    if not hasattr(report, "wasxfail"):
        _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a module that was skipped as a whole."""
    _note(report)


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped:
        _, _, text = report.longrepr if isinstance(report.longrepr, tuple) else ("", 0, str(report.longrepr))
        reason = text.removeprefix("Skipped: ")
        if reason not in ALLOWED:
            _unlisted.append(f"{report.nodeid}: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that would have passed."""
    if _unlisted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests, and what to do."""
    if _unlisted:
        terminalreporter.section("skipped for a reason that is not in tests/skips.py", red=True)
        for line in _unlisted:
            terminalreporter.line(line)
        terminalreporter.line("install what is missing, or add the reason to ALLOWED and say there why")
