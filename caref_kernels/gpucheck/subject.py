"""What is checked, a check, and how a stage's checks are run with their controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..config import CarefConfig
from ..testing import GRADIENT_PARTS, Evaluation, check_evaluation, evaluate, evaluate_eager, make_case, oracle
from . import planted
from .fence import Fence


class Unsupported(Exception):
    """A stage that cannot run here; the text is the reason."""


@dataclass(frozen=True)
class Subject:
    """A backend on a device; ``clean`` is the backend itself where ``backend`` has a planted bug.

    ``scale`` is 1 where the full sizes are checked, less to try the checks out.
    """

    backend: str
    device: str
    clean: str = ""
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.clean:
            object.__setattr__(self, "clean", self.backend)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def checks_on_device(self) -> bool:
        """Whether labels are checked by the kernel: a NaN row instead of an error."""
        return self.clean in backends.DEVICE_CHECKED

    def with_bug(self, bug: str) -> Subject:
        """The same with a bug planted."""
        return Subject(planted.plant(self.clean, bug), self.device, self.clean, self.scale)

    def case(self, regime: str, rows: int, columns: int, dtype: torch.dtype, **options) -> tuple[Tensor, Tensor]:
        """:func:`caref_kernels.testing.make_case` on the device."""
        case = make_case(regime, rows, columns, dtype, **options)
        return case.logits.to(self.device), case.labels.to(self.device)

    def wait(self) -> None:
        """Until the device is idle; an error of a kernel appears here."""
        if self.on_gpu:
            torch.cuda.synchronize()


class Check(NamedTuple):
    """One case of a stage; ``bugs`` are planted, one after another, and must each make it fail."""

    name: str
    run: Callable[[Subject], dict[str, float] | None]
    bugs: tuple[str, ...] = ()


def run_checks(subject: Subject, checks: Iterable[Check], seconds: float, open_ended: bool = False) -> dict:
    """Run every check, and its controls after it: what :func:`caref_kernels.gpucheck.report.judge` takes.

    A check may return errors by name, whose largest are kept.  When ``seconds`` are over, an open-ended list is at its
    end; of any other, what is left counts as a failure: a stage that saw half of its cases has not passed.
    """
    end = time.monotonic() + seconds
    failed: list[list[str]] = []
    could_not: list[list[str]] = []
    controls: dict[str, str] = {}
    worst: dict[str, list] = {}
    count = left_out = 0
    for check in checks:
        if time.monotonic() > end:
            if open_ended:
                break
            left_out += 1
            continue
        count += 1
        try:
            for quantity, error in (check.run(subject) or {}).items():
                if quantity not in worst or not error <= worst[quantity][0]:
                    worst[quantity] = [error, check.name]
        except (Unsupported, torch.cuda.OutOfMemoryError) as reason:
            count -= 1
            could_not.append([check.name, str(reason)])
            continue
        except Exception as error:  # noqa: BLE001
            failed.append([check.name, f"{type(error).__name__}: {error}"])
            if is_sticky(error):
                break
            continue
        controls |= {bug: _control(subject, check, bug) for bug in check.bugs}
    if left_out:
        failed.append(["time", f"{left_out} cases were left when {seconds:.0f} s were over"])
    return {"cases": count, "failed": failed, "could_not": could_not, "controls": controls, "worst": worst}


def _control(subject: Subject, check: Check, bug: str) -> str:
    try:
        check.run(subject.with_bug(bug))
    except AssertionError:
        return "caught"
    except Exception as error:  # noqa: BLE001
        return f"{check.name} ended with {type(error).__name__}: {error}"
    return f"{check.name} passed"


def is_sticky(error: Exception) -> bool:
    """After these, nothing of this process runs on the device any more."""
    return "CUDA error" in str(error) or "illegal memory access" in str(error)


def fenced_evaluation(subject: Subject, logits: Tensor, labels: Tensor, parts=GRADIENT_PARTS, **options) -> Evaluation:
    """:func:`caref_kernels.testing.evaluate` between guard zones, with every fresh tensor poisoned."""
    fence = Fence()
    logits, labels = fence.constant(logits), fence.constant(labels)
    with fence.watch():
        found = evaluate(logits, labels, parts, backend=subject.backend, **options)
        subject.wait()
    return found


def check_values(subject: Subject, logits: Tensor, labels: Tensor, parts=GRADIENT_PARTS, **options) -> dict[str, float]:
    """Hold every row to the budgets of :mod:`caref_kernels.testing`, and return the largest errors.

    Raises:
        AssertionError: an error exceeds its budget, or memory was touched that should not be.
    """
    actual = fenced_evaluation(subject, logits, labels, parts, **options)
    expected = oracle(logits, labels, parts, **options)
    eager = evaluate_eager(logits, labels, parts, **options)
    check_evaluation(actual, expected, eager)
    errors = _errors(actual, expected)
    others = _errors(eager, expected)
    return errors | {f"{name}_of_eager": error / max(others[name], 1e-12) for name, error in errors.items()}


def _errors(actual: Evaluation, expected: Evaluation) -> dict[str, float]:
    """The largest relative error of a row's loss and, in the 2-norm, of a row's gradient of the loss."""
    loss = (actual.terms.loss.double() - expected.terms.loss).abs() / expected.terms.loss.abs().clamp_min(0.1)
    gradient, exact = actual.gradients["loss"].double(), expected.gradients["loss"]
    norms = exact.norm(dim=-1)
    rows = (gradient - exact).norm(dim=-1)[norms > 1e-10] / norms[norms > 1e-10]
    return {"loss": float(loss.max()), "gradient": float(rows.max()) if rows.numel() else 0.0}


def operator_spec(columns: int, **options) -> tuple:
    """The arguments of the operators after their tensors, the name of the backend excepted."""
    return tuple(CarefConfig(return_terms=True, **options).row_spec(columns))
