"""Values against float64 at a language model's sizes and for random calls, between guard zones; mixed precision."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from caref_kernels import caref_loss
from caref_kernels.testing import REGIMES, check_evaluation, check_identity, evaluate, evaluate_eager, oracle

from .faults import notices

# Every pair with a one-pass expansion, and of the others a whole and a real one.
EXPONENTS = ((2.0, 1.0), (2.0, 0.0), (2.0, 2.0), (4.0, 0.0), (4.0, 1.0), (4.0, 2.0), (1.0, 1.0), (1.5, 0.5))
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
# Few rows, which several programs share; several warps a row; one warp a row.  T5, Llama 3, Gemma.
SHAPES = ((24, 33), (24, 1000), (24, 32_128), (24, 128_256), (24, 262_144), (300, 4097), (4096, 32_128))
# Their gradients have looser tolerances, exponent by exponent, in test_numerics.py.
NOT_RANDOM = ("near_uniform", "confident_1e-12")
SEEDS_PER_TEST = 8


def check_values(target, guard_zones, logits: Tensor, labels: Tensor, parts=("loss", "sced"), **options) -> None:
    """Every row within the tolerances of :mod:`caref_kernels.testing`, and no access outside the tensors."""
    guarded = guard_zones.constant(logits), guard_zones.constant(labels)
    with guard_zones.watch():
        actual = evaluate(*guarded, parts, backend=target.backend, **options)
    eager = evaluate_eager(logits, labels, parts, **options)
    check_evaluation(actual, oracle(logits, labels, parts, **options), eager)


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(*shape, dtype) for shape in SHAPES for dtype in (DTYPES if shape in SHAPES[:4] else DTYPES[:2])],
    ids=str,
)
def test_language_model_sizes(target, guard_zones, rows, columns, dtype):
    """Beyond 64 the drawn rows are repeated."""
    if target.small:
        rows, columns = min(rows, 100), min(columns, 1000)
    logits, labels = target.case("lm_like", min(rows, 64), columns, dtype, ignored=2)
    repeats = -(-rows // 64)
    check_values(target, guard_zones, logits.repeat(repeats, 1)[:rows], labels.repeat(repeats)[:rows])


@pytest.mark.parametrize("fault", ["TailDropped", "StrayWrite", "Unwritten", "InputChanged", "AuxiliaryDropped"])
def test_injected_faults_are_noticed(target, guard_zones):
    check_values(target, guard_zones, *target.case("normal_1", 3, 33, torch.float32))


@pytest.mark.parametrize("first", range(0, 16 * SEEDS_PER_TEST, SEEDS_PER_TEST))
def test_random_calls(target, guard_zones, first):
    """The message of a failure names the seed, which gives the call again."""
    for seed in range(first, first + (2 if target.small else SEEDS_PER_TEST)):
        chance = random.Random(seed)
        columns = chance.choice((chance.randint(1, 300), chance.randint(1, 5000), 8 * chance.randint(1, 4000)))
        rows, dtype = chance.choice((1, 2, 7, 24, 60)), chance.choice(DTYPES)
        alpha, beta = chance.choice(EXPONENTS)
        regime = chance.choice([name for name in REGIMES if name not in NOT_RANDOM])
        logits, labels = target.case(regime, rows, columns, dtype, seed=seed, ignored=min(1, rows - 1))
        try:
            check_values(target, guard_zones, logits, labels, alpha=alpha, beta=beta)
        except AssertionError as error:
            call = f"{regime} {rows} x {columns} {dtype} alpha={alpha} beta={beta}"
            raise AssertionError(f"seed {seed}, {call}: {error}") from error


@notices("IncomingIgnored")
def test_float16_with_a_loss_scale(target):
    """A head under autocast and a gradient scaler: the steps of float32, and an overflow skips one."""
    torch.manual_seed(0)
    columns = 33 if target.small else 4097
    head, exact = (torch.nn.Linear(64, columns, device=target.device) for _ in range(2))
    exact.load_state_dict(head.state_dict())
    optimizers = [torch.optim.SGD(one.parameters(), lr=1.0) for one in (head, exact)]
    kind = torch.device(target.device).type
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**10)
    hidden = torch.randn(32, 64, device=target.device)
    labels = torch.randint(columns, (32,), device=target.device)

    def scaled_step(factor: float) -> None:
        with torch.autocast(kind, dtype=torch.float16):
            logits = head(hidden)
        loss = caref_loss(logits, labels, backend=target.backend)
        scaler.scale(loss * factor).backward()
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[0].zero_grad()

    for _ in range(3):
        scaled_step(1.0)
        caref_loss(exact(hidden), labels, backend="reference").backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    check_identity(head.weight.detach(), exact.weight.detach(), "bfloat16_gradient", "weights after three steps")
    before, scale = head.weight.detach().clone(), scaler.get_scale()
    scaled_step(float("inf"))
    assert torch.equal(head.weight.detach(), before)
    assert scaler.get_scale() < scale
