"""The results of a suite: one JSON file with a record per line, so that a new measurement changes few lines.

A record has a case, an implementation and what was measured of it; times are percentiles in milliseconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .sources import ROOT

SCHEMA = 2
FOLDER = ROOT / "benchmarks" / "results"


@dataclass
class Results:
    """What one run of a suite found.

    ``cases`` has titles by name; ``absent`` the reasons of the implementations that a case lacks, ``left_out`` those of
    cases.

    Raises:
        ValueError: there are records but no machine or no commit, so that nobody could say what was measured where; a
            record belongs to no case, or occurs twice.
    """

    date: str
    provenance: dict = field(default_factory=dict)
    cases: dict[str, str] = field(default_factory=dict)
    absent: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    def check(self) -> None:
        """See ``Raises`` of the class."""
        for name in ("machine", "commit"):
            if self.rows and not self.provenance.get(name):
                raise ValueError(f"{name} must not be empty in results; got {self.provenance.get(name)!r}")
        seen = set()
        for row in self.rows:
            key = (row["case"], row["implementation"])
            if row["case"] not in self.cases or key in seen:
                raise ValueError(f"a record must belong to a case and occur once; got {key}")
            seen.add(key)

    def of(self, case: str) -> dict[str, dict]:
        """The records of one case by implementation."""
        return {row["implementation"]: row for row in self.rows if row["case"] == case}

    def add(self, part: dict) -> None:
        """Enter what a worker found: new records, and further fields of records that are there."""
        self.provenance = self.provenance or part["provenance"]
        for row in part["rows"]:
            known = self.of(row["case"]).get(row["implementation"])
            if known is None:
                self.rows.append(row)
            else:
                known.update(row)
        self.cases |= part["cases"]
        self.absent |= part["absent"]

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        self.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(self.text())
        partial.replace(path)

    def text(self) -> str:
        """The file's content: one line for each field and for each record."""
        fields = {"schema": SCHEMA, **asdict(self)}
        rows = ",\n".join(f"  {json.dumps(row)}" for row in fields.pop("rows"))
        head = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        return "{\n" + ",\n".join([*head, f' "rows": [\n{rows}\n ]']) + "\n}\n"


def load(path: Path) -> Results | None:
    """The results in ``path``; ``None`` if there are none yet.

    Raises:
        ValueError: another schema, or see :class:`Results`.
    """
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if found.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path.name} must have schema {SCHEMA}")
    results = Results(**found)
    results.check()
    return results
