"""What the user sees while the demo works: a bar on standard error, and notes above it."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text


class WorkBar:
    """A progress bar over ``total`` pieces of work; a context manager."""

    def __init__(self, total: int) -> None:
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self._progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._task = self._progress.add_task("loading", total=total)

    def __enter__(self) -> WorkBar:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._progress.stop()

    def describe(self, what: str) -> None:
        """Name the work that is going on."""
        self._progress.update(self._task, description=what)

    def advance(self) -> None:
        """One piece of work is done."""
        self._progress.advance(self._task)

    def note(self, text: str) -> None:
        """A line above the bar, printed as it is."""
        self._progress.console.print(Text(text))

    def expect(self, seconds: float) -> None:
        """Say when the run is expected to finish."""
        clock = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
        self.note(f"expected to finish in about {seconds:.0f} s, at {clock}")
