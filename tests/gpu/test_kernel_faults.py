"""Faults in the source of the Triton kernels, compiled for this GPU: the tests of each mutant must notice it."""

from __future__ import annotations

import os

import pytest
from mutants.runner import Tree, select


@pytest.mark.parametrize("name", ["t-tail-loaded", "t-offset-32-bits", "t-label-unchecked"])
def test_fault_in_a_kernel_is_noticed(name, request, runnable, tmp_path):
    """A test fails, or the device reports an illegal access; the suite runs the same tests without the fault."""
    fake = request.config.getoption("--fake-device")
    if fake and name != "t-offset-32-bits":
        pytest.skip("make mutants tries it, as all others, under Triton's interpreter")
    if fake:
        pytest.importorskip("triton")
    else:
        runnable("triton")
    (mutant,) = select([name])
    tree = Tree(tmp_path, CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    tree.apply(mutant)
    code, output = tree.test(mutant.arguments(), interpreted=fake)
    assert (code == 1 and "FAILED tests" in output) or code < 0 or "illegal memory access" in output, output[-600:]
