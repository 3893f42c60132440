"""What a user sees while runs go on, and how they are asked to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .results import Job
from .runs import Callbacks


class ConsoleCallbacks(Callbacks):
    """A bar over the jobs and one over the steps of the current one, on standard error; a context manager.

    While it is entered, the first SIGTERM or SIGINT asks the run to stop after its step; a second one ends
    the process at once.
    """

    def __init__(self, jobs: int) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        console = Console(stderr=True)
        # In a log file bars would be noise: there every job is a line.
        off = not console.is_terminal
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=off)
        self._jobs = self._progress.add_task("runs", total=jobs)
        self._steps = self._progress.add_task("loading", total=None)
        self._handlers: dict[int, object] = {}
        self.signal: int | None = None

    def __enter__(self) -> ConsoleCallbacks:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._asked)
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._progress.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def note(self, text: str) -> None:
        """A line above the bars, printed as it is."""
        self._progress.console.print(Text(text), soft_wrap=True)

    def job(self, job: Job, steps: int) -> None:
        """The step bar starts anew."""
        if self._progress.disable:
            self.note(job.name)
        self._progress.reset(self._steps, total=steps or None, description=job.name)

    def step(self) -> None:
        """One step on."""
        self._progress.advance(self._steps)

    def done(self) -> None:
        """One job on, finished by whomever."""
        self._progress.advance(self._jobs)

    def stop(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def _asked(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        # Not through the console: its lock may be held by the code that was interrupted.
        os.write(2, b"\nstopping after this step; once more to stop at once\n")
