"""The report: what became of every stage, rewritten as a whole after each, and what the command returns for it."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path

SCHEMA = 1
# What a stage can become.  Only "pass" says that something was shown; only a check that ran gives it.
STATUSES = ("pass", "fail", "invalid", "unsupported", "skipped", "timeout", "crash")
BAD = ("fail", "invalid", "timeout", "crash")
# Kept of a failure's message or a process's output.
MOST_CHARACTERS = 1500
MOST_FAILURES = 20


def judge(found: dict) -> tuple[str, str]:
    """(status, detail) of a stage whose process ended well and left ``found``.

    ``found`` holds ``unsupported`` (a reason), or ``cases``, ``failed`` [(case, message)], ``could_not`` [(case,
    reason)] and ``controls`` {bug: caught or what happened instead}.  Nothing checked, or a planted bug that passed, is
    invalid, and a case that could not run makes the stage unsupported: neither is ever a pass.
    """
    if found.get("unsupported"):
        return "unsupported", found["unsupported"]
    if found["failed"]:
        return "fail", f"{len(found['failed'])} of {found['cases']} cases failed"
    missed = {bug: what for bug, what in found["controls"].items() if what != "caught"}
    if missed:
        return "invalid", "planted bugs not caught: " + "; ".join(f"{bug} ({what})" for bug, what in missed.items())
    could_not = found.get("could_not", [])
    if could_not:
        case, reason = could_not[0]
        return "unsupported", f"{len(could_not)} cases could not run, {found['cases']} passed; {case}: {reason}"
    if not found["cases"]:
        return "invalid", "no case was checked"
    return "pass", ""


class Report:
    """Stages in the order in which they ended, and the file that holds them."""

    def __init__(self, path: Path | None, package: dict, options: dict) -> None:
        self._path = path
        self.content: dict = {
            "schema": SCHEMA,
            "started": now(),
            "package": package,
            "options": options,
            "host": {},
            "stages": [],
            "summary": {},
        }

    def add(self, name: str, status: str, detail: str, seconds: float, found: dict | None = None) -> dict:
        """Enter a stage and write the file.

        Raises:
            ValueError: no such status.
        """
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}; got {status!r}")
        entry: dict = {"name": name, "status": status, "seconds": round(seconds, 1)}
        if detail:
            entry["detail"] = detail[:MOST_CHARACTERS]
        kept = {key: value for key, value in (found or {}).items() if key not in ("unsupported", "host")}
        if "failed" in kept:
            kept["failed"] = [[case, message[:MOST_CHARACTERS]] for case, message in kept["failed"][:MOST_FAILURES]]
        entry |= kept
        self.content["stages"].append(entry)
        self.content["host"] |= (found or {}).get("host", {})
        self.content["summary"] = self.summary()
        self.content["finished"] = now()
        self.write()
        return entry

    def summary(self) -> dict[str, int]:
        """How many stages have each status."""
        counts = Counter(stage["status"] for stage in self.content["stages"])
        return {status: counts[status] for status in STATUSES}

    def write(self) -> None:
        """Replace the file in one step: a run that is cut off leaves the last whole report."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self._path)

    def exit_code(self, required: list[str]) -> int:
        """0 unless a stage went wrong, or one whose name starts with a required one did not pass."""
        stages = self.content["stages"]
        if any(stage["status"] in BAD for stage in stages):
            return 1
        for name in required:
            matching = [stage for stage in stages if stage["name"] == name or stage["name"].startswith(f"{name}/")]
            if not matching or any(stage["status"] != "pass" for stage in matching):
                return 1
        return 0


def line(entry: dict) -> str:
    """One stage for a terminal."""
    cases = f"{entry['cases']} cases" if entry.get("cases") else ""
    return f"{entry['name']:<22} {entry['status']:<12} {entry['seconds']:6.1f} s  {cases:<12} {entry.get('detail', '')}"


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
