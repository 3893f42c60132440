"""Results are bitwise identical from run to run, for any number of threads, and beside any other rows."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_device import device_of
from cuda_emulated import PREAMBLE

from caref_kernels import EntropyTopK, TopK, caref_loss
from caref_kernels.testing import evaluate, make_case

SHAPES = ((1, 5000), (7, 1025), (130, 333), (5000, 17))


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _results(case, backend, **options):
    leaf = case.logits.clone().requires_grad_()
    out = caref_loss(leaf, case.labels, return_terms=True, backend=backend, **options)
    out.loss.backward()
    return [*(term.detach() for term in out if term is not None), leaf.grad]


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_number_of_threads(fused_backend, shape, dtype):
    case = make_case("lm_like", *shape, dtype, seed=1, ignored=1 if shape[0] > 1 else 0)
    for options in ({"reduction": "mean"}, {"alpha": 1.5, "beta": 0.5, "reduction": "sum"}):
        torch.set_num_threads(1)
        expected = _results(case, fused_backend, **options)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for one, other in zip(expected, _results(case, fused_backend, **options), strict=True):
                assert torch.equal(one, other), threads


def test_results_are_identical_run_to_run(backend):
    case = make_case("lm_like", 33, 1025, seed=2, ignored=3)
    expected = _results(case, backend)
    for _ in range(5):
        for one, other in zip(expected, _results(case, backend), strict=True):
            assert torch.equal(one, other)


def test_row_does_not_depend_on_the_other_rows(fused_backend):
    case = make_case("lm_like", 12, 1500, seed=3)
    whole = evaluate(*case, backend=fused_backend)
    for row in range(12):
        alone = evaluate(case.logits[row : row + 1], case.labels[row : row + 1], backend=fused_backend)
        for name, term in alone.terms._asdict().items():
            assert torch.equal(term, getattr(whole.terms, name)[row : row + 1]), name
        for part, gradient in alone.gradients.items():
            assert torch.equal(gradient, whole.gradients[part][row : row + 1]), part


def test_results_are_identical_process_to_process(fused_backend):
    program = f"""{PREAMBLE}
import sys, torch
from caref_kernels.testing import evaluate, make_case
torch.set_num_threads(int(sys.argv[1]))
case = [part.to({device_of(fused_backend)!r}) for part in make_case("lm_like", 9, 1025, seed=4)]
terms, gradients, _ = evaluate(*case, backend={fused_backend!r})
bits = [tensor.cpu().flatten().view(torch.int32) for tensor in (*terms, *gradients.values())]
weights = torch.arange(1, sum(map(len, bits)) + 1)
sys.stdout.write(str(int((torch.cat(bits).long() * weights).sum())))
"""
    sums = {
        subprocess.run(
            [sys.executable, "-c", program, threads], capture_output=True, text=True, timeout=120, check=True
        ).stdout
        for threads in ("1", "2")
    }
    assert len(sums) == 1
    assert sums != {""}


@pytest.mark.usefixtures("restored_threads")
def test_calls_from_several_threads_at_once(backend):
    """The compiled kernels release the interpreter lock and share no state between calls."""
    cases = [make_case("lm_like", 16, 400, seed=seed) for seed in range(8)]
    expected = [_results(case, backend) for case in cases]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: _results(case, backend), cases * 3))
    for one, other in zip(expected * 3, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("policy", [TopK(40), EntropyTopK()], ids=str)
def test_masks_do_not_depend_on_threads(backend, policy):
    """A mask is bitwise identical for any number of threads, each of which has its own working memory."""
    case = make_case("normal_1", 48, 9000, seed=9)
    torch.set_num_threads(1)
    expected = _results(case, backend, sparsity=policy)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        for _ in range(3):
            for one, other in zip(_results(case, backend, sparsity=policy), expected, strict=True):
                assert torch.equal(one, other)
