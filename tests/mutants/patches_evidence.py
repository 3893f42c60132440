"""Mutants of gpucheck and of the benchmarks: what would let a failure pass, or a wrong figure into the README."""

from __future__ import annotations

from .patches import mutants

GPUCHECK = "caref_kernels/gpucheck/"

EVIDENCE = [
    *mutants(
        "could not run turned into a pass",
        GPUCHECK + "report.py",
        "gpucheck_stages gpucheck_report",
        "judge or never or control or exit_code or sanitizer_is_read or pytest_is_read",
        ("controls-ignored", "    if missed:\n", "    if False:\n"),
        ("nothing-checked-passes", '    if not found["cases"]:\n', "    if False:\n"),
        ("some-cases-not-run-passes", "    if could_not:\n", "    if False:\n"),
        ("timeout-is-fine", 'BAD = ("fail", "invalid", "timeout", "crash")', 'BAD = ("fail", "invalid", "crash")'),
        ("invalid-is-fine", 'BAD = ("fail", "invalid", "timeout", "crash")', 'BAD = ("fail", "timeout", "crash")'),
        (
            "required-may-be-unsupported",
            'stage["status"] != "pass" for stage',
            'stage["status"] == "skipped" for stage',
        ),
        ("required-may-be-absent", "if not matching or any(", "if any("),
    ),
    *mutants(
        "a process that failed taken for one that passed",
        GPUCHECK + "conduct.py",
        "gpucheck_report",
        "dies or become or alone",
        ("exit-status-ignored", "    if code != 0 or not result.is_file():", "    if not result.is_file():"),
        ("budget-ignored", "        if left < job.stage.least:", "        if False:"),
        ("side-by-side-when-alone", "not groups[-1][1] and not job.stage.alone", "not groups[-1][1]"),
    ),
    *mutants(
        "a check that cannot fail",
        GPUCHECK + "subject.py",
        "gpucheck_stages",
        "planted or never or accident or lost",
        ("any-error-catches", "    except AssertionError:\n        return", "    except Exception:\n        return"),
        ("time-over-passes", "    if left_out:\n", "    if False:\n"),
        ("lost-device-goes-on", "            if is_sticky(error):\n                break\n", ""),
        ("values-unchecked", "    check_evaluation(actual, expected, eager)\n", ""),
        ("never-fenced", "    with fence.watch():\n        found", "    if True:\n        found"),
    ),
    *mutants(
        "guard zones that notice nothing",
        GPUCHECK + "fence.py",
        "gpucheck_stages",
        "beside or poisoned or planted",
        ("no-zone-after", '(("before", memory[:first]), ("after", memory[last:]))', '(("before", memory[:first]),)'),
        ("no-zone-before", '(("before", memory[:first]), ("after", memory[last:]))', '(("after", memory[last:]),)'),
        ("no-poison", '                guarded.fill_(float("nan"))\n', "                guarded.zero_()\n"),
        (
            "constants-unchecked",
            "        for guarded, values in self._constants:\n",
            "        for guarded, values in ():\n",
        ),
    ),
    *mutants(
        "a sanitizer that is believed without a proof",
        GPUCHECK + "sanitizer.py",
        "gpucheck_report",
        "sanitizer",
        ("planted-write-not-needed", "done.returncode != ERRORS or", "done.returncode != ERRORS and"),
        ("no-summary-passes", "    if not summaries:\n", "    if False:\n"),
        ("exit-status-of-tool-ignored", "    if summaries[-1] or code:\n", "    if summaries[-1]:\n"),
    ),
    *mutants(
        "a contestant that computes something else is timed",
        "benchmarks/providers.py",
        "benchmarks_gpu",
        "imprecise",
        ("peer-gradient-only", 'check_identity(loss.view(1), exact_loss.view(1), "peer", label=provider.name)', "pass"),
        (
            "own-judged-as-peer",
            "    if provider.package is not None:\n        check_identity",
            "    if True:\n        check_identity",
        ),
    ),
    *mutants(
        "a batch that does not fit",
        "benchmarks/step_models.py",
        "benchmarks_gpu",
        "largest_batch",
        ("limit-ignored", "found if found is not None and found <= limit else None", "found"),
        ("batch-too-large", "size = 2 * best if above is None", "size = 8 * best if above is None"),
    ),
    *mutants(
        "stale figures shown as current",
        "benchmarks/report_gpu.py",
        "benchmarks_plots",
        "readme",
        ("gpucheck-never-stale", '[] if package["source_sha256"] == current_hash else', "[] if True else"),
    ),
]
