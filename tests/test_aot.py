"""Triton kernels compiled ahead of time, without a GPU: their machine code keeps the limits of tools/limits.py."""

from __future__ import annotations

import pytest
import triton_interpreter

from tools import aot, sass

if triton_interpreter.ACTIVE:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

DEFAULT = aot.Kernel("row", "bfloat16", aot.DEFAULT, 90)
# The default exponents in the dtypes of training on each architecture, one kernel of every other kind on one.
CHOSEN = [
    *(
        aot.Kernel(kernel, dtype, aot.DEFAULT, architecture)
        for kernel in ("row", "gradient")
        for dtype in ("bfloat16", "float32")
        for architecture in aot.ARCHITECTURES
    ),
    *(aot.Kernel(kernel, "bfloat16", (1.5, 0.5), 90) for kernel in ("row", "second", "gradient")),
    *(aot.Kernel(kernel, "bfloat16", (2, 1), 90, aligned=False) for kernel in ("row", "gradient")),
    *(aot.Kernel(kernel, "float16", (4, 2), 90, targets="valid_mask") for kernel in ("row", "gradient")),
    *(aot.Kernel(kernel, "float64", None, 90, targets="none") for kernel in ("row", "gradient")),
    *(aot.Kernel(kernel, "bfloat16", (2, 1), 90, smoothed=True) for kernel in ("row", "gradient")),
    aot.Kernel("partial", "bfloat16", (2, 1), 90),
    aot.Kernel("combine", "bfloat16", (2, 1), 90),
]


@pytest.mark.parametrize("kernel", CHOSEN, ids=str)
def test_limits(kernel):
    """No spill, no stack, 16-byte loads, registers and instructions per column."""
    result = aot.check(kernel)
    assert not result.failures, f"{kernel}: {'; '.join(result.failures)}"


def test_default_kernels_are_within_the_goal():
    """At most 24 instructions per column forward and 19 backward."""
    for name, most in (("row", 24), ("gradient", 19)):
        assert aot.limit(DEFAULT._replace(name=name)).per_column < most


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


def test_an_iteration_is_the_shortest_path():
    loops = list(sass._loops(*sass._parse(LISTING)))
    assert [loop.iteration for loop in loops] == [("LDG.E.128", "BRA", "MUFU.EX2", "BRA")]
    code = sass.MachineCode(32, 0, 0, 0, tuple(loops))
    assert code.main_loops() == tuple(loops)
    assert loops[0].count("LDG", "MUFU") == 2


def test_spills_in_a_loop_are_told_apart():
    """A spill before the loop costs once per program; one in it costs every iteration."""
    spill = "        /*0000*/                   STL [R1], R4 ;\n"
    for listing, expected in (
        (LISTING, (0, 0)),
        (spill + LISTING, (1, 0)),
        (LISTING.replace(".L_x_2:\n", ".L_x_2:\n" + spill), (1, 1)),
    ):
        labels, instructions = sass._parse(listing)
        assert sass._spills(instructions, tuple(sass._loops(labels, instructions))) == expected


def test_spills_of_a_loop_over_rows_count_once_a_row():
    """A loop around two loops over columns is one over rows; a loop around one is a loop over columns itself."""
    turn = "{0}:\n        /*0000*/ LDG.E R4, [R2.64] ;\n        /*0010*/ @P0 BRA `({0}) ;\n"
    spill, again = "        /*0020*/ LDL R0, [R1] ;\n", "        /*0030*/ @P1 BRA `(.L_x_0) ;\n"
    one, other = turn.format(".L_x_1"), turn.format(".L_x_2")
    for listing, looped in (
        (one + spill + other, 0),
        (one + spill, 1),
        (one.replace("LDG", "FADD") + other + spill, 1),
    ):
        labels, instructions = sass._parse(".L_x_0:\n" + listing + again)
        loops = tuple(sass._loops(labels, instructions))
        assert sass._spills(instructions, loops) == (1, looped)


def test_a_limit_that_is_exceeded_is_reported(monkeypatch):
    monkeypatch.setattr(aot, "limit", lambda kernel: sass.InstructionLimit(16, 0, 0, 10.0))
    failures = "; ".join(aot.check(DEFAULT).failures)
    assert "instructions per column, limit 10" in failures
    assert "registers, limit 16" in failures


def test_spills_are_limited():
    code = sass.MachineCode(registers=16, stack=8, spills=3, looped_spills=1, loops=())
    limit = sass.InstructionLimit(registers=16, stack=8, looped_spills=1, per_column=None)
    assert limit.exceeded(code) == []
    for worse in (code._replace(looped_spills=2), code._replace(stack=9)):
        (failure,) = limit.exceeded(worse)
        assert failure.endswith("limits 1 and 8")


def test_command_line(capsys):
    assert aot.main(["--arch", "90", "--only", "combine bfloat16 (2,1)", "--jobs", "1"]) == 0
    text = capsys.readouterr().out
    assert "1 of 1 within their limits" in text
    assert "combine bfloat16 (2,1) aligned16 labels sm_90" in text
    assert aot.main(["--only", "no such kernel"]) == 1
