"""Counts the cases of the fuzz tests."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = {
        report.nodeid: value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "cases" and getattr(report, "when", "") == "call"
    }
    if counts:
        terminalreporter.section("fuzzed cases")
        for nodeid, count in counts.items():
            terminalreporter.write_line(f"{count:6,} {nodeid}")
        terminalreporter.write_line(f"{sum(counts.values()):6,} in all")
