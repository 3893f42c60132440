"""``apply_caref`` under DDP, FSDP2, tensor parallelism and a Trainer: two processes, against float64 on one."""

from __future__ import annotations

import pytest
import ranks

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("peft")

import model_loss_ranks  # after the guards above


def test_two_processes(tmp_path):
    ranks.start(model_loss_ranks.run, 2, tmp_path)
