"""Mutants of tests/gpu and of the benchmarks: what would hide a failure, or put a wrong figure into the README."""

from __future__ import annotations

from .patches import mutants

EVIDENCE = [
    *mutants(
        "a failure that is not reported",
        "tests/gpu/report.py",
        "gpucheck",
        "outcomes or is_a_failure or time_limit or killed",
        ("nothing-passed-is-fine", 'not counts["passed"] or counts["not run"]', 'counts["not run"]'),
        (
            "failed-teardown-passes",
            'if report.when == "call" or report.outcome != "passed":',
            'if report.when == "call":',
        ),
        ("not-run-is-forgotten", "            self._test(name)\n", "            pass\n"),
        ("lost-device-goes-on", "                os._exit(1)\n", "                pass\n"),
        ("written-at-the-end", "if time.monotonic() - self._written >= INTERVAL_SECONDS:", "if False:"),
    ),
    *mutants(
        "a test that cannot fail",
        "tests/gpu/conftest.py",
        "gpucheck",
        "assertion_alone or rehearsal",
        ("any-error-notices", "    except AssertionError:\n", "    except Exception:\n"),
        ("unnoticed-fault-passes", "    if name is not None:\n", "    if False:\n"),
        ("fault-is-not-injected", "    if fault is not None:\n", "    if False:\n"),
    ),
    *mutants(
        "a test that cannot fail",
        "tests/gpu/test_values.py",
        "gpucheck",
        "rehearsal",
        ("values-unchecked", "    check_evaluation(actual, oracle(logits, labels, parts, **options), eager)\n", ""),
        ("never-guarded", "    with guard_zones.watch():\n", "    if True:\n"),
    ),
    *mutants(
        "guard zones that notice nothing",
        "tests/gpu/guard_zones.py",
        "gpucheck",
        "outside_an_output or fresh_memory",
        ("no-zone-after", '(("before", memory[:first]), ("after", memory[last:]))', '(("before", memory[:first]),)'),
        ("no-zone-before", '(("before", memory[:first]), ("after", memory[last:]))', '(("after", memory[last:]),)'),
        ("no-nan", '                guarded.fill_(float("nan"))\n', "                guarded.zero_()\n"),
        ("constants-unchecked", "        for guarded, values in constants:\n", "        for guarded, values in ():\n"),
    ),
    *mutants(
        "a sanitizer that is believed without a proof",
        "tests/gpu/sanitizer.py",
        "gpucheck",
        "sanitizer",
        ("fault-not-needed", "if code != ERRORS or", "if code != ERRORS and"),
        ("no-summary-passes", "    if not summaries:\n", "    if False:\n"),
        ("exit-status-of-tool-ignored", "    if summaries[-1] or code:\n", "    if summaries[-1]:\n"),
    ),
    *mutants(
        "an implementation that computes something else is timed",
        "benchmarks/workspaces.py",
        "benchmarks_gpu",
        "imprecise",
        ("peer-gradient-only", 'check_identity(loss.view(1), exact_loss.view(1), "peer", label=one.name)', "pass"),
        (
            "own-judged-as-peer",
            "    if one.package is not None:\n        check_identity",
            "    if True:\n        check_identity",
        ),
    ),
    *mutants(
        "a batch that does not fit",
        "benchmarks/step.py",
        "benchmarks_gpu",
        "largest_batch",
        ("limit-ignored", "found if found is not None and found <= limit else None", "found"),
        ("batch-too-large", "size = 2 * best if above is None", "size = 8 * best if above is None"),
    ),
    *mutants(
        "stale figures shown as current",
        "benchmarks/report_gpu.py",
        "benchmarks_report",
        "gpucheck",
        ("gpucheck-never-stale", '[] if made["source_sha256"] == page.gpu_sources else', "[] if True else"),
    ),
]
