"""What each test file costs: printed at the end of a run, the dearest first.

CONTRIBUTING has the limit that a whole run has to stay under.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

SHOWN = 10


def cpu_seconds() -> float:
    """User and system time of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


class Costs:
    """A plugin that measures in the workers, or in the one process, and adds up in the controller.

    A file's set-up counts with the test that needs it first. What no test pays, such as imports
    and collection, is in the total only.
    """

    def __init__(self) -> None:
        self.start = 0.0, 0.0
        self.wall: Counter[str] = Counter()
        self.cpu: Counter[str] = Counter()
        self.of_workers: list[float] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self.start = time.monotonic(), cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "teardown":
            wall, cpu = self.start
            spent = time.monotonic() - wall, cpu_seconds() - cpu
            report.user_properties.append(("seconds", spent))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "seconds" and report.when == "teardown":
                file = report.location[0]
                self.wall[file] += value[0]
                self.cpu[file] += value[1]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["cpu_seconds"] = cpu_seconds()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.of_workers.append(getattr(node, "workeroutput", {}).get("cpu_seconds", 0.0))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("slowest files")
        terminalreporter.line("wall s   CPU s")
        for file, cpu in self.cpu.most_common(SHOWN):
            terminalreporter.line(f"{self.wall[file]:6.1f}  {cpu:6.1f}  {file}")
        whole = sum(self.of_workers) or cpu_seconds()
        tests = sum(self.cpu.values())
        terminalreporter.line(
            f"{sum(self.wall.values()):6.1f}  {tests:6.1f}  all {len(self.cpu)} files; "
            f"{whole - tests:.1f} CPU s more to start, import and collect"
        )
