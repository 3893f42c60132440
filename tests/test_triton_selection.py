"""The top-k selection of the Triton kernels: keys, launch configurations, and rows that the lists cannot hold."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from caref_kernels import CarefConfig, EntropyTopK, TopK, objective, ops, sparsity  # noqa: E402
from caref_kernels.backends import triton as package  # noqa: E402
from caref_kernels.backends.triton import select, tiling  # noqa: E402
from caref_kernels.testing import check_evaluation, evaluate, make_case, oracle_given  # noqa: E402

DEVICE = "cpu" if triton_interpreter.ACTIVE else "cuda"
pytestmark = pytest.mark.skipif(
    not triton_interpreter.ACTIVE and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)
H200 = tiling.Device(multiprocessors=132, warp_size=32)


@triton.jit
def _round_trip_kernel(values, keys, back, N: tl.constexpr, SELECT: tl.constexpr):
    for index in range(N):
        key = select.key_of(tl.load(values + index), SELECT)
        tl.store(keys + index, key)
        tl.store(back + index, select.value_of(key, values.dtype.element_ty, SELECT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_keys_triton(dtype):
    """Keys have the order of the values, -0.0 and 0.0 have the same key, and value_of is the inverse."""
    generator = torch.Generator().manual_seed(0)
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, info.tiny, -info.tiny, info.tiny / 2, info.max, info.min], dtype=torch.float64)
    values = torch.cat((special, torch.randn(57, generator=generator, dtype=torch.float64) * 9)).to(dtype)
    values = values.to(objective.accumulation_dtype(dtype)).sort().values
    storage = tiling.Storage(dtype.itemsize, True, dtype == torch.bfloat16)
    sizes = tiling.selection_config(1, True, storage, package.INTERPRETER).selection
    keys, back = torch.empty(64, dtype=torch.int64), torch.empty_like(values)
    keys, back = keys.to(DEVICE), back.to(DEVICE)
    _round_trip_kernel[(1,)](values.to(DEVICE), keys, back, 64, sizes)
    assert torch.equal(back.cpu(), values)
    assert torch.equal(keys[1:].cpu() > keys[:-1].cpu(), values[1:] > values[:-1])
    assert keys.abs().max() < sizes.infinity


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("rows", [1, 1000, 10**6])
def test_selection_configs_triton(itemsize, one_pass, rows):
    """The lists of all programs take at most 70 MB, and each list has memory for the columns of one tile more."""
    storage = tiling.Storage(itemsize, True, itemsize == 2)
    tile, sizes, programs, registers = tiling.selection_config(rows, one_pass, storage, H200)
    assert sizes.slots == tile.threads * tile.lanes
    assert sizes.room == sizes.depth + tile.columns // sizes.slots
    assert sizes.depth & (sizes.depth - 1) == 0
    assert 1 <= programs <= rows
    assert programs * sizes.slots * sizes.room * itemsize <= 70e6
    assert registers is None or registers * tile.threads * tiling.SELECTION_PROGRAMS <= 65_536


@pytest.fixture
def short_lists(monkeypatch):
    """Use sizes with which rows of 700 columns are sampled, overflow the lists and are searched."""
    for name, value in {"MAX_LISTED": 320, "LIST_DEPTH": 1, "SAMPLE_CHUNKS": 8, "SAMPLE_CHUNK": 8}.items():
        monkeypatch.setattr(tiling, name, value)


@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 12, 90, 400, 700])
def test_lists_that_are_too_short_triton(dtype, k):
    """The mask equals that of a sort if the row is sampled, listed, overflows the lists, or is searched."""
    columns = torch.arange(700)
    logits = torch.stack(
        [
            make_case("normal_3", 1, 700, seed=1).logits[0],
            make_case("normal_1", 1, 700, seed=2).logits[0],
            (columns % 7).float(),
            torch.where(columns < 30, 9.0 + columns / 32, columns / 1024),  # one thread has all large columns
            torch.where(columns % 2 == 0, columns / 64, -torch.inf),
            torch.where(columns % 87 < 8, 5.0 + columns / 256, columns / 1024 - 20),  # the sample misses the small ones
        ]
    ).to(dtype)
    spec = CarefConfig(sparsity=TopK(k), return_terms=True).row_spec(700)
    _, stats = ops.forward(logits.to(DEVICE), None, spec, "triton")
    values = logits.to(objective.accumulation_dtype(dtype))
    exact = sparsity.top_k_mask(values, torch.full((len(values), 1), k)).statistics()
    assert torch.equal(stats[:, len(objective.STATISTICS) :].cpu(), exact)


@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (1.5, 0.5)])
def test_values_of_searched_rows_triton(alpha, beta):
    case = make_case("normal_1", 2, 700, seed=3)
    actual = evaluate(
        case.logits.to(DEVICE), case.labels.to(DEVICE), sparsity=EntropyTopK(), alpha=alpha, beta=beta, backend="triton"
    )
    spec = CarefConfig(sparsity=EntropyTopK(), return_terms=True).row_spec(700)
    num_kept = ops.forward(case.logits.to(DEVICE), None, spec, "triton")[1][:, len(objective.STATISTICS)]
    assert num_kept.min() > 300
    check_evaluation(actual, oracle_given(num_kept.cpu(), *case, alpha=alpha, beta=beta))


def test_more_rows_than_programs_triton(monkeypatch):
    """Programs take rows in turn and reuse their lists; results equal those with one program per row."""
    logits = make_case("normal_3", 9, 300, seed=4).logits.to(DEVICE)
    spec = CarefConfig(sparsity=EntropyTopK(), return_terms=True).row_spec(300)
    many = ops.forward(logits, None, spec, "triton")
    config = tiling.selection_config
    monkeypatch.setattr(tiling, "selection_config", lambda *shape: config(*shape)._replace(programs=2))
    assert all(torch.equal(a, b) for a, b in zip(ops.forward(logits, None, spec, "triton"), many, strict=True))
