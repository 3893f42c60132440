"""The results folder: one JSON line for each finished run, kept by however many processes share the folder.

    <folder>/settings.json      the options that decide results, written by the first run and binding for all others
    <folder>/results.jsonl      one line for each (dataset, variant, seed, alpha, beta)
    <folder>/answers/           what the models generated
    <folder>/failed/            tracebacks of runs that failed
    <folder>/locks/             one file for each run that somebody works on

A run is finished when its line is.  A line is appended under a lock by one write and synced; a torn last line, which
only a crash within that write can leave, is cut off by the next writer and skipped by readers, who say so.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


class Job(NamedTuple):
    """One run: the unit of work, of loss by a crash, and of the results."""

    dataset: str
    variant: str
    seed: int
    alpha: float
    beta: float

    @property
    def name(self) -> str:
        """The name of the run's files."""
        return f"{self.dataset}.{self.variant}.s{self.seed}.a{self.alpha:g}.b{self.beta:g}"


def take_shard(jobs: Sequence[Job], text: str) -> list[Job]:
    """The part ``"index/count"`` of the jobs, counted from 0: one task of a SLURM array.

    The parts are disjoint, hold every job and are equally long but for one job.

    Raises:
        ValueError: not two whole numbers with 0 <= index < count.
    """
    first, slash, second = text.partition("/")
    if slash and first.isdecimal() and second.isdecimal() and int(first) < int(second):
        return list(jobs[int(first) :: int(second)])
    raise ValueError(f"shard must be index/count with 0 <= index < count; got {text!r}")


@dataclass(frozen=True)
class Reading:
    """The rows of a results file in file order, and the bytes of a torn last line that was left out."""

    rows: tuple[dict[str, Any], ...]
    torn: int = 0


class Results:
    """A results folder; made if it is not there.

    Raises:
        ValueError: it is a symbolic link or a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise ValueError(f"the results folder must be a folder, not a link or a file; got {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def file(self) -> Path:
        """The JSON lines."""
        return self.folder / "results.jsonl"

    def path(self, *parts: str) -> Path:
        """A path inside the folder, with the folders above it made.

        Raises:
            ValueError: a part is not a plain name, or a link leads out of the folder.
        """
        for part in parts:
            if not _NAME.fullmatch(part) or part in (".", ".."):
                raise ValueError(f"a name of a run must match {_NAME.pattern} and not be . or ..; got {part!r}")
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{path}: must not lead out of the results folder by a symbolic link")
        return path

    def bind(self, settings: dict[str, Any]) -> None:
        """Make these options the folder's own, or check that they are.

        Raises:
            ValueError: the folder was begun with others; the message lists what differs.
        """
        with self.lock("settings", wait=True):
            path = self.path("settings.json")
            if not path.is_file():
                write_atomically(path, json.dumps(settings, indent=1, allow_nan=False) + "\n")
                return
            known = json.loads(path.read_text(encoding="utf-8"))
        changes = differences(known, settings)
        if changes:
            raise ValueError(f"{self.folder}: was begun with other settings ({changes}); use another folder")

    @contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Hold the lock ``name``, which ends with the process that holds it; yields whether it was free.

        Without ``wait`` a lock that somebody else holds yields ``False``.
        """
        import filelock

        lock = filelock.FileLock(self.path("locks", f"{name}.lock"), timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def read(self) -> Reading:
        """The rows of finished runs.

        Raises:
            ValueError: a line other than the last is not a JSON object, or a run has two rows.
        """
        content = self.file.read_bytes() if self.file.is_file() else b""
        whole, _, torn = content.rpartition(b"\n")
        rows, seen = [], set()
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or "run" not in row:
                raise ValueError(f"{self.file}:{number}: line: expected a JSON object with a field 'run'")
            if row["run"] in seen:
                raise ValueError(f"{self.file}:{number}: run: {row['run']!r} occurs twice")
            seen.add(row["run"])
            rows.append(row)
        return Reading(tuple(rows), len(torn))

    def finished(self) -> set[str]:
        """The names of the runs that have a row."""
        return {row["run"] for row in self.read().rows}

    def append(self, row: dict[str, Any]) -> bool:
        """Add the row of a run; whether it was new.  On return it is on disk.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be written; what was written of the line is taken back.
        """
        line = json.dumps(finite(row), allow_nan=False, ensure_ascii=True).encode() + b"\n"
        with self.lock("results", wait=True):
            reading = self.read()
            if row["run"] in {known["run"] for known in reading.rows}:
                return False
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _NO_LINKS, 0o644)
            try:
                end = os.fstat(descriptor).st_size - reading.torn
                os.ftruncate(descriptor, end)
                try:
                    _write_all(descriptor, line, end)
                except OSError:
                    os.ftruncate(descriptor, end)
                    raise
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            _sync_folder(self.folder)
        return True


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: it holds the old content or the new one, whenever the power fails.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The keys whose values differ, as ``key old -> new``; empty if there are none."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in keys)


def finite(value: Any) -> Any:
    """``value`` with ``None`` for every float that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
