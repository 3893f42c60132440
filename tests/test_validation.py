"""A table of wrong calls: every message names the argument, its value and the allowed range."""

from __future__ import annotations

import math
import pickle
import re

import pytest
import torch

from caref_kernels import (
    CarefConfig,
    CarefLoss,
    EntropyTopK,
    SCEDLoss,
    TopK,
    backends,
    caref_loss,
    explain,
    fused_sced,
)
from caref_kernels.config import HeadOptions

NAN, INF = math.nan, math.inf
LOGITS = torch.zeros(2, 5)
LABELS = torch.tensor([0, 1])


def _loss(**options):
    return lambda: caref_loss(LOGITS, LABELS, **{"backend": "reference", **options})


def _sced(**options):
    return lambda: fused_sced(LOGITS, **{"backend": "reference", **options})


def _logits(logits, labels=LABELS):
    return lambda: caref_loss(logits, labels, backend="reference")


def _labels(labels, logits=LOGITS):
    return lambda: caref_loss(logits, labels, backend="reference")


ALPHA = r"alpha must be in \[1, 16\]; got {}"
BETA = r"beta must be 0 or in \[0.1, 16\]; got {}"
NUMBER = r"must be a Python float or int; got {}"
ITEMS = "num_items must be 0, or finite and > 0 in float32; got "
# How to make each wrong call, what it raises, and the pattern of the message.
CALLS = [
    (_loss(alpha=0.5), ValueError, ALPHA.format("0.5") + r" \(for alpha < 1 the gradient is infinite"),
    (_sced(alpha=0.999), ValueError, ALPHA.format("0.999")),
    (_loss(alpha=NAN), ValueError, ALPHA.format("nan")),
    (_loss(alpha=INF), ValueError, ALPHA.format("inf")),
    (_loss(alpha=10**400), ValueError, ALPHA.format("10000")),
    (_loss(alpha=17), ValueError, ALPHA.format("17")),
    (_loss(alpha="2"), TypeError, "alpha " + NUMBER.format("'2'")),
    (_loss(alpha=True), TypeError, "alpha " + NUMBER.format("True")),
    (_loss(alpha=None), TypeError, "alpha " + NUMBER.format("None")),
    (_loss(beta=-1), ValueError, BETA.format("-1")),
    (_sced(beta=0.05), ValueError, BETA.format("0.05")),
    (_loss(beta=17.0), ValueError, BETA.format("17.0")),
    (_loss(beta=NAN), ValueError, BETA.format("nan")),
    (_loss(beta=1j), TypeError, "beta " + NUMBER.format("1j")),
    (_loss(alpha=torch.tensor(2.0)), TypeError, ".*gradients with respect to alpha are not provided"),
    (_loss(beta=torch.tensor(1.0, requires_grad=True)), TypeError, ".*with respect to beta are not provided"),
    (_loss(lambda_sced=-0.1), ValueError, "lambda_sced must be finite and >= 0; got -0.1"),
    (_loss(lambda_kl=-1), ValueError, "lambda_kl must be finite and >= 0; got -1"),
    (_loss(lambda_sced=NAN), ValueError, "lambda_sced must be finite and >= 0; got nan"),
    (_loss(lambda_kl=INF), ValueError, "lambda_kl must be finite and >= 0; got inf"),
    (_loss(lambda_kl="0"), TypeError, "lambda_kl " + NUMBER.format("'0'")),
    (lambda: TopK(0), ValueError, r"k must be in \[1, 2147483647\]; got 0"),
    (lambda: TopK(1.5), TypeError, "k must be an integer; got 1.5"),
    (lambda: TopK(True), TypeError, "k must be an integer; got True"),
    (lambda: EntropyTopK(scale=0), ValueError, "scale must be finite and > 0; got 0"),
    (lambda: EntropyTopK(scale=-1.0), ValueError, "scale must be finite and > 0; got -1.0"),
    (lambda: EntropyTopK(scale=INF), ValueError, "scale must be finite and > 0; got inf"),
    (lambda: EntropyTopK(scale=NAN), ValueError, "scale must be finite and > 0; got nan"),
    (lambda: EntropyTopK(scale="1"), TypeError, "scale must be a Python float or int; got '1'"),
    (lambda: EntropyTopK(k_min=0), ValueError, r"k_min must be in \[1, .*; got 0"),
    (lambda: EntropyTopK(k_min=2.0), TypeError, "k_min must be an integer; got 2.0"),
    (lambda: EntropyTopK(k_max=2**31), ValueError, r"k_max must be in \[1, 2147483647\]; got 2147483648"),
    (lambda: EntropyTopK(k_min=5, k_max=4), ValueError, "k_max must be None or at least k_min = 5; got 4"),
    (_loss(sparsity=5), TypeError, r"sparsity must be None, TopK\(k\) or EntropyTopK\(...\); got 5 of type int"),
    (_sced(sparsity="top"), TypeError, "sparsity must be None, .*; got 'top'"),
    (_loss(ignore_index=1.5), TypeError, "ignore_index must be an integer; got 1.5"),
    (_loss(ignore_index="x"), TypeError, "ignore_index must be an integer; got 'x'"),
    (_loss(ignore_index=2**63), ValueError, r"ignore_index must be in \[-9223372036854775808, .*; got 92233"),
    (_loss(ignore_index=True), TypeError, "ignore_index must be an integer; got True"),
    (_logits(torch.tensor(1.0)), ValueError, r"logits: expected shape \(..., V\).*got \(\)"),
    (_logits(torch.zeros(5)), ValueError, r"logits: expected shape .*got \(5,\)"),
    (_logits(torch.zeros(2, 0)), ValueError, r"logits: expected shape .*got \(2, 0\)"),
    (_logits(torch.zeros(1, 1).expand(2, 2**24 + 1)), ValueError, r".*V in \[1, 16777216\]; got \(2, 16777217\)"),
    (_logits([[0.0, 1.0]]), TypeError, "logits: expected a dense torch.Tensor; got .*list"),
    (_logits(torch.zeros(2, 5).numpy()), TypeError, "(?s)logits: expected a dense torch.Tensor; got .*ndarray"),
    (
        _logits(torch.zeros(2, 5).to_sparse()),
        TypeError,
        "logits: expected a dense torch.Tensor; got .*sparse_coo",
    ),
    (_logits(None), TypeError, "logits: expected a dense torch.Tensor; got None"),
    (_labels([0, 1]), TypeError, "labels: expected a torch.Tensor; got .*list"),
    (_sced(valid=[1, 0]), TypeError, "valid: expected a torch.Tensor; got .*list"),
    (
        _logits(torch.zeros(2, 5, dtype=torch.int64)),
        TypeError,
        ".*float16, bfloat16, float32, float64; got torch.int64",
    ),
    (_logits(torch.zeros(2, 5, dtype=torch.complex64)), TypeError, "logits: dtype must be one of .*complex64"),
    (_logits(torch.zeros(2, 5, dtype=torch.float8_e4m3fn)), TypeError, "logits: dtype must be .*float8_e4m3fn"),
    (_logits(torch.zeros(2, 5, dtype=torch.bool)), TypeError, "logits: dtype must be one of .*torch.bool"),
    (_labels(LABELS.to(torch.uint8)), TypeError, r"labels: .*class indices \(int32 or int64\); got torch.uint8"),
    (_labels(LABELS.to(torch.int16)), TypeError, "labels: .*class indices .*; got torch.int16"),
    (_labels(LABELS.float()), TypeError, "labels: .*class indices .*; got torch.float32"),
    (_labels(LABELS.bool()), TypeError, "labels: .*class indices .*; got torch.bool"),
    (_labels(LABELS.to(torch.complex64)), TypeError, "labels: .*class indices .*; got torch.complex64"),
    (_labels(torch.zeros(2, 5, requires_grad=True)), TypeError, "labels: .*class indices .*; got torch.float32"),
    (_sced(valid=torch.ones(2)), TypeError, "valid: expected a bool or integer mask; got torch.float32"),
    (_labels(LABELS.to("meta")), ValueError, "labels: on meta, but logits are on cpu"),
    (
        _sced(valid=torch.ones(2, dtype=torch.bool, device="meta")),
        ValueError,
        "valid: on meta, but logits are on cpu",
    ),
    (
        _labels(torch.zeros(3, dtype=torch.long)),
        ValueError,
        r"labels: expected shape \(2,\).*\(2, 5\); got \(3,\)",
    ),
    (_labels(LABELS.view(2, 1)), ValueError, r"labels: expected shape \(2,\) .*got \(2, 1\)"),
    (
        _labels(LABELS.view(1, 2), torch.zeros(2, 1, 5)),
        ValueError,
        r"labels: expected shape \(2, 1\).*got \(1, 2\)",
    ),
    (_sced(valid=torch.ones(5, dtype=torch.bool)), ValueError, r"valid: expected shape \(2,\).*got \(5,\)"),
    (_loss(vocab_size=0), ValueError, r"vocab_size must be in \[1, .*got 0"),
    (_loss(vocab_size=-1), ValueError, r"vocab_size must be in \[1, .*got -1"),
    (_loss(vocab_size=1.5), TypeError, "vocab_size must be an integer; got 1.5"),
    (_sced(vocab_size=51), ValueError, r"vocab_size must be in .*\[1, 50\] for logits of 5 columns; got 51"),
    (_loss(reduction="avg"), ValueError, "reduction must be one of 'mean', 'sum', 'none'; got 'avg'"),
    (_loss(reduction="Mean"), ValueError, "reduction must be one of 'mean', 'sum', 'none'; got 'Mean'"),
    (_sced(reduction=None), ValueError, "reduction must be one of 'mean', 'sum', 'none'; got None"),
    (_loss(num_items=0), ValueError, "num_items must be > 0 where there are valid rows; got 0 for 2 valid rows"),
    (_loss(num_items=-2.0), ValueError, ITEMS + "-2.0"),
    (_loss(num_items=INF), ValueError, ITEMS + "inf"),
    (_loss(num_items=torch.tensor(NAN)), ValueError, ITEMS + "nan"),
    (_loss(num_items=torch.tensor(0)), ValueError, r"num_items must be > 0 .*; got tensor\(0\) for 2 valid rows"),
    (_loss(num_items=1e39), ValueError, ITEMS + r"1e\+39"),
    (_loss(num_items=10**400), ValueError, ITEMS + "10000"),
    (_loss(num_items=1e-60), ValueError, ITEMS + "1e-60"),
    (_loss(num_items=torch.ones(1)), ValueError, r"num_items: expected a real 0-D tensor; got .*\(1,\)"),
    (_loss(num_items=torch.tensor(2.0, device="meta")), ValueError, "num_items: on meta, but logits are on cpu"),
    (_loss(num_items="7"), TypeError, "num_items: expected a number or a 0-D tensor; got '7'"),
    (_loss(num_items=True), TypeError, "num_items: expected a number or a 0-D tensor; got True"),
    (
        _loss(num_items=4, reduction="sum"),
        ValueError,
        "num_items replaces the divisor of reduction='mean'.*'sum'",
    ),
    (_sced(num_items=4, reduction="none"), ValueError, "num_items replaces .*reduction='none'"),
    (_loss(gamma=1.0), TypeError, ".*gamma"),
    (lambda: caref_loss(LOGITS, LABELS, 2.0), TypeError, ".*positional"),
    (lambda: fused_sced(LOGITS, None), TypeError, ".*positional"),
    (_loss(backend="gpu"), ValueError, "backend must be 'auto' or one of .*'reference'; got 'gpu'"),
    (_loss(backend=3), TypeError, "backend must be a string; got 3"),
    (_loss(backend=None), TypeError, "backend must be a string; got None"),
    (_loss(inplace_backward=1), TypeError, "inplace_backward must be True or False; got 1"),
    (_loss(return_terms="yes"), TypeError, "return_terms must be True or False; got 'yes'"),
    (lambda: CarefConfig(2.0), TypeError, ".*positional"),
    (lambda: CarefLoss(CarefConfig(), alpha=2.0), TypeError, r".*not both; got \['alpha'\]"),
    (lambda: CarefLoss({"alpha": 2.0}), TypeError, r"config must be a CarefConfig; got \{'alpha': 2.0\}"),
    *(
        (lambda name=name: SCEDLoss(**{name: 0.1}), TypeError, f"SCEDLoss has no option '{name}'; it is the SCED term")
        for name in ("lambda_sced", "lambda_kl", "ignore_index", "return_terms")
    ),
    (lambda: EntropyTopK(1.0), TypeError, ".*positional"),
    (lambda: HeadOptions(1.0), TypeError, ".*positional"),
    (lambda: CarefLoss(alpha=0.5), ValueError, ALPHA.format("0.5")),
]


@pytest.mark.parametrize(("call", "error", "pattern"), [pytest.param(*row, id=str(i)) for i, row in enumerate(CALLS)])
def test_wrong_call_names_argument_value_and_range(call, error, pattern):
    with pytest.raises(error, match=pattern) as caught:
        call()
    assert caught.type is error
    assert re.match(pattern, str(caught.value)), "the message begins with the name of the argument"


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_logits_are_refused(layout):
    nested = torch.nested.nested_tensor([torch.zeros(2, 5), torch.zeros(1, 5)], layout=layout)
    with pytest.raises(TypeError, match="logits: expected a dense torch.Tensor"):
        caref_loss(nested, LABELS, backend="reference")


def test_boundaries_are_allowed(backend):
    for options in (
        {"alpha": 1}, {"alpha": 16.0}, {"beta": 0}, {"beta": 0.1}, {"beta": 16}, {"lambda_sced": 0}, {"lambda_kl": 1e6},
        {"vocab_size": 1}, {"vocab_size": 50}, {"ignore_index": -(2**63)}, {"ignore_index": 2**63 - 1},
        {"num_items": 1e-3}, {"num_items": torch.tensor(3)},
    ):  # fmt: skip
        assert torch.isfinite(caref_loss(LOGITS, LABELS, backend=backend, **options)), options


def test_boundaries_of_other_options_are_allowed():
    most, tiny, huge = 2**31 - 1, 2.0**-126, 2.0**127
    assert (TopK(1).k, TopK(most).k, EntropyTopK(k_min=most, k_max=most).k_max) == (1, most, most)
    assert [HeadOptions(logit_scale=factor).logit_scale for factor in (tiny, huge)] == [tiny, huge]
    assert HeadOptions(softcap=huge, logit_scale=huge, chunk_rows=1).chunk_rows == 1


def test_backend_that_cannot_run_is_an_error():
    """An explicit choice that cannot run raises with its reason and the backends that could; nothing falls back."""
    meta = torch.zeros(2, 5, device="meta")
    for name in backends.ORDER:
        reason = backends.get(name).unsupported(meta)
        if reason is not None:
            with pytest.raises(
                NotImplementedError, match=f"backend '{name}' cannot run: .*available here: .*reference"
            ):
                fused_sced(meta, backend=name)


def test_explain_names_every_backend_and_reason(capsys):
    meta = torch.zeros(2, 5, device="meta")
    text = explain(meta)
    assert capsys.readouterr().out == text + "\n"
    for name in backends.ORDER:
        reason = backends.get(name).unsupported(meta)
        line = next(line for line in text.splitlines() if line.split()[0] == name)
        assert (reason or "runs") in line
    assert "float32 logits on cpu" in explain()


def test_explain_names_the_backend_of_sharded_rows(monkeypatch):
    for name in ("reference", "cpu"):
        monkeypatch.setattr(backends, "_default_choice", name)
        own = hasattr(backends.get(name), "sums")
        runs = backends.get(name).unsupported(LOGITS) is None
        line = f"rows of a sharded vocabulary are summed by reference: {name} has no kernels for them"
        assert (line in explain(LOGITS)) == (runs and not own)


def test_auto_takes_the_first_that_runs():
    first = next(name for name in backends.ORDER if backends.get(name).unsupported(LOGITS) is None)
    if first == "reference":
        pytest.skip("no fused backend runs here")
    assert backends.select("auto", LOGITS) == first
    assert torch.equal(caref_loss(LOGITS, LABELS), caref_loss(LOGITS, LABELS, backend=first))


IN_PLACE = "leaf", "expanded", "strided columns", "4-D that does not collapse", "negative bit", "imaginary part"


@pytest.mark.parametrize("name", IN_PLACE)
def test_inplace_backward_where_it_cannot_is_refused(backend, name):
    base = torch.zeros(2, 3, 4, 10, requires_grad=True)
    pairs = torch.zeros(4, 10, dtype=torch.complex64)
    logits, pattern = {
        "leaf": (torch.zeros(2, 5, requires_grad=True), "would overwrite a leaf that requires grad"),
        "expanded": ((base * 1)[:1, 0, 0].expand(6, 10), r"share no memory .*shape \(6, 10\) with strides \(0, 1\)"),
        "strided columns": ((base * 1)[0, 0, :, ::2], r"rows can be written where they lie .*strides \(10, 2\)"),
        "4-D that does not collapse": ((base * 1).permute(2, 0, 1, 3), "rows can be written where they lie"),
        "negative bit": (torch._neg_view((base * 1)[0, 0]), r"negates its memory .*pass logits.resolve_neg\(\)"),
        "imaginary part": (pairs.conj().imag, r"negates its memory .*pass logits.resolve_neg\(\)"),
    }[name]
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long)
    with pytest.raises(ValueError, match="inplace_backward=True .*" + pattern):
        caref_loss(logits, labels, inplace_backward=True, backend=backend)


def test_config_is_immutable_and_picklable():
    config = CarefConfig(alpha=1.5, vocab_size=7)
    with pytest.raises(AttributeError):
        config.alpha = 3.0
    assert pickle.loads(pickle.dumps(config)) == config
    assert pickle.loads(pickle.dumps(CarefLoss(config))).config == config
