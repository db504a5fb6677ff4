"""A plugin of pytest, ``-p tests.no_skips``: a test that is skipped fails the run, but for what no extra can bring."""

from collections.abc import Iterable

import pytest

REASONS = (
    "LORA_GUARD_SHARED_DATA names the one with the data sets",
    "no Chromium on this machine",
    "no /dev/full on this system",
    "the peak is read from Linux's /proc",
)
"""Ends of the reasons that may be given: data and programs that the machine lacks."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    if skipped(session) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in skipped(terminalreporter._session):
        terminalreporter.write_line(f"FAILED for it was skipped: {line}", red=True)


def skipped(session: pytest.Session | None) -> Iterable[str]:
    """Place and reason of what was skipped, one test or a whole file, for another reason than those above."""
    assert session is not None
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    found = [(report.nodeid, str(report.longrepr[2])) for report in reporter.stats.get("skipped", [])]
    return [f"{place}: {reason}" for place, reason in found if not reason.endswith(REASONS)]
