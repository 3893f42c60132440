"""Start the processes of a test over gloo, forked from one that has imported torch.

A forked process leaves without the interpreter's finalization, which may end in an abort while torch's threads run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

PRELOADED = ["ranks", "gloo_ranks", "dtensor_ranks"]


def start(checks: Callable[[int, int, Path], None], world: int, folder: Path) -> None:
    """Run ``checks(rank, world, folder)`` in ``world`` processes; an error in one of them is raised here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        torch.multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        context = torch.multiprocessing.start_processes(
            _run, args=(checks, world, folder), nprocs=world, join=False, start_method="forkserver"
        )
    while not context.join(timeout=120):
        pass


def _run(rank: int, checks: Callable[[int, int, Path], None], world: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    try:
        checks(rank, world, folder)
    finally:
        dist.destroy_process_group()
