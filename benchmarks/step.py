"""A training step of T5 and SmolLM2 with each loss: time, peak memory, largest batch.

The models have random weights in the shapes of real ones.  The losses take turns on one model.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caref_kernels import CarefLoss
from caref_kernels.testing import check_identity

from .implementations import Implementation, cross_entropy, eager_loss
from .sampling import interleave, percentiles_ms, resident_bytes

# A step's own arithmetic does not depend on the weights, so random ones of the right shape will do.
_SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
_T5_SMALL = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 4}
_FLAN_T5_LARGE = {
    "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class StepCase:
    """A model, a batch of ``batch`` examples of ``source`` and ``target`` tokens, and the memory it is to fit."""

    name: str
    kind: str  # "t5" or "llama"
    shape: dict
    batch: int
    source: int
    target: int
    dtype: torch.dtype
    limit: int | None  # bytes, for the largest batch

    @property
    def title(self) -> str:
        """For tables."""
        dtype = str(self.dtype).removeprefix("torch.")
        tokens = f"{self.source} + {self.target}" if self.kind == "t5" else str(self.target)
        return f"{self.name}: random weights, {dtype}, AdamW, {self.batch} examples of {tokens} tokens"

    def classes(self) -> tuple[type, type]:
        """(model, configuration); asking for them imports them."""
        import transformers

        if self.kind == "t5":
            return transformers.T5ForConditionalGeneration, transformers.T5Config
        return transformers.LlamaForCausalLM, transformers.LlamaConfig

    def make_model(self, device: torch.device) -> nn.Module:
        """The model in training mode, without dropout, so that every loss sees the same logits."""
        model, config = self.classes()
        torch.manual_seed(0)
        t5 = {"vocab_size": 32_128, "dropout_rate": 0.0, "decoder_start_token_id": 0} if self.kind == "t5" else {}
        return model(config(**(t5 | self.shape))).to(device, self.dtype).train()

    def make_batch(self, size: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs without labels, labels): a tenth of the labels are ignored."""
        generator = torch.Generator().manual_seed(1)

        def tokens(length: int) -> Tensor:
            return torch.randint(1, 32_000, (size, length), generator=generator)

        inputs = {"input_ids": tokens(self.source if self.kind == "t5" else self.target)}
        if self.kind == "t5":
            inputs["decoder_input_ids"] = tokens(self.target)
        labels = tokens(self.target)
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = -100
        return {name: one.to(device) for name, one in inputs.items()}, labels.to(device)


_GIB = 2**30
CPU_CASES = (
    StepCase("t5-small", "t5", _T5_SMALL, 2, 64, 64, torch.float32, _GIB // 2),
    # Its optimiser alone takes seconds: no search for the largest batch.
    StepCase("smollm2", "llama", _SMOLLM2, 1, 0, 128, torch.float32, None),
)
GPU_CASES = (
    StepCase("flan-t5-large", "t5", _FLAN_T5_LARGE, 32, 256, 128, torch.bfloat16, 40 * _GIB),
    StepCase("smollm2", "llama", _SMOLLM2, 16, 0, 1024, torch.bfloat16, 40 * _GIB),
)

# (model, inputs, labels) -> loss
StepLoss = Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor]


def _of_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> StepLoss:
    return lambda model, inputs, labels: loss(model(**inputs).logits.flatten(0, -2), labels.flatten())


def _eager(logits: Tensor, labels: Tensor) -> Tensor:
    valid = labels != -100
    return eager_loss(logits[valid], labels[valid])


LOSSES = (
    Implementation("cross-entropy", "F.cross_entropy in float32", cross_entropy, part="ce"),
    Implementation("eager", "CAREF composed in plain PyTorch, on the valid rows", _eager),
    Implementation("fused", "CarefLoss on the model's logits", CarefLoss()),
    Implementation(
        "fused-head", "apply_caref(model, fuse_head=True): head and loss, without materialising logits", None
    ),
)
NAMES = tuple(one.name for one in LOSSES)


@contextmanager
def step_loss(name: str, model: nn.Module) -> Iterator[StepLoss]:
    """The loss called ``name`` for ``model``, which is changed inside the ``with`` by "fused-head" alone."""
    if name == "fused-head":
        from caref_kernels.integrations.transformers import apply_caref, remove_caref

        apply_caref(model, fuse_head=True)
        try:
            # The labels are aligned with the logits.
            yield lambda model, inputs, labels: model(**inputs, labels=labels, shift_labels=labels).loss
        finally:
            remove_caref(model)
        return
    yield _of_logits(next(one.loss for one in LOSSES if one.name == name))


def work(job) -> dict:
    """One part of :data:`benchmarks.measure.SUITES`: records with times and losses, or with memory."""
    found = (_time if job.part == "time" else _memory)(job.case, job.device, job.seconds)
    rows = [{"case": job.case.name, "implementation": name} | fields for name, fields in found.items()]
    return {"rows": rows, "absent": {}}


def _time(case: StepCase, device: torch.device, seconds: float) -> dict[str, dict]:
    step = Step(case, device)
    batch = case.make_batch(case.batch, device)
    values = step.verify(batch)

    def once(name: str) -> float:
        with step_loss(name, step.model) as loss:
            _wait(device)
            start = time.perf_counter()
            step.run(loss, batch)
            _wait(device)
            return time.perf_counter() - start

    for name in NAMES:
        once(name)  # the optimiser makes its state, kernels are compiled
    typical = {name: once(name) for name in NAMES}
    samples = interleave({name: lambda name=name: once(name) for name in NAMES}, typical, seconds)
    return {
        name: {"samples": len(own), "step_ms": percentiles_ms(own), "value": values[name]}
        for name, own in samples.items()
    }


def _memory(case: StepCase, device: torch.device, _seconds: float) -> dict[str, dict]:
    """The peak of a step, and the largest batch; a batch that runs out of memory does not fit."""
    case.classes()
    before = 0 if device.type == "cuda" else resident_bytes()
    step = Step(case, device)
    found: dict[str, dict] = {}
    for name in NAMES:
        with ExitStack() as stack:
            loss = stack.enter_context(step_loss(name, step.model))

            def peak(size: int, loss=loss) -> int | None:
                try:
                    return _peak_of(step, loss, size, device) - before
                except torch.cuda.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    return None

            peak(case.batch)  # the optimiser makes its state, kernels are compiled
            found[name] = {"peak_bytes": peak(case.batch)}
            if case.limit is not None:
                batch, its_peak = largest_batch(peak, case.batch, case.limit)
                found[name] |= {"largest_batch": batch, "largest_peak_bytes": its_peak, "limit_bytes": case.limit}
    return found


def _peak_of(step: Step, loss: StepLoss, size: int, device: torch.device) -> int:
    batch = step.case.make_batch(size, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step.run(loss, batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    resident_bytes(reset_peak=True)
    step.run(loss, batch)
    return resident_bytes(peak=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Step:
    """One optimiser step of one model."""

    def __init__(self, case: StepCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.model = case.make_model(device)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device.type == "cuda")

    def run(self, loss: StepLoss, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        """Forward, backward, update; the loss before it."""
        value = loss(self.model, *batch)
        value.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def verify(self, batch: tuple[dict[str, Tensor], Tensor]) -> dict[str, float]:
        """The value of every loss on the untrained model; the CAREF ones must agree, whatever computes them.

        Raises:
            AssertionError: they do not.
        """
        values = {}
        for name in NAMES:
            with step_loss(name, self.model) as loss:
                values[name] = loss(self.model, *batch).detach()
        identity = "float32_terms" if self.case.dtype == torch.float32 else "bfloat16_head"
        for name in ("fused", "fused-head"):
            check_identity(values[name].view(1), values["eager"].view(1), identity, f"{self.case.name}, {name}")
        return {name: float(value) for name, value in values.items()}


def largest_batch(peak: Callable[[int], int | None], start: int, limit: int) -> tuple[int, int]:
    """(batch, its peak): the largest one found whose measured peak is within ``limit`` bytes.

    ``peak(batch)`` measures, ``None`` where it does not fit at all.  Batches are doubled until one does not fit, then
    halved between, down to a 16th: no batch is tried that is more than twice one that fits.

    Raises:
        ValueError: not even ``start`` fits.
    """

    def fits(size: int) -> int | None:
        found = peak(size)
        return found if found is not None and found <= limit else None

    best, best_peak = start, fits(start)
    if best_peak is None:
        raise ValueError(f"a batch of {start} does not fit the limit of {limit} bytes")
    above = None
    while above is None or above - best > max(1, best // 16):
        size = 2 * best if above is None else (best + above) // 2
        found = fits(size)
        if found is None:
            above = size
        else:
            best, best_peak = size, found
    return best, best_peak
