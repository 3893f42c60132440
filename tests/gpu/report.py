"""``--gpucheck FILE``: the outcome of every test of a GPU as JSON, from which the README's block is made.

The file is rewritten while the tests run, so that a run that is killed leaves what it has found.  A test that was
collected and has no outcome is "not run".
"""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MOST_CHARACTERS = 300
INTERVAL_SECONDS = 1.0
# Of these each test has a line; of all others those that failed or did not run.
IN_FULL = "tests/gpu/"


class Report:
    """The outcomes so far, and the file that holds them."""

    def __init__(self, path: Path, provenance: dict) -> None:
        self._path, self._provenance = path, provenance
        self._start, self._written = time.monotonic(), 0.0
        self._tests: dict[str, dict] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._expect(ids)

    def _expect(self, names: list[str]) -> None:
        for name in names:
            self._test(name)

    def _test(self, nodeid: str) -> dict:
        name = re.sub(r"@\w+$", "", nodeid)  # xdist appends the group
        return self._tests.setdefault(name, {"test": name, "outcome": "not run", "seconds": 0.0})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._test(report.nodeid)
        test["seconds"] += report.duration
        if report.outcome != "passed":
            test["detail"] = _detail(report)
        if report.when == "call" or report.outcome != "passed":
            test["outcome"] = report.outcome
        if time.monotonic() - self._written >= INTERVAL_SECONDS:
            self.write()

    def counts(self) -> Counter:
        """How many tests have each outcome."""
        return Counter(test["outcome"] for test in self._tests.values())

    def write(self) -> None:
        """Replace the file in one step."""
        partial = self._path.with_name(self._path.name + ".partial")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(self._text())
        partial.replace(self._path)
        self._written = time.monotonic()

    def _text(self) -> str:
        """One line for each file, and for each test that has one."""
        files: dict[str, Counter] = {}
        for name, test in self._tests.items():
            files.setdefault(name.split("::")[0], Counter()).update({test["outcome"]: 1, "seconds": test["seconds"]})
        head = {
            "date": datetime.date.today().isoformat(),
            "seconds": round(time.monotonic() - self._start),
            "summary": dict(self.counts()),
            "provenance": self._provenance,
        }
        lists = {
            "files": [{"file": name, **one, "seconds": round(one["seconds"], 1)} for name, one in files.items()],
            "tests": [
                {**test, "seconds": round(test["seconds"], 2)}
                for name, test in self._tests.items()
                if name.startswith(IN_FULL) or test["outcome"] in ("failed", "not run")
            ],
        }
        parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for key, entries in lists.items():
            lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """No test that passed, or one that did not run, is a failure too."""
        if session.config.getoption("collectonly"):
            return
        self.write()
        counts = self.counts()
        if session.exitstatus == 0 and (not counts["passed"] or counts["not run"]):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.counts().items()))
        terminalreporter.write_line(f"gpucheck: {counts}; {self._path}")


class LostDevice:
    """Ends the process of a test that leaves the device unusable, for all later tests; xdist starts another."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        result = yield
        if hasattr(item.config, "workerinput") and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)
        return result


def _detail(report: pytest.TestReport) -> str:
    """The reason of a skip or a failure on one line, without the folders of this machine."""
    if isinstance(report.longrepr, tuple):
        text = report.longrepr[2]
    else:
        text = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
    for folder, name in ((str(ROOT), "."), (sys.prefix, "PREFIX"), (str(Path.home()), "~")):
        text = text.replace(folder, name)
    return " ".join(text.split())[:MOST_CHARACTERS]
