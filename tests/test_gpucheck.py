"""Triton kernels compiled ahead of time, without a GPU: their machine code keeps the budgets of tiling.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import triton_interpreter

from caref_kernels.gpucheck import __main__ as command
from caref_kernels.gpucheck import aot, machine_code

if triton_interpreter.ACTIVE:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

DEFAULT = aot.Variant("row", "bfloat16", aot.DEFAULT, 90)
# The default path in the dtypes of training on each architecture, one kernel of every other kind on one.
CHOSEN = [
    *(
        aot.Variant(kernel, dtype, aot.DEFAULT, architecture)
        for kernel in ("row", "gradient")
        for dtype in ("bfloat16", "float32")
        for architecture in aot.ARCHITECTURES
    ),
    *(aot.Variant(kernel, "bfloat16", (1.5, 0.5), 90) for kernel in ("row", "second", "gradient")),
    *(aot.Variant(kernel, "bfloat16", (2, 1), 90, wide=False) for kernel in ("row", "gradient")),
    *(aot.Variant(kernel, "float16", (4, 2), 90, targets="valid_mask") for kernel in ("row", "gradient")),
    *(aot.Variant(kernel, "float64", None, 90, targets="none") for kernel in ("row", "gradient")),
    aot.Variant("partial", "bfloat16", (2, 1), 90),
    aot.Variant("combine", "bfloat16", (2, 1), 90),
]


@pytest.mark.parametrize("variant", CHOSEN, ids=str)
def test_budgets(variant):
    """No spill, no stack, 16-byte loads, registers and instructions per column."""
    result = aot.check(variant)
    assert not result.failures, f"{variant}: {'; '.join(result.failures)}"


def test_default_path_beats_the_first_budget():
    """24 instructions per column forward and 19 backward were asked for."""
    for kernel, most in (("row", 24), ("gradient", 19)):
        assert aot.tiling.instruction_limit(kernel, "bfloat16", aot.path(DEFAULT), True) < most


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @P0  BRA `(.L_x_2) ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/                   FADD R4, R4, R5 ;
.L_x_2:
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""


def test_a_turn_is_the_shortest_way_round():
    loops = list(machine_code._loops(*machine_code._parse(LISTING)))
    assert [loop.turn for loop in loops] == [("LDG.E.128", "BRA", "MUFU.EX2", "BRA")]
    code = machine_code.MachineCode(32, 0, 0, 0, tuple(loops))
    assert code.main_loops() == tuple(loops)
    assert loops[0].count("LDG", "MUFU") == 2


def test_spills_in_a_loop_are_told_apart():
    """One before the loop is stored once per program; one in it costs every turn."""
    spill = "        /*0000*/                   STL [R1], R4 ;\n"
    for listing, expected in (
        (LISTING, (0, 0)),
        (spill + LISTING, (1, 0)),
        (LISTING.replace(".L_x_2:\n", ".L_x_2:\n" + spill), (1, 1)),
    ):
        labels, instructions = machine_code._parse(listing)
        assert machine_code._spills(instructions, tuple(machine_code._loops(labels, instructions))) == expected


def test_spills_of_a_loop_over_rows_count_once_a_row():
    """Around two loops over columns; around one it is a loop over columns itself."""
    turn = "{0}:\n        /*0000*/ LDG.E R4, [R2.64] ;\n        /*0010*/ @P0 BRA `({0}) ;\n"
    spill, again = "        /*0020*/ LDL R0, [R1] ;\n", "        /*0030*/ @P1 BRA `(.L_x_0) ;\n"
    one, other = turn.format(".L_x_1"), turn.format(".L_x_2")
    for listing, looped in (
        (one + spill + other, 0),
        (one + spill, 1),
        (one.replace("LDG", "FADD") + other + spill, 1),
    ):
        labels, instructions = machine_code._parse(".L_x_0:\n" + listing + again)
        loops = tuple(machine_code._loops(labels, instructions))
        assert machine_code._spills(instructions, loops) == (1, looped)


def test_a_budget_that_is_exceeded_is_reported(monkeypatch):
    monkeypatch.setattr(aot.tiling, "instruction_limit", lambda *arguments: 10.0)
    monkeypatch.setattr(aot.tiling, "register_limit", lambda dtype, path: 16)
    failures = "; ".join(aot.check(DEFAULT).failures)
    assert "instructions per column, budget 10" in failures
    assert "registers, budget 16" in failures


def test_command_line(capsys):
    assert command.main(["--aot", "--arch", "90", "--only", "combine bfloat16 (2,1)", "--jobs", "1"]) == 0
    text = capsys.readouterr().out
    assert "1 of 1 within their budgets" in text
    assert "combine bfloat16 (2,1) wide labels sm_90" in text


def test_module_runs_as_a_command():
    run = subprocess.run(
        [sys.executable, "-m", "caref_kernels.gpucheck", "--help"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True,
    )  # fmt: skip
    assert "--aot" in run.stdout
