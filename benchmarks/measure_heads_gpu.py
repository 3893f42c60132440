"""`python -m benchmarks.measure_heads_gpu`: heads with their loss on one device, against every library that fuses them.

As benchmarks/measure_gpu.py, for losses of (hidden, weight, labels): time of the device, wall clock of a call, peak
memory.  Cross-entropy alone against all, the whole loss against what can express it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from caref_kernels import caref_loss, linear_caref_loss
from caref_kernels.testing import check_identity

from . import peers
from .gpu_clock import Clock, GpuSample
from .linear_cases import SIGMA, HeadCase, exact_loss_and_gradients
from .measure_gpu import PHASES, WARM_UP, contestants, finish, interleaved, new_results, parser, rounded, write
from .provenance import ROOT, gpu_provenance
from .providers import eager_loss
from .sampling import percentiles

RESULTS = ROOT / "benchmarks" / "results" / "heads_gpu.json"
VERIFIED_ROWS = 128

CASES = (
    HeadCase("llama-3", 4096, 128_256, 4096, torch.bfloat16, must_hold=True),
    HeadCase("llama-3-frozen", 4096, 128_256, 4096, torch.bfloat16, frozen=True, must_hold=True),
    HeadCase("flan-t5-large", 1024, 32_128, 1024, torch.bfloat16),
    HeadCase("smollm2", 8192, 49_152, 576, torch.bfloat16),
    HeadCase("qwen", 4096, 151_936, 2048, torch.bfloat16),
    HeadCase("gemma", 4096, 262_144, 2304, torch.bfloat16),
)


@dataclass(frozen=True)
class Contestant:
    """A loss of (hidden, weight, labels); ``part`` and ``package`` as in :class:`benchmarks.providers.Provider`."""

    name: str
    meaning: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    part: str = "loss"
    package: str | None = None


@dataclass(frozen=True)
class HeadGpuRow:
    """One line of the results; ``teraflops`` counts the matrix products that the mathematics needs, none twice."""

    machine: str
    commit: str
    case: str
    provider: str
    phase: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int
    teraflops: float

    def __post_init__(self) -> None:
        if not (self.machine and self.commit):
            raise ValueError(f"machine and commit must not be empty; got {self.machine!r} and {self.commit!r}")


def _logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda hidden, weight, labels: loss(functional.linear(hidden, weight), labels)


def _fused_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_caref_loss(hidden, weight, labels, lambda_sced=0.0, lambda_kl=0.0)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels)


CONTESTANTS = (
    Contestant("eager", "F.linear, then CAREF composed in plain PyTorch", _logits(eager_loss)),
    Contestant("logits", "F.linear, then caref_loss", _logits(caref_loss)),
    Contestant("fused", "linear_caref_loss", linear_caref_loss),
    Contestant("fused-ce", "linear_caref_loss with both weights 0", _fused_ce, "ce"),
    Contestant("cross-entropy", "F.linear, then F.cross_entropy in float32", _logits(_cross_entropy), "ce"),
    Contestant("liger-head", "Liger-Kernel's fused linear cross-entropy", peers.liger_head, "ce", "liger_kernel"),
    Contestant("cut", "Cut Cross-Entropy", peers.cut_head, "ce", "cut_cross_entropy"),
    Contestant("cut-exact", "Cut Cross-Entropy, unfiltered", peers.cut_head_exact, "ce", "cut_cross_entropy"),
    Contestant("trl-head", "TRL's fused head", peers.trl_head, "ce", "trl"),
    Contestant("torch-head", "F.linear_cross_entropy", peers.torch_head, "ce", "torch"),
    Contestant("quack-head", "quack's chunked linear cross-entropy", peers.quack_head, "ce", "quack"),
)


class HeadBench:
    """The tensors of one case on one device, and the clock."""

    def __init__(self, case: HeadCase, device: torch.device) -> None:
        self.case, self.clock = case, Clock(device)
        generator = torch.Generator(device).manual_seed(0)
        made = {"generator": generator, "device": device}
        weight = torch.randn(case.vocab, case.features, **made) * (SIGMA / case.features**0.5)
        self.weight = weight.to(case.dtype).requires_grad_(not case.frozen)
        self.hidden = torch.randn(case.rows, case.features, **made).to(case.dtype).requires_grad_()
        self.labels = torch.randint(case.vocab, (case.rows,), **made)

    def parts(self, contestant: Contestant) -> tuple[Callable, Callable, Callable]:
        """What :class:`benchmarks.gpu_clock.Clock` takes."""
        trained = [one for one in (self.hidden, self.weight) if one.requires_grad]
        return (
            lambda: None,
            lambda _: contestant.loss(self.hidden, self.weight, self.labels),
            lambda _, loss: torch.autograd.grad(loss, trained),
        )

    def verify(self, contestant: Contestant, expected: dict) -> dict[str, float]:
        """Relative errors on the first rows; our own keep the tolerances, others only have to compute the same thing.

        Raises:
            AssertionError: an error exceeds its tolerance.
        """
        rows = slice(0, min(VERIFIED_ROWS, self.case.rows))
        hidden = self.hidden.detach()[rows].clone().requires_grad_()
        loss = contestant.loss(hidden, self.weight, self.labels[rows])
        exact_loss, exact_gradients = expected[contestant.part]
        low = self.case.dtype == torch.bfloat16
        identity = "peer" if contestant.package else "bfloat16_head" if low else "float32_gradient"
        check_identity(loss.detach().float().view(1), exact_loss.view(1), identity, contestant.name)
        found = torch.autograd.grad(loss, [hidden, self.weight] if self.weight.requires_grad else [hidden])
        errors = {"loss": float((loss.detach().double() - exact_loss).abs() / exact_loss)}
        for name, gradient, exact in zip(("hidden", "weight"), found, exact_gradients, strict=False):
            check_identity(gradient, exact, identity, f"{contestant.name}, gradient of {name}")
            errors[f"gradient of {name}"] = float((gradient.double() - exact).norm() / exact.norm())
        return errors


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results file after every case."""
    options = parser("benchmarks.measure_heads_gpu", __doc__, RESULTS, CASES).parse_args(arguments)
    known = {case.name: case for case in CASES}
    unknown = sorted(set(options.cases) - set(known))
    if unknown:
        raise SystemExit(f"cases must be among {', '.join(known)}; got {', '.join(unknown)}")
    if options.worker:
        case = known[options.worker]
        if options.rows:
            case = dataclasses.replace(case, rows=options.rows)
        options.part.write_text(json.dumps(measure_case(case, torch.device(options.device), options.seconds)))
        return
    results = new_results(options.device)

    def done(name: str, measured: dict) -> None:
        made = results["provenance"] = results["provenance"] or measured["provenance"]
        results["cases"][name] = measured["title"]
        for part in ("absent", "errors", "extra_bytes"):
            results[part][name] = measured[part]
        results["rows"] += [asdict(HeadGpuRow(made["machine"], made["commit"], **row)) for row in measured["rows"]]
        write(options.output, results)
        sys.stdout.write(table(measured) + "\n")
        sys.stdout.flush()

    finish("benchmarks.measure_heads_gpu", options.cases or list(known), options, results, done)


def measure_case(case: HeadCase, device: torch.device, seconds: float) -> dict:
    """As :func:`benchmarks.measure_gpu.measure_case`."""
    bench = HeadBench(case, device)
    rows = slice(0, min(VERIFIED_ROWS, case.rows))
    few = bench.hidden.detach()[rows], bench.weight.detach(), bench.labels[rows]
    expected = {part: exact_loss_and_gradients(*few, part) for part in ("loss", "ce")}
    errors: dict[str, dict[str, float]] = {}
    extra: dict[str, int | None] = {}

    def prepare(contestant: Contestant) -> str | None:
        reason = peers.missing(contestant.package) if contestant.package else None
        if reason is not None:
            return reason
        errors[contestant.name] = bench.verify(contestant, expected)
        for _ in range(WARM_UP):
            bench.clock.repeat(*bench.parts(contestant))
        extra[contestant.name] = bench.clock.extra_memory(*bench.parts(contestant))
        return None

    running, absent = contestants(CONTESTANTS, prepare)
    expected.clear()  # gigabytes of float64
    samples = interleaved(running, lambda one: bench.clock.repeat(*bench.parts(one)), seconds)
    measured = {"title": case.title, "rows": rows_of(case, samples), "errors": errors, "absent": absent}
    return measured | {"extra_bytes": extra, "provenance": gpu_provenance(device)}


def rows_of(case: HeadCase, samples: dict[str, list[GpuSample]]) -> list[dict]:
    """The fields of :class:`HeadGpuRow`, machine and commit excepted."""
    product = 2 * case.rows * case.vocab * case.features
    products = {"forward": 1, "backward": 1 if case.frozen else 2}
    products["both"] = products["call"] = sum(products.values())
    rows = []
    for name, measured in samples.items():
        for phase in PHASES:
            low, middle, high = percentiles([getattr(sample, phase) for sample in measured])
            times = {"p20_ms": 1e3 * low, "p50_ms": 1e3 * middle, "p80_ms": 1e3 * high}
            times["teraflops"] = product * products[phase] / middle / 1e12
            row = {"case": case.name, "provider": name, "phase": phase, "samples": len(measured)}
            rows.append(row | {key: rounded(value) for key, value in times.items()})
    return rows


def table(measured: dict) -> str:
    """One case for a terminal."""
    lines = [measured["title"], f"{'':<16}" + "".join(f"{phase:>10}" for phase in PHASES) + "  TFLOP/s  extra MiB"]
    names = dict.fromkeys(row["provider"] for row in measured["rows"])
    by_phase = {(row["provider"], row["phase"]): row for row in measured["rows"]}
    for name in names:
        cells = "".join(f"{by_phase[name, phase]['p50_ms']:>10.4g}" for phase in PHASES)
        extra = measured["extra_bytes"][name]
        mebibytes = "" if extra is None else f"{extra / 2**20:.0f}"
        lines.append(f"{name:<16}{cells}{by_phase[name, 'both']['teraflops']:>9.4g}{mebibytes:>11}")
    lines += [f"{name:<16}{reason}" for name, reason in measured["absent"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
