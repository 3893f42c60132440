"""The default of every public argument, written out by hand, and the classes whose values cannot be changed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import caref_kernels
from caref_kernels import (
    CarefConfig,
    CarefOutput,
    EntropyTopK,
    SCEDLoss,
    TopK,
    VocabShard,
    config,
    fused_sced,
    keywords,
    sparsity,
)
from caref_kernels.config import HeadOptions, RowSpec

ROOT = Path(__file__).resolve().parents[1]
ROW = {"alpha": 2.0, "beta": 1.0, "sparsity": None, "vocab_size": None, "backend": "auto"}
WEIGHTS = {"lambda_sced": 0.1, "lambda_kl": 0.1, "lambda_z": 0.0, "label_smoothing": 0.0}
LOSS = {**ROW, **WEIGHTS, "ignore_index": -100, "shift": False, "reduction": "mean", "return_terms": False}
ITEMS = {"num_items": None}
TOKENS = {"token_weights": None}
SHARD = {"shard": None}
IN_PLACE = {"inplace_backward": False}
HEAD = {"logit_scale": 1.0, "softcap": None, "chunk_rows": None, "reduce_hidden_grad": True}
CORE = {
    "CarefConfig": {**LOSS, **IN_PLACE},
    "CarefConfig.row_spec": {},
    "CarefConfig.weights": {},
    "CarefLoss": {"config": None},
    "CarefLoss.forward": {**ITEMS, **TOKENS, **SHARD},
    "CarefOutput": {"accuracy": None, "num_kept": None, "lse": None, "z_loss": None, "uniform_ce": None},
    "EntropyTopK": {"scale": 1.0, "k_min": 1, "k_max": None},
    "EntropyTopK.top_k_spec": {},
    "LinearCarefLoss": {"config": None, **HEAD},
    "LinearCarefLoss.extra_repr": {},
    "LinearCarefLoss.forward": {"bias": None, **ITEMS, **TOKENS, **SHARD},
    "SCEDLoss": {"config": None},
    "SCEDLoss.forward": {"valid": None, **ITEMS},
    "TopK": {},
    "TopK.top_k_spec": {},
    "VocabShard": {},
    "VocabShard.gather": {"group": None, "device": "cpu"},
    "VocabShard.of_dtensor": {},
    "caref_loss": {**LOSS, **ITEMS, **TOKENS, **IN_PLACE, **SHARD},
    "explain": {"logits": None},
    "fused_sced": {**ROW, "valid": None, "reduction": "mean", **ITEMS, **IN_PLACE},
    "linear_caref_loss": {**LOSS, **ITEMS, **TOKENS, **HEAD, **SHARD, "bias": None},
}  # fmt: skip
APPLY = {"config": None, "fuse_head": False, "probe_batch": None}
TRANSFORMERS = {
    **dict.fromkeys(("apply_caref", "attach_caref"), APPLY),
    **dict.fromkeys(("PassTerms", "record_terms", "remove_caref"), {}),
}
COUNTING = {"count_items": {"shift": True, "averaged_over": 1, "group": None}}
SFT = {
    "CarefSFTTrainer": {"caref": None, "fuse_head": False},
    "CarefSFTTrainer.compute_loss": {"return_outputs": False, "num_items_in_batch": None},
}


def _defaults_of(name: str, value: object) -> dict[str, dict[str, tuple[type, object]]]:
    """The defaults of a function, or of a class and of the public methods that it defines itself."""
    found = {name: value}
    if isinstance(value, type):
        members = {key: getattr(value, key) for key in vars(value) if not key.startswith("_")}
        found |= {f"{name}.{key}": member for key, member in members.items() if inspect.isroutine(member)}
    return {
        key: {
            parameter.name: (type(parameter.default), parameter.default)
            for parameter in inspect.signature(member).parameters.values()
            if parameter.default is not parameter.empty
        }
        for key, member in found.items()
    }


def _defaults_in(module: object, names: list[str]) -> dict[str, dict[str, tuple[type, object]]]:
    found = {}
    for name in names:
        if callable(getattr(module, name)):
            found |= _defaults_of(name, getattr(module, name))
    return found


def _with_types(table: dict[str, dict[str, object]]) -> dict[str, dict[str, tuple[type, object]]]:
    """``table`` in a form in which 1, 1.0 and True are three values."""
    return {name: {key: (type(value), value) for key, value in row.items()} for name, row in table.items()}


def test_defaults_of_the_core():
    assert _defaults_in(caref_kernels, caref_kernels.__all__) == _with_types(CORE)


def test_defaults_of_internal_options():
    mask = {"k_scale": 0.0, "k_min": 0, "k_max": 0}
    row = {**mask, "with_z": False, "smoothed": 0}
    table = {"HeadOptions": HEAD, "RowSpec": row, "RowSpec.for_columns": {}}
    assert _defaults_in(config, ["HeadOptions", "RowSpec"]) == _with_types(table)
    assert _defaults_in(sparsity, ["TopKSpec"]) == _with_types({"TopKSpec": {"scale": 0.0, "k_min": 0, "k_max": 0}})


@pytest.mark.parametrize(
    ("module", "names", "table"),
    [
        ("integrations", None, COUNTING),
        ("integrations.transformers", None, TRANSFORMERS),
        ("integrations.trl", ["CarefSFTTrainer"], SFT),
    ],
    ids=["counting", "transformers", "trl"],
)
def test_defaults_of_the_integrations(module, names, table):
    pytest.importorskip("transformers" if table is TRANSFORMERS else "trl" if table is SFT else "torch")
    module = importlib.import_module(f"caref_kernels.{module}")
    assert _defaults_in(module, names or module.__all__) == _with_types(table)


OUTPUT = CarefOutput(*(torch.zeros(()) for _ in range(5)))
FROZEN = [
    CarefConfig(),
    HeadOptions(),
    TopK(3),
    EntropyTopK(),
    VocabShard(None, 0, 2, 5),
    OUTPUT,
    CarefConfig().row_spec(5),
]


@pytest.mark.parametrize("value", FROZEN, ids=lambda value: type(value).__name__)
def test_no_field_can_be_assigned(value):
    names = value._fields if isinstance(value, tuple) else [field.name for field in dataclasses.fields(value)]
    for name in names:
        with pytest.raises(AttributeError):
            setattr(value, name, getattr(value, name))


def test_every_dataclass_of_the_core_is_among_them():
    outer = {"integrations", "harness", "demo", "gpucheck", "testing"}
    modules = [module for name, module in sys.modules.items() if name.startswith("caref_kernels")]
    core = [module for module in modules if not outer & {*module.__name__.split(".")}]
    found = {value for module in core for value in vars(module).values() if dataclasses.is_dataclass(value)}
    own = {kind for kind in found if kind.__module__.startswith("caref_kernels")}
    assert own == {type(value) for value in FROZEN if not isinstance(value, tuple)}
    assert isinstance(FROZEN[-1], RowSpec)


@pytest.mark.parametrize("options", [{"lambda_sced": 0.0}, {"lambda_sced": 7.0, "lambda_kl": 3.0}], ids=str)
def test_weights_of_a_config_do_not_reach_the_sced_term(options):
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    assert fused_sced(logits) > 0
    assert torch.equal(SCEDLoss(CarefConfig(**options))(logits), fused_sced(logits))


# ----------------------------------------------------------------------------------------------------- type checkers


def _keywords(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def test_the_typed_keywords_are_those_of_the_signatures():
    fields = {field.name for field in dataclasses.fields(CarefConfig)}
    for typed, names in (
        (keywords.ConfigKeywords, fields),
        (keywords.ScedKeywords, fields - set(SCEDLoss._FIXED)),
        (keywords.LossKeywords, _keywords(caref_kernels.caref_loss) - {"return_terms"}),
        (keywords.LinearKeywords, _keywords(caref_kernels.linear_caref_loss) - {"return_terms"}),
    ):
        assert set(typed.__annotations__) == names, typed


SCRIPT = """
import torch
from torch import Tensor
from caref_kernels import CarefLoss, CarefOutput, EntropyTopK, LinearCarefLoss, SCEDLoss, TopK
from caref_kernels import caref_loss, fused_sced, linear_caref_loss

def step(logits: Tensor, weight: Tensor, labels: Tensor, verbose: bool) -> Tensor:
    out: CarefOutput = caref_loss(logits, labels, return_terms=True, sparsity=EntropyTopK(scale=0.5))
    head: CarefOutput = linear_caref_loss(logits, weight, labels, return_terms=True, softcap=30.0)
    either: Tensor | CarefOutput = caref_loss(logits, labels, return_terms=verbose)
    modules = (CarefLoss(alpha=3.0), LinearCarefLoss(lambda_z=1e-4, chunk_rows=64), SCEDLoss(sparsity=TopK(8)))
    print(out.ce.item(), head.kl.item(), either, modules)
    loss = caref_loss(logits, labels, label_smoothing=0.1, token_weights=torch.ones(4), shift=True)
    return loss + fused_sced(logits, beta=0.0) + linear_caref_loss(logits, weight, labels, num_items=7)
"""
# Lines that a type checker must refuse, each with a part of what mypy says.
MISTAKES = {
    "CarefLoss(lamda_z=2.0)": 'did you mean "lambda_z"',
    "LinearCarefLoss(chunk_row=64)": 'did you mean "chunk_rows"',
    "SCEDLoss(lambda_kl=0.1)": "Unexpected keyword argument",
    "caref_loss(torch.ones(2, 3), torch.ones(2), lamda_kl=1.0)": 'did you mean "lambda_kl"',
    "caref_loss(torch.ones(2, 3), torch.ones(2)).ce": 'has no attribute "ce"',
    "caref_loss(torch.ones(2, 3), torch.ones(2), reduction='avg')": "No overload variant",
}
# The package and torch have files of their own that are not the script's, and torch's backward has no types.
CHECKERS = {
    "mypy": ["-m", "mypy", "--strict", "--follow-imports=silent", "--untyped-calls-exclude=torch", "--no-color-output"],
    "basedpyright": ["-m", "basedpyright", "--level", "error", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_script_is_typed(checker, tmp_path):
    """Strict mypy, and pyright, accept what is right and refuse what is not."""
    pytest.importorskip(checker)
    (tmp_path / "right.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(SCRIPT + "\n".join(MISTAKES))
    paths = dict.fromkeys(("PYTHONPATH", "MYPYPATH"), str(ROOT))
    environment = {**os.environ, **paths, "MYPY_CACHE_DIR": str(tmp_path / "cache")}

    def run(name: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *CHECKERS[checker], name]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = run("right.py")
    assert done.returncode == 0, done.stdout + done.stderr
    found = run("wrong.py").stdout
    first = len(SCRIPT.splitlines()) + 1
    for line, message in enumerate(MISTAKES.values(), first):
        assert f"wrong.py:{line}:" in found, found
        assert checker != "mypy" or message in found
