"""The launches of the Triton kernels: types of arguments, constants, grids, and the number of compilations.

Ahead-of-time compilation is told the types of a kernel's parameters; in these tests they come from a call.
"""

from __future__ import annotations

import pytest
import torch
import triton_interpreter

pytest.importorskip("triton")
if triton_interpreter.ACTIVE:
    pytest.skip("interpreted kernels have no types", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("launches are real here, in every other test of the backend", allow_module_level=True)

import triton_driver

from caref_kernels import CarefConfig, EntropyTopK, TopK
from caref_kernels.backends import triton as package
from caref_kernels.backends.triton import backward, forward, select, tiling

BACKEND = package.TritonBackend()
INTEGERS = {
    forward.row_kernel: forward.INTEGERS,
    forward.partial_kernel: forward.INTEGERS,
    forward.second_kernel: forward.INTEGERS,
    forward.combine_kernel: forward.INTEGERS,
    select.topk_kernel: select.INTEGERS,
    backward.gradient_kernel: backward.INTEGERS,
}
KERNELS = {kernel.fn.__name__: kernel for kernel in INTEGERS}
ROW, SPLIT = ["row_kernel"], ["partial_kernel", "combine_kernel"]
TWICE = ["partial_kernel", "second_kernel", "combine_kernel"]
H200 = tiling.Device(multiprocessors=132, warp_size=32)


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.setattr(package, "_device", lambda device: H200)
    with triton_driver.recorded(list(INTEGERS)) as found:
        yield found


def _call(logits, targets=None, **options):
    """Launch the forward and the backward; nothing is computed, because the driver only records launches."""
    spec = CarefConfig(**options).row_spec(logits.size(-1))._replace(vocab_size=logits.size(-1))
    terms, stats = BACKEND.forward(logits, targets, spec)
    grad_terms = torch.ones(len(stats), 5 if spec.is_extended else 3, dtype=stats.dtype)
    BACKEND.gradient(grad_terms, logits, targets, stats, spec, torch.empty_like(logits))


def _labels(rows):
    return torch.zeros(rows, dtype=torch.int64)


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "options", "kernels"),
    [
        (5000, 1000, torch.float32, {}, ROW),
        (4, 1, torch.float32, {}, ROW),
        (8, 32128, torch.bfloat16, {}, SPLIT),
        (8, 32128, torch.float16, {"alpha": 1.5, "beta": 0.5}, TWICE),
        (8, 1000, torch.float64, {"alpha": 3.0, "ignore_index": 2**40}, ROW),
        (8, 1000, torch.bfloat16, {"sparsity": TopK(1)}, [*ROW, "topk_kernel"]),
        (8, 32128, torch.float32, {"sparsity": EntropyTopK()}, [*SPLIT, "topk_kernel"]),
        (8, 1000, torch.float64, {"label_smoothing": 0.1}, ROW),
        (8, 32128, torch.bfloat16, {"label_smoothing": 0.1, "sparsity": TopK(1)}, [*SPLIT, "topk_kernel"]),
        (8, 1000, torch.float32, {"lambda_z": 0.1, "lambda_sced": 0.0}, ROW),
    ],
)  # fmt: skip
def test_every_kernel_compiles_as_it_is_called(launches, rows, columns, dtype, options, kernels):
    _call(torch.zeros(rows, columns, dtype=dtype), _labels(rows), **options)
    assert [launch.kernel for launch in launches] == [*kernels, "gradient_kernel"]
    for launch in launches:
        integers = set(INTEGERS[KERNELS[launch.kernel]]) & launch.signature.keys()
        types = {name: launch.signature[name] for name in integers}
        assert set(types.values()) <= {"i32", "i64"}, types  # 1 and multiples of 16 are not specialized
        splits = launch.arguments.get("splits", 1) if launch.kernel != "combine_kernel" else 1
        programs = launch.arguments["count"] if launch.kernel == "topk_kernel" else rows * splits
        assert launch.grid == (programs, 1, 1)
        assert launch.max_registers == (tiling.SELECTION_REGISTERS if launch.kernel == "topk_kernel" else None)


@pytest.mark.parametrize("targets", ["labels", "valid_mask", "none"])
def test_arguments_are_those_of_the_rows(launches, targets):
    """Every address and stride that the kernels receive, for the rows of a shifted batch."""
    logits = torch.zeros(3, 6, 520)[:, :-1]
    chosen = {"labels": _labels(15), "valid_mask": torch.ones(15, dtype=torch.bool), "none": None}[targets]
    _call(logits, chosen, ignore_index=-7)
    one, two = launches
    assert (one.arguments["logits"].data_ptr(), two.arguments["logits"].data_ptr()) == (logits.data_ptr(),) * 2
    assert one.signature["targets"] == {"labels": "*i64", "valid_mask": "*u8", "none": "*fp32"}[targets]
    names = ("columns", "inner_rows", "outer_stride", "inner_stride", "vocab_size", "ignore_index")
    assert [one.arguments[name] for name in names] == [520, 5, 6 * 520, 520, 520, -7]
    strides = [two.arguments[name] for name in backward.STRIDES]
    assert strides == [6 * 520, 520, 5 * 520, 520, 3, 1]


def test_other_sizes_need_no_other_kernel(launches):
    """Other rows, columns and strides with the same configuration, including 1 and multiples of 16."""
    _call(torch.zeros(2, 3, 1008), _labels(6))
    compiled = [triton_driver.compilations(kernel) for kernel in INTEGERS]
    assert sum(compiled) == 2
    _call(torch.zeros(1, 5, 1004), _labels(5))
    _call(torch.zeros(4, 7, 1012)[:, ::2], _labels(16), ignore_index=1)
    assert [triton_driver.compilations(kernel) for kernel in INTEGERS] == compiled
    assert len(launches) == 6


def test_other_topk_specs_need_no_other_kernel(launches):
    logits, labels = torch.zeros(8, 1000), _labels(8)
    for policy in (EntropyTopK(), EntropyTopK(scale=0.5, k_min=3, k_max=16)):
        _call(logits, labels, sparsity=policy)
    assert triton_driver.compilations(select.topk_kernel) == 1
