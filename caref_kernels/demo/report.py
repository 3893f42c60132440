"""The report of the demo: its contents, its text, and how it gets into a file."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .evaluation import Evaluation
from .kernel_check import MMAP_THRESHOLD, REPETITIONS, KernelCheck, Measured
from .training import Timing

NO_ACCURACY = (
    "Accuracy on {count} examples means nothing and is not shown: differences below about 30 points are chance."
)
_ANSWER_WIDTH = 96


@dataclass(frozen=True)
class Arm:
    """One row of the comparison."""

    name: str
    evaluation: Evaluation
    timing: Timing | None  # None for the row that is not trained


@dataclass(frozen=True)
class StepCost:
    """The loss in the rows of a real training step: fused as it ran, eager as it would have run (seconds)."""

    arm: str
    timing: Timing
    eager_seconds: float
    cross_entropy_seconds: float


@dataclass(frozen=True)
class Report:
    """All that the demo has to say, in the order of its text."""

    setting: dict[str, str | int | float]
    backends: str
    kernel_check: KernelCheck
    arms: tuple[Arm, ...]
    shown: tuple[str, ...]  # names of the examples whose answers are shown
    held_out: int
    step_cost: StepCost
    total_seconds: float

    def text(self) -> str:
        """The report as plain text; lines of at most 120 characters, but for the table of ``explain``."""
        lines = ["caref_kernels demo", *(f"  {name}: {value}" for name, value in self.setting.items())]
        for heading, body in (
            ("1. Backends", self.backends.splitlines()),
            (_kernel_heading(self.kernel_check), _kernel_lines(self.kernel_check)),
            (f"3. Held-out examples ({self.held_out})", self._arm_lines()),
            ("4. Time", self._time_lines()),
            ("5. Accuracy", [NO_ACCURACY.format(count=self.held_out)]),
        ):
            lines += ["", heading, *body]
        return "\n".join(lines) + "\n"

    def json(self) -> str:
        """The report as JSON, without NaN."""
        content = dataclasses.asdict(self) | {"note": NO_ACCURACY.format(count=self.held_out)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def _arm_lines(self) -> list[str]:
        head = ("parsable", "label NLL", "expl. NLL", "answer entropy", "ce", "sced", "kl")
        lines = ["  " + f"{'':<12}" + "".join(f"{name:>{max(9, len(name)) + 2}}" for name in head)]
        for arm in self.arms:
            row = arm.evaluation
            cells = [f"{row.parsable}/{row.generated}"]
            cells += [f"{value:.2f}" for value in (row.label_nll, row.explanation_nll, row.answer_entropy)]
            cells += [f"{value:.2f}" for value in (row.ce, row.sced, row.kl)]
            aligned = (f"{cell:>{max(9, len(name)) + 2}}" for name, cell in zip(head, cells, strict=True))
            lines.append(f"  {arm.name:<12}" + "".join(aligned))
        lines.append("  NLL and entropy in nats per token; ce, sced and kl are means over all target tokens.")
        lines.append("  parsable: 'label because explanation' with a label of the example, among greedy answers.")
        for number, name in enumerate(self.shown):
            lines.append(f"  answers to {name}:")
            lines += [f"    {arm.name:<12}{_printable(arm.evaluation.answers[number])}" for arm in self.arms]
        return lines

    def _time_lines(self) -> list[str]:
        cost = self.step_cost
        lines = []
        for arm in self.arms:
            if arm.timing is not None:
                lines.append(f"  {arm.name:<12}{arm.timing.step_seconds:.2f} s per step, {_loss_part(arm.timing)}")
        rest = cost.timing.step_seconds - cost.timing.loss_seconds
        lines.append(f"  on the {cost.timing.rows} rows of the last step of {cost.arm} the loss would have taken")
        for name, seconds in (("eager", cost.eager_seconds), ("cross-entropy alone", cost.cross_entropy_seconds)):
            lines.append(f"    {name:<22}{1e3 * seconds:.1f} ms, {100 * seconds / (rest + seconds):.1f} % of the step")
        lines.append(f"  medians; whole run {self.total_seconds:.0f} s")
        return lines


def write(report: Report, path: Path) -> None:
    """Write the report to ``path``: JSON if its name ends with ``.json``, else text; whole or not at all.

    Raises:
        OSError: it cannot be written.
        ValueError: a number of the report is not finite.
    """
    content = report.json() if path.suffix == ".json" else report.text()
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _kernel_heading(check: KernelCheck) -> str:
    return f"2. Kernel check on {check.rows} rows of {check.columns:,} logits (float32) that the model just produced"


def _kernel_lines(check: KernelCheck) -> list[str]:
    side = "below" if check.logits_bytes < MMAP_THRESHOLD else "above"
    megabytes = check.logits_bytes / 1e6
    lines = [f"  {'':<22}{'loss error':>12}{'gradient error':>16}{'ms':>9}{'extra bytes':>16}"]
    lines += [_measured_line(measured) for measured in check.measured]
    return [
        *lines,
        "  errors: largest relative error of a row (gradient: Euclidean norm) against the definition in float64.",
        f"  ms: forward + backward, median of {REPETITIONS} interleaved rounds; one temporary has {megabytes:.1f} MB,",
        f"  {side} the 32 MiB from which glibc maps each block afresh.",
        "  extra bytes: peak of torch's CPU allocations during forward + backward beyond the logits, gradient",
        "  included, from the profiler's allocation events.",
    ]


def _measured_line(measured: Measured) -> str:
    def error(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    return (
        f"  {measured.name:<22}{error(measured.loss_error):>12}{error(measured.gradient_error):>16}"
        f"{measured.milliseconds:>9.2f}{measured.extra_bytes:>16,}"
    )


def _loss_part(timing: Timing) -> str:
    share = 100 * timing.loss_seconds / timing.step_seconds
    return f"of which the fused loss {1e3 * timing.loss_seconds:.1f} ms, {share:.1f} %"


def _printable(text: str) -> str:
    """``text`` on one line, without control characters (a model may generate any), shortened."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not line:
        return "(nothing)"
    return line if len(line) <= _ANSWER_WIDTH else line[: _ANSWER_WIDTH - 3] + "..."
