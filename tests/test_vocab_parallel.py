"""The losses of a sharded vocabulary over gloo, on 2, 3 and 4 processes; each start runs every check."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from caref_kernels import TopK, VocabShard, caref_loss, linear_caref_loss
from caref_kernels.testing import check_identity, make_case

SHARD = VocabShard(None, 0, 5, 5)
pytest.importorskip("torch.distributed")
ranks = pytest.importorskip("ranks", reason="needs torch built with distributed")
gloo_ranks = pytest.importorskip("gloo_ranks", reason="needs torch built with distributed")
dtensor_ranks = pytest.importorskip("dtensor_ranks", reason="needs torch built with distributed")


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes(world, tmp_path):
    ranks.start(gloo_ranks.run, world, tmp_path)


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_said_about_a_dtensor_works(world, tmp_path):
    ranks.start(dtensor_ranks.run, world, tmp_path)


def test_without_process_group():
    for call in (
        lambda: caref_loss(torch.zeros(2, 5), torch.tensor([0, 1]), shard=SHARD),
        lambda: linear_caref_loss(torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 1]), shard=SHARD),
        lambda: VocabShard.gather(5),
    ):
        with pytest.raises(RuntimeError, match=r"needs torch.distributed: call torch.distributed.init_process_group"):
            call()


@pytest.mark.parametrize("fields", [(-1, 2, 5), (4, 2, 5), (0, 0, 0), (0, 1, 2**24 + 1)])
def test_a_shard_lies_inside_the_vocabulary(fields):
    with pytest.raises(ValueError, match=r"first_column, columns and total must describe columns inside \[0, total\)"):
        VocabShard(None, *fields)


SHARDED_CALLS = {
    "logits": lambda: caref_loss(torch.zeros(2, 5), torch.tensor([0, 1]), shard=SHARD),
    "head": lambda: linear_caref_loss(torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 1]), shard=SHARD),
}


@pytest.mark.parametrize("call", SHARDED_CALLS.values(), ids=SHARDED_CALLS)
def test_not_inside_compile(call):
    torch._dynamo.reset()
    with pytest.raises(Exception, match="shard must be None inside torch.compile"):
        torch.compile(call, fullgraph=True, backend="eager")()
    torch._dynamo.reset()


@pytest.fixture
def _group_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Every option with another value than its default.
OPTIONS = [
    {"alpha": 3.0},
    {"beta": 2.0},
    {"lambda_sced": 0.7},
    {"lambda_kl": 0.7},
    {"lambda_z": 0.1},
    {"label_smoothing": 0.1},
    {"sparsity": TopK(3)},
    {"ignore_index": 1},
    {"shift": True},
    {"token_weights": torch.arange(5.0)},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"num_items": 7.5},
    {"vocab_size": 90},
]
HEAD_OPTIONS = [*OPTIONS, {"logit_scale": 0.5}, {"softcap": 2.0}, {"chunk_rows": 2}]


def _check_option(sharded, whole, options):
    for terms in (False, True):
        actual, expected = (function(**options, return_terms=terms) for function in (sharded, whole))
        for one, other in zip(actual[:5] if terms else [actual], expected[:5] if terms else [expected], strict=True):
            check_identity(one, other, "float32_terms", str(options))
    default = whole(return_terms=True)
    changed = [not torch.equal(one, other) for one, other in zip(default[:5], expected[:5], strict=True)]
    assert any(changed) or "chunk_rows" in options, "the option changes nothing, so this test would not notice its loss"


@pytest.mark.usefixtures("_group_of_one")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_reaches_the_loss_of_sharded_logits(options):
    logits, labels = make_case("normal_1", 5, 30, seed=4).logits, torch.tensor([0, 3, 29, 1, 7])
    shard = VocabShard(None, 0, 30, 30)
    sharded = partial(caref_loss, logits, labels, shard=shard)
    _check_option(sharded, partial(caref_loss, logits, labels, backend="reference"), options)


@pytest.mark.usefixtures("_group_of_one")
@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
def test_every_option_reaches_the_loss_of_a_sharded_head(options):
    weight, labels = torch.randn(30, 6, generator=torch.Generator().manual_seed(4)), torch.tensor([0, 3, 29, 1, 7])
    hidden, shard = weight[5:10] + 1, VocabShard(None, 0, 30, 30)
    sharded = partial(linear_caref_loss, hidden, weight, labels, shard=shard)
    _check_option(sharded, partial(linear_caref_loss, hidden, weight, labels, backend="reference"), options)
