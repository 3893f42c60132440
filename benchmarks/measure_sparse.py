"""`python -m benchmarks.measure_sparse`: the masked loss against the dense one and against torch.topk, on the CPU.

One process, one run, repetitions interleaved; memory is reused by every contestant alike (the "raised" regime of
measure.py).  Every contestant is compared with float64 on the same inputs before it is timed.  Writes a JSON file, and
a table beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from caref_kernels import EntropyTopK, TopK, caref_loss
from caref_kernels.testing import check_identity

from . import sampling
from .cases import Case
from .measure import worker_environment
from .provenance import ROOT, provenance
from .providers import Loss, Provider, eager_masked_loss
from .report_gpu import STALE

SCHEMA = 1
RESULTS = ROOT / "benchmarks" / "results" / "sparse_cpu.json"
CASES = tuple(
    Case(f"{name}{suffix}", rows, vocab, dtype)
    for name, rows, vocab in (("flan-t5", 256, 32_128), ("llama-3", 64, 128_256), ("widest", 32, 262_144))
    for suffix, dtype in (("", torch.float32), ("-bf16", torch.bfloat16))
)
POLICIES = {"8": TopK(8), "64": TopK(64), "1024": TopK(1024), "exp(H)": EntropyTopK()}
DENSE = "dense"
# Set before anything was measured; of forward and backward together, for exp(H).
MOST_DENSE, LEAST_EAGER = 2.0, 10.0


def contestants() -> tuple[Provider, ...]:
    """The dense loss, and for every policy the fused and the eager masked one."""
    fused = [Provider(DENSE, "no mask", lambda logits, labels: caref_loss(logits, labels, backend="cpu"))]
    for name, policy in POLICIES.items():
        fused.append(Provider(f"fused {name}", "masked", _fused(policy)))
        fused.append(Provider(f"eager {name}", "torch.topk", _eager(policy)))
    return tuple(fused)


def _fused(policy: TopK | EntropyTopK) -> Loss:
    return lambda logits, labels: caref_loss(logits, labels, sparsity=policy, backend="cpu")


def _eager(policy: TopK | EntropyTopK) -> Loss:
    return lambda logits, labels: eager_masked_loss(logits, labels, policy)


def verify(logits: Tensor, labels: Tensor) -> None:
    """Hold both forms of every policy to the composition in float64.

    Raises:
        AssertionError: a loss or a gradient is off by more than the identities of caref_kernels.testing.
    """
    for name, policy in POLICIES.items():
        leaf = logits.double().requires_grad_()
        exact = eager_masked_loss(leaf, labels, policy)
        (gradient,) = torch.autograd.grad(exact, leaf)
        for kind, loss in (("fused", _fused(policy)), ("eager", _eager(policy))):
            own = logits.clone().requires_grad_()
            value = loss(own, labels)
            check_identity(value.detach(), exact.detach(), "float32_terms", f"{kind} {name}")
            # The eager form's own gradient misses the cap of float32 at V = 262,144; ties, which torch.topk breaks and
            # the mask shares, differ in 16 bits.
            is_sharp = kind == "fused" and logits.dtype == torch.float32
            identity = "float32_gradient" if is_sharp else "bfloat16_gradient"
            check_identity(torch.autograd.grad(value, own)[0], gradient, identity, f"{kind} {name}")


def measure(seconds: float) -> list[dict]:
    """A row for every case and contestant: percentiles of forward, backward and both, in milliseconds."""
    rows = []
    for case in CASES:
        workspace = sampling.Workspace(case)
        verify(*case.tensors())
        samples = sampling.interleave(workspace, contestants(), seconds)
        dense = sampling.percentiles([sample.both for sample in samples[DENSE]])[1]
        support = caref_loss(*case.tensors(), sparsity=EntropyTopK(), return_terms=True, backend="cpu").support
        for name, measured in samples.items():
            row = {"case": case.name, "contestant": name, "samples": len(measured), "mean_support": float(support)}
            for phase in sampling.PHASES:
                times = sampling.percentiles([getattr(sample, phase) for sample in measured])
                row[f"{phase}_ms"] = [float(f"{1e3 * value:.4g}") for value in times]
            row["dense"] = float(f"{row['both_ms'][1] / (1e3 * dense):.3g}")
            rows.append(row)
        sys.stderr.write(f"measured: {case.title}\n")
    return rows


def table(results: dict) -> str:
    """The Markdown file beside the results."""
    made = results["provenance"]
    lines = [
        "# The masked loss on a CPU",
        "",
        f"Measured on {results['date']}: {made['machine']}, {made['cores']} cores, {made['threads']} threads; "
        f"{made['cpu_backend']}; torch {made['torch']}; commit {made['commit'][:12]}"
        f"{', with uncommitted changes' if made['dirty'] else ''}. One run, interleaved; median milliseconds of "
        f"forward + backward, logits of normal_3.  *eager*: plain PyTorch with torch.topk.",
        "",
        "| case | mean exp(H) | k | masked | eager | masked / dense | eager / masked |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    by_name = {(row["case"], row["contestant"]): row for row in results["rows"]}
    for case, title in results["cases"].items():
        for name in POLICIES:
            fused, eager = by_name[case, f"fused {name}"], by_name[case, f"eager {name}"]
            times = [f"{row['forward_ms'][1]:.3g} + {row['backward_ms'][1]:.3g}" for row in (fused, eager)]
            ratio = eager["both_ms"][1] / fused["both_ms"][1]
            cells = [title, f"{fused['mean_support']:.0f}", name, *times, f"{fused['dense']:.2f}", f"{ratio:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Set beforehand, for exp(H): masked / dense at most {MOST_DENSE:g}, eager / masked at least "]
    lines[-1] += f"{LEAST_EAGER:g}."
    return "\n".join(lines) + "\n"


def readme_block(results: dict | None, current_hash: str) -> str:
    """The README's sentence: the range of each ratio over the cases, for every k and for exp(H)."""
    if results is None:
        return "Not yet measured: `make bench-sparse` fills this in."
    made, cases = results["provenance"], results["cases"]
    both = {(row["case"], row["contestant"]): row["both_ms"][1] for row in results["rows"]}

    def ratios(above: str, below: str, names: Iterable[str]) -> str:
        pairs = [((case, above.format(name)), (case, below.format(name))) for case in cases for name in names]
        found = [both[one] / both[other] for one, other in pairs]
        return f"{min(found):.2g} to {max(found):.2g}"

    every = RESULTS.with_suffix(".md").relative_to(ROOT).as_posix()
    text = (
        f"On a CPU, {made['threads']} threads, forward and backward with a mask take "
        f"{ratios('fused {}', DENSE, POLICIES)} times the dense loss; plain PyTorch with `torch.topk` takes "
        f"{ratios('eager {}', 'fused {}', POLICIES)} times as long as that, "
        f"{ratios('eager {}', 'fused {}', ['exp(H)'])} times for exp(H) "
        f"(k of {', '.join(POLICIES)}; V from 32,128 to 262,144, float32 and bfloat16; "
        f"[every figure]({every}); commit {made['commit'][:12]}"
        f"{', with uncommitted changes' if made['dirty'] else ''})."
    )
    is_current = made["source_sha256"] == current_hash
    return text if is_current else f"{STALE.format(command='make bench-sparse')}\n\n{text}"


def main(arguments: list[str] | None = None) -> None:
    """Measure in a process whose allocator reuses memory, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure_sparse")
    parser.add_argument("--seconds", type=float, default=8.0, help="measured time per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and the kernels")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results file; the table goes beside it")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.worker:
        command = [sys.executable, "-m", "benchmarks.measure_sparse", "--worker", "--seconds", str(options.seconds)]
        command += ["--threads", str(options.threads), "--output", str(options.output.resolve())]
        environment = worker_environment("raised", dict(os.environ))
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        return
    torch.set_num_threads(options.threads)
    results = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "provenance": provenance(),
        "cases": {case.name: case.title for case in CASES},
        "rows": measure(options.seconds),
    }
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
