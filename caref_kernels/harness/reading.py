"""Strict readers of plain CSV and JSONL files: every record comes with its place, every error names it.

Dataset files are untrusted input.  A line that cannot be read is an error with ``file:line: field``, never a skipped
example, because a silently shorter training set is a wrong experiment.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Far above any line of the four datasets (the longest has about 4,000 bytes), far below what exhausts a machine.
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Record:
    """One record of a file: its fields, and the place for error messages."""

    path: Path
    line: int
    fields: dict

    def fail(self, field: str, problem: str) -> ValueError:
        """The error for ``field`` of this record; the caller raises it."""
        return ValueError(f"{self.path}:{self.line}: {field}: {problem}")

    def text(self, field: str) -> str:
        """The non-empty string at ``field``; a dot descends into an object (``"question.stem"``).

        Raises:
            ValueError: the field is missing, not a string or blank.
        """
        value = self._get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(field, f"expected a non-empty string; got {_shorten(value)}")
        return value.strip()

    def items(self, field: str) -> list:
        """The non-empty list at ``field``.

        Raises:
            ValueError: the field is missing, not a list or empty.
        """
        value = self._get(field)
        if not isinstance(value, list) or not value:
            raise self.fail(field, f"expected a non-empty list; got {_shorten(value)}")
        return value

    def index_in(self, field: str, allowed: tuple[str, ...]) -> int:
        """The position of the string at ``field`` in ``allowed``.

        Raises:
            ValueError: the field is missing or its value is not one of ``allowed``.
        """
        value = self.text(field)
        if value not in allowed:
            raise self.fail(field, f"expected one of {', '.join(map(repr, allowed))}; got {_shorten(value)}")
        return allowed.index(value)

    def _get(self, field: str) -> object:
        value: object = self.fields
        for name in field.split("."):
            if not isinstance(value, dict) or name not in value:
                raise self.fail(field, "missing")
            value = value[name]
        return value


def read_jsonl(path: Path) -> Iterator[Record]:
    """The objects of a JSON-lines file; blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not UTF-8, holds a NUL byte, is too long, or is not one JSON object; the file is empty.
    """
    found = False
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: line: not valid JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}:{number}: line: expected a JSON object; got {_shorten(fields)}")
        found = True
        yield Record(path, number, fields)
    _require_any(path, found)


def read_csv(path: Path, columns: tuple[str, ...] | None = None) -> Iterator[Record]:
    """The rows of a CSV file, keyed by its header line, or by ``columns`` for a file without one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the text is not valid CSV or UTF-8, holds a NUL byte, a row has not as many fields as there are
            columns, a column name occurs twice, or the file holds no row.
    """
    reader = csv.reader((text for _, text in _lines(path)), strict=True)
    header = columns
    found = False
    while True:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: line: not valid CSV ({error})") from None
        if not row:
            continue
        if header is None:
            header = tuple(name.strip() for name in row)
            if len(set(header)) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: line: a column name occurs twice in the header {header}")
            continue
        if len(row) != len(header):
            columns_text = ", ".join(header)
            raise ValueError(
                f"{path}:{reader.line_num}: line: expected {len(header)} fields ({columns_text}); got {len(row)}"
            )
        found = True
        yield Record(path, reader.line_num, dict(zip(header, row, strict=True)))
    _require_any(path, found)


def by_key(records: Iterator[Record], field: str) -> dict[str, Record]:
    """The records by the value of ``field``, in file order.

    Raises:
        ValueError: the field is missing, or a value occurs twice; the message gives both places.
    """
    result: dict[str, Record] = {}
    for record in records:
        key = record.text(field)
        if key in result:
            first = result[key]
            raise record.fail(field, f"{_shorten(key)} occurs twice, first at {first.path.name}:{first.line}")
        result[key] = record
    return result


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(f"{path}:{number}: line: longer than {MAX_LINE_BYTES} bytes")
            if b"\0" in raw:
                raise ValueError(f"{path}:{number}: line: holds a NUL byte")
            try:
                # The first line may carry a byte order mark; anywhere else it would be text.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: line: not UTF-8 ({error})") from None


def _require_any(path: Path, found: bool) -> None:
    if not found:
        raise ValueError(f"{path}:1: file: holds no record")


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
