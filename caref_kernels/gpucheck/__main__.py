"""``python -m caref_kernels.gpucheck --aot``: compile every Triton kernel without a GPU and read the machine code."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from ..backends.triton import INTERPRETED
from . import aot

_HEADER = f"{'kernel':<56} {'per column':>10} {'budget':>7} {'registers':>9} {'stack':>6} {'spills':>6}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 if every kernel keeps its budgets."""
    parser = argparse.ArgumentParser(prog="python -m caref_kernels.gpucheck", description=__doc__)
    parser.add_argument("--aot", action="store_true", help="compile ahead of time; the only check so far")
    parser.add_argument("--arch", type=int, nargs="+", default=list(aot.ARCHITECTURES), help="80 90 100")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose line contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    if not options.aot:
        parser.error("checks that run on a GPU are not written yet; --aot needs none")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed (pip install triton, on Linux)")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    chosen = [variant for variant in aot.variants(options.arch) if options.only in str(variant)]
    return _report(chosen, options.jobs)


def _report(chosen: list[aot.Variant], jobs: int) -> int:
    import triton

    write = partial(print, file=sys.stdout, flush=True)  # noqa: T201
    write(f"triton {triton.__version__}, {len(chosen)} kernels; instructions per column, shortest way round\n{_HEADER}")
    failed = 0
    with ProcessPoolExecutor(jobs) as pool:
        for result in pool.map(aot.check, chosen):
            code = result.code
            per_column = "" if result.per_column is None else f"{result.per_column:.1f}"
            budget = "" if result.budget is None else f"{result.budget:g}"
            write(
                f"{result.variant!s:<56} {per_column:>10} {budget:>7} "
                f"{code.registers:>9} {code.stack:>6} {code.spills:>6}"
                f"{'  FAILS: ' if result.failures else ''}{'; '.join(result.failures)}"
            )
            failed += bool(result.failures)
    write(f"{len(chosen) - failed} of {len(chosen)} within their budgets")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
