"""`pytest benchmarks/bench_loss.py`: the same cases and providers under pytest-benchmark, to compare two versions.

    pytest benchmarks/bench_loss.py --benchmark-autosave -k "flan-t5 and cpu"
    pytest benchmarks/bench_loss.py --benchmark-compare

Not collected by a plain `pytest`.  Times here are of one provider after another, in the allocator as it is; the figures
of the README come from benchmarks/measure.py, which interleaves them.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import sampling
from benchmarks.cases import CASES, Case
from benchmarks.measure import UNIT, run_memory_worker
from benchmarks.provenance import provenance
from benchmarks.providers import PROVIDERS, Provider, expectation, verify
from caref_kernels import backends

ROUNDS = 10


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def workspace(request: pytest.FixtureRequest) -> sampling.Workspace:
    """The tensors of one case; module scope makes pytest finish one case before the next."""
    return sampling.Workspace(request.param)


@pytest.fixture(scope="module")
def oracle(workspace: sampling.Workspace):
    """What the providers of this case are verified against."""
    return expectation(workspace.values, workspace.labels)


@pytest.fixture(scope="module")
def extra_bytes(workspace: sampling.Workspace) -> dict[str, int]:
    """Extra memory by provider, from a process whose allocator hides nothing."""
    name = workspace.case.name
    return run_memory_worker([name], torch.get_num_threads())[name]


@pytest.fixture(scope="session")
def origin() -> dict[str, str | int | bool]:
    """Machine, versions and commit, once."""
    return provenance()


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("phase", sampling.PHASES)
def test_loss(benchmark, workspace, oracle, extra_bytes, origin, provider: Provider, phase: str) -> None:  # noqa: PLR0913
    """Verify, then time one phase; every repetition starts from fresh logits."""
    _require(provider, workspace.case, phase)
    if provider.loss is not None:
        errors = verify(provider, workspace.values, workspace.labels, oracle)
        benchmark.extra_info.update(errors._asdict())
    benchmark.pedantic(**_timed(workspace, provider, phase), rounds=ROUNDS, warmup_rounds=sampling.WARM_UP)
    moved = sampling.useful_bytes(workspace.case, UNIT if provider.name == UNIT else phase)
    benchmark.extra_info.update(origin, extra_bytes=extra_bytes[provider.name])
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["gigabytes_per_second"] = moved / benchmark.stats.stats.median / 1e9


def _require(provider: Provider, case: Case, phase: str) -> None:
    if provider.loss is None and phase != "both":
        pytest.skip("a copy has no phases")
    if provider.backend is not None:
        reason = backends.get(provider.backend).unsupported(torch.empty(1, 2, dtype=case.dtype))
        if reason is not None:
            pytest.skip(reason)


def _timed(workspace: sampling.Workspace, provider: Provider, phase: str) -> dict:
    """The keyword arguments of ``benchmark.pedantic``: what is timed, and the setup that is not."""

    def fresh_logits():
        return (provider, workspace.refresh()), {}

    def fresh_graph():
        logits = workspace.refresh()
        return (provider, logits, workspace.forward(provider, logits)), {}

    def both(provider: Provider, logits: torch.Tensor) -> torch.Tensor | None:
        return workspace.backward(provider, logits, workspace.forward(provider, logits))

    if phase == "backward":
        return {"target": workspace.backward, "setup": fresh_graph}
    return {"target": workspace.forward if phase == "forward" else both, "setup": fresh_logits}
