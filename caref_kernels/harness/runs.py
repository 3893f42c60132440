"""Running an experiment: every job that has no row yet, one after the other, each whole or not at all."""

from __future__ import annotations

import io
import json
import platform
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers

from caref_kernels import __version__, explain

from . import models
from .data import Example, load
from .encoding import Encoder
from .evaluation import Evaluator
from .metrics import score_answers
from .protocol import Sizes, Split, feb_split
from .results import Job, Results, write_atomically
from .scorers import load_scorer
from .settings import Settings
from .training import Stopped, train
from .variants import VARIANTS, trainable_parameters

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "bert-score", "torchmetrics")
_OOM_RETRIES = 3


class DeviceLostError(RuntimeError):
    """The accelerator does not answer any more: only a fresh process can go on."""


class Callbacks:
    """What a run reports to.  This one does nothing; the command line has one with a progress bar."""

    def note(self, text: str) -> None:
        """Something that a user should read."""

    def job(self, job: Job, steps: int) -> None:
        """A job begins that will train for ``steps``."""

    def step(self) -> None:
        """A step is finished."""

    def done(self) -> None:
        """A job is finished, by whomever."""

    def stop(self) -> bool:
        """Whether somebody asks the run to stop after the step or batch it is in."""
        return False


@dataclass
class RunSummary:
    """What became of the jobs of one call."""

    finished: list[Job] = field(default_factory=list)
    found: list[Job] = field(default_factory=list)
    busy: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)
    stopped: bool = False


def run_jobs(
    settings: Settings, jobs: Sequence[Job], results: Results, callbacks: Callbacks, *, retry_failed: bool = False
) -> RunSummary:
    """Run every job that has no row and that nobody else works on.

    Raises:
        ValueError: the results folder was begun with other settings, or data or model do not fit them.
        FileNotFoundError: data, model or scorer are not on this machine.
        DeviceLostError: the accelerator is gone; the job is marked as failed.
    """
    results.bind(settings.decisive())
    summary = RunSummary()
    runner = Runner(settings, results, callbacks)
    for job in jobs:
        if callbacks.stop():
            summary.stopped = True
            break
        try:
            _take(job, runner, summary, retry_failed)
            callbacks.done()
        except Stopped:
            summary.stopped = True
            break
    return summary


def _take(job: Job, runner: Runner, summary: RunSummary, retry_failed: bool) -> None:
    failure = runner.results.path("failed", f"{job.name}.json")
    with runner.results.lock(job.name) as is_free:
        # Read under the lock: whoever held it may have finished since.
        if job.name in runner.results.finished():
            summary.found.append(job)
            return
        if not is_free:
            summary.busy.append(job)
            return
        if failure.is_file() and not retry_failed:
            runner.callbacks.note(f"{job.name} failed before; resume tries it again ({failure})")
            summary.failed.append(job)
            return
        try:
            runner.run(job)
        except (Stopped, KeyboardInterrupt, FileNotFoundError, ModuleNotFoundError):
            raise
        except Exception as error:  # whatever it is, it is this job's: the others go on
            write_atomically(failure, json.dumps({"run": job.name, "at": _now(), "error": traceback.format_exc()}))
            runner.callbacks.note(f"{job.name} failed: {type(error).__name__}: {error}")
            summary.failed.append(job)
            if _is_device_error(error):
                raise DeviceLostError(f"{job.name}: {error}") from error
            return
        failure.unlink(missing_ok=True)
        summary.finished.append(job)


class Runner:
    """What jobs share: the model's place, tokenizer, scorer and data, each loaded when a job first needs it."""

    def __init__(self, settings: Settings, results: Results, callbacks: Callbacks) -> None:
        self.settings, self.results, self.callbacks = settings, results, callbacks
        self.device = device_name(settings.device)
        self.source = models.locate(settings)
        self.config = models.load_config(self.source)
        self.tokenizer = models.load_tokenizer(self.source)
        self.scorer = load_scorer(settings.scorer, device=self.device, download=settings.download)
        self._data: dict[str, list[list[Example]]] = {}

    def run(self, job: Job) -> None:
        """Train and evaluate ``job`` and add its row.

        Raises:
            Stopped: somebody asked for it.
        """
        started = time.time()
        split = self.split(job)
        rows = self.results.read().rows
        if any((row["dataset"], row["seed"]) == (job.dataset, job.seed) and row["split"] != split.hash for row in rows):
            raise ValueError(f"{job.dataset}: other examples than in the finished runs; the data files have changed")
        encoder = self.encoder(job.dataset)
        items = [encoder(shot.example, shot.explanation) for shot in split.train]
        self.callbacks.job(job, 0 if VARIANTS[job.variant].trained == "nothing" else self.settings.max_steps)
        model, curve, micro_batch = self._trained(job, encoder, items)
        trained_at = time.time()
        trained, total = trainable_parameters(model)
        metrics, answers = self._evaluate(model, encoder, split)
        row = {
            "run": job.name,
            **job._asdict(),
            **self._origin(split),
            "trained": trained,
            "parameters": total,
            "percent": 100 * trained / total,
            "cut": sum(encoder.is_cut(shot.example, shot.explanation) for shot in split.train),
            "metrics": metrics,
            "curve": curve,
            "micro_batch": micro_batch,
            "finished": _now(),
            "seconds": {"train": trained_at - started, "evaluate": time.time() - trained_at},
        }
        lines = (json.dumps({"uid": e.uid, "answer": a}) for e, a in zip(split.dev, answers, strict=True))
        write_atomically(self.results.path("answers", f"{job.name}.jsonl"), "\n".join(lines) + "\n")
        self.results.append(row)

    def split(self, job: Job) -> Split:
        """The examples that the job trains and is evaluated on."""
        settings = self.settings
        if job.dataset not in self._data:
            parts = ("train", "dev")
            if job.dataset in settings.hub:
                from .hub import load_hub

                self._data[job.dataset] = [load_hub(job.dataset, part, settings.cos_e_version) for part in parts]
            else:
                options = {"version": settings.cos_e_version}
                self._data[job.dataset] = [load(job.dataset, settings.data, part, **options) for part in parts]
        return feb_split(job.dataset, *self._data[job.dataset], job.seed, Sizes(settings.train_size, settings.dev_size))

    def encoder(self, dataset: str) -> Encoder:
        """How the dataset's examples become tokens."""
        settings = self.settings
        limits = settings.max_source, settings.max_target
        causal = not self.config.is_encoder_decoder
        return Encoder(dataset, self.tokenizer, causal, settings.newline, settings.end, *limits)

    def _trained(self, job: Job, encoder: Encoder, items: list):
        """The trained model, its curve and the micro-batch that fitted; halved up to three times, the batch kept."""
        settings, variant = self.settings, VARIANTS[job.variant]
        largest = micro_batch = settings.micro_batch or settings.batch_size
        while True:
            transformers.set_seed(job.seed)  # an adapter begins with random numbers
            model = models.load_model(self.source, settings, variant, self.device)
            models.check_fit(model, encoder, items)
            if variant.trained == "nothing":
                return model, [], micro_batch
            if variant.trained == "adalora" and micro_batch != settings.batch_size:
                # PEFT adds its regulariser to every micro-batch, so it would count once for each of them.
                raise ValueError(f"micro_batch must be batch_size {settings.batch_size} for AdaLoRA; got {micro_batch}")
            try:
                curve = train(model, items, self.tokenizer, job, settings, micro_batch, self.callbacks)
                return model, curve, micro_batch
            except torch.OutOfMemoryError:
                if micro_batch % 2 or micro_batch == largest >> _OOM_RETRIES:
                    raise
                micro_batch //= 2
                self.callbacks.note(f"{job.name}: out of memory; micro-batch {micro_batch}, the batch stays as it is")
            del model
            _free(self.device)

    def _evaluate(self, model: Any, encoder: Encoder, split: Split) -> tuple[dict[str, Any], list[str]]:
        settings = self.settings
        model.eval()
        if settings.precision == "bf16":
            model.to(torch.bfloat16)

        def after_batch() -> None:
            if self.callbacks.stop():
                raise Stopped

        size = settings.eval_batch_size
        while True:
            evaluator = Evaluator(model, encoder, size, after_batch)
            try:
                answers = evaluator.answers(split.dev, settings.max_new_tokens)
                figures = evaluator.calibration(split.dev) | evaluator.targets(split.dev)
                return score_answers(answers, split.dev, self.scorer) | figures, answers
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                self.callbacks.note(f"out of memory in evaluation; {size} sequences at a time")
                _free(self.device)

    def _origin(self, split: Split) -> dict[str, Any]:
        """What a row came from, by an allow-list: no environment, no path, no host."""
        return {
            "model": self.source.name,
            "revision": getattr(self.config, "_commit_hash", None),
            "protocol": "FEB" if (self.settings.train_size, self.settings.dev_size) == Sizes() else "changed sizes",
            "train_size": len(split.train),
            "dev_size": len(split.dev),
            "split": split.hash,
            "settings": self.settings.hash(),
            "tokenizer": models.tokenizer_hash(self.tokenizer),
            "scorer": None if self.scorer is None else self.scorer.name,
            "device": describe_device(self.device),
            "backend": _backend(self.device),
            "versions": _versions(),
        }


def device_name(wanted: str) -> str:
    """``"cuda"`` or ``"cpu"``.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu or auto here: no CUDA device answers; got 'cuda'")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def describe_device(device: str) -> str:
    """The device in words, with what decides the bits of a result."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _backend(device: str) -> str:
    """The line of ``explain`` that says what computes the loss; what it prints is not for the user here."""
    with redirect_stdout(io.StringIO()):
        lines = explain(torch.empty(1, 2, device=device)).splitlines()
    return next((" ".join(line.split()) for line in lines if " runs" in line), "none")


def _versions() -> dict[str, str]:
    known = {"python": platform.python_version(), "caref_kernels": __version__}
    for package in _PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            continue
    return known


def _is_device_error(error: BaseException) -> bool:
    lost = getattr(torch, "AcceleratorError", ())
    return isinstance(error, lost) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def _free(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
