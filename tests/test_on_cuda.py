"""Particular to a CUDA device: no items, a head in a graph, launches; and how the suite gets its tensors there."""

from __future__ import annotations

import sys
import types

import cuda_device
import pytest
import torch
import torch._dynamo.testing

from caref_kernels import backends, caref_loss, linear_caref_loss
from caref_kernels.testing import check_identity, evaluate, make_case


@pytest.fixture(params=cuda_device.ON_CUDA)
def on_cuda(request, cuda):
    """The name of each backend that can run on the CUDA device."""
    reason = backends.get(request.param).unsupported(torch.empty(1, 2, device=cuda))
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


def _case(cuda, rows=64, columns=32_128, dtype=torch.bfloat16, seed=0):
    case = make_case("lm_like", rows, columns, dtype, seed=seed, ignored=3)
    return case.logits.to(cuda), case.labels.to(cuda)


def _step(logits, labels, backend, **options):
    leaf = logits.requires_grad_()
    out = caref_loss(leaf, labels, backend=backend, return_terms=True, **options)
    return (*(term.detach() for term in out if term is not None), torch.autograd.grad(out.loss, leaf)[0])


@pytest.fixture
def synchronisation_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_no_items_on_the_device(on_cuda, cuda, request):
    """The loss is 0 without valid rows and infinite with one, the gradient is 0, and no value is read back."""
    logits, labels = _case(cuda, 8, 1000)
    items = torch.zeros((), dtype=torch.int64, device=cuda)
    request.getfixturevalue("synchronisation_is_an_error")
    nothing, rows = (_step(logits, y, on_cuda, num_items=items) for y in (torch.full_like(labels, -100), labels))
    torch.cuda.set_sync_debug_mode("default")
    assert [float(value) for value in nothing[:5]] == [0.0] * 5
    assert [float(value) for value in rows[:5]] == [float("inf")] * 5
    assert torch.count_nonzero(nothing[-1]) == torch.count_nonzero(rows[-1]) == 0


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_cuda_graph_of_a_head(on_cuda, cuda, softcap):
    """A capture cannot read the labels, so rows that are not valid take part in the product, even if they are NaN."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(*size, generator=generator).to(cuda, torch.bfloat16) for size in ((64, 32), (500, 32))]
    labels = torch.randint(500, (64,), generator=generator).to(cuda)
    labels[::3] = -100
    tensors[0][::3] = float("nan")
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def step():
        loss = linear_caref_loss(*leaves, labels, logit_scale=0.5, softcap=softcap, chunk_rows=16, backend=on_cuda)
        return (loss, *torch.autograd.grad(loss, leaves))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for ours, other in zip(captured, expected, strict=True):
        check_identity(ours, other.double(), "bfloat16_head")
    assert torch.count_nonzero(captured[1][::3]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_without_naming_a_backend(on_cuda, cuda):
    """The backend is selected while Dynamo traces, without a warning; changed weights do not recompile every time."""
    torch._dynamo.reset()
    logits, labels = _case(cuda, 16, 1000)

    def step(value):
        loss = caref_loss(logits * 1.0, labels, lambda_sced=value, num_items=value + 3)
        return loss + linear_caref_loss(logits[:, :64], logits[:, :640].reshape(-1, 64), labels % 160, lambda_kl=value)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in (0.1, 0.2, 0.3, 0.4):
        assert torch.equal(compiled(value), step(value))
    assert counter.frame_count <= 2


def test_two_launches_at_the_papers_head(on_cuda, cuda):
    logits, labels = _case(cuda, rows=1024)
    spec = (2.0, 1.0, 32_128, -100, True, 0.0, 0, 0, on_cuda)
    operators = torch.ops.caref_kernels

    def both():
        terms, stats = operators.forward(logits, labels, *spec)
        return operators.backward(terms, logits, labels, stats, *spec)

    both()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if not name.startswith(("Mem", "mem", "Activity"))]) == 2, kernels


def test_tensors_of_a_test_are_moved(monkeypatch):
    """Tested on the meta device, which stands for a device other than the CPU."""
    module = types.ModuleType("a_test")
    module.torch, module.make_case = torch, make_case
    cuda_device.move_tensors_of(module, "meta", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    assert module.torch.randn(2, 3, generator=generator).device.type == "meta"
    assert module.torch.zeros(2, requires_grad=True).requires_grad
    assert module.torch.tensor([1, 2], device="cpu").device.type == "cpu"
    assert {part.device.type for part in module.make_case("lm_like", 2, 5)} == {"meta"}
    assert torch.zeros(1).device.type == "cpu"
    assert sys.modules["torch"] is torch
    with pytest.raises(ValueError, match="labels: on cpu, but logits are on meta"):
        # tensors that were made elsewhere are not moved
        evaluate(module.torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), backend="reference")
