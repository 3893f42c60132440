"""The losses of a sharded vocabulary over gloo, on 2, 3 and 4 processes; one start of each does every check."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from caref_kernels import VocabShard, caref_loss, linear_caref_loss

SHARD = VocabShard(None, 0, 5, 5)
pytest.importorskip("torch.distributed")
gloo_ranks = pytest.importorskip("gloo_ranks", reason="needs torch built with distributed")
dtensor_ranks = pytest.importorskip("dtensor_ranks", reason="needs torch built with distributed")


@pytest.fixture(scope="module")
def _server():
    """A process that has imported everything, from which the ranks are forked: they start in milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["gloo_ranks", "dtensor_ranks"])
        yield


def _start(run, world, folder):
    context = torch.multiprocessing.start_processes(
        run,
        args=(world, str(folder / "store")),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    while not context.join(timeout=120):
        pass


@pytest.mark.usefixtures("_server")
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes(world, tmp_path):
    _start(gloo_ranks.run, world, tmp_path)


@pytest.mark.usefixtures("_server")
@pytest.mark.parametrize("world", [2, 4])
def test_what_is_said_about_a_dtensor_works(world, tmp_path):
    _start(dtensor_ranks.run, world, tmp_path)


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


def test_not_inside_compile():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="shard must be None inside torch.compile"):
        torch.compile(caref_loss, fullgraph=True, backend="eager")(torch.zeros(2, 5), torch.tensor([0, 1]), shard=SHARD)
    torch._dynamo.reset()
