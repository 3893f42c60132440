"""``apply_caref`` under DDP, FSDP2, tensor parallelism and a Trainer: two processes, against float64 on one."""

from __future__ import annotations

import pytest
import torch.multiprocessing

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("peft")

import model_loss_ranks  # noqa: E402 - after the guards above


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(model_loss_ranks.run, (2, str(tmp_path / "store")), nprocs=2)
