"""`pytest benchmarks/bench_loss.py`: the loss on a CPU under pytest-benchmark, to compare two versions of the code.

    pytest benchmarks/bench_loss.py --benchmark-autosave -k "flan-t5 and cpu"
    pytest benchmarks/bench_loss.py --benchmark-compare -k "flan-t5 and cpu"

Not collected by a plain `pytest`.  Times here are of one implementation after another, in the allocator as it is; the
figures of the documents come from benchmarks/measure.py, which interleaves them.
"""

from __future__ import annotations

import pytest

from benchmarks.cases import CASES
from benchmarks.implementations import LOSSES, Implementation
from benchmarks.provenance import provenance
from benchmarks.workspaces import LossWorkspace

ROUNDS, WARM_UP = 10, 2


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def workspace(request: pytest.FixtureRequest) -> LossWorkspace:
    """The tensors of one case; module scope makes pytest finish one case before the next."""
    return LossWorkspace(request.param)


@pytest.fixture(scope="session")
def origin() -> dict:
    """Machine, versions and commit, once."""
    return provenance()


@pytest.mark.parametrize("implementation", LOSSES, ids=lambda one: one.name)
@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
def test_loss(benchmark, workspace: LossWorkspace, origin: dict, implementation: Implementation, phase: str) -> None:
    """Verify, then time one phase; every repetition starts from fresh logits."""
    if implementation.loss is None and phase != "both":
        pytest.skip("a copy has no phases")
    reason = workspace.missing(implementation)
    if reason is not None:
        pytest.skip(reason)
    calls = workspace.calls(implementation)

    def prepared():
        inputs = calls.prepare()
        return ((inputs, calls.forward(inputs)) if phase == "backward" else (inputs,)), {}

    target = {
        "forward": calls.forward,
        "backward": lambda inputs, result: calls.backward(inputs, result),
        "both": lambda inputs: calls.backward(inputs, calls.forward(inputs)),
    }[phase]
    benchmark.extra_info.update(origin, errors=workspace.verify(implementation))
    benchmark.pedantic(target, setup=prepared, rounds=ROUNDS, warmup_rounds=WARM_UP)
