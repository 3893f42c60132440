"""What random mutants are tried with: the tests that cover each module, and the changes that nothing can notice."""

from __future__ import annotations

_SHARDED = "shards vocab_parallel"
_COMPILED = "compile compile_schedules"
# Names of test files without test_ and .py, most specific first: the first failure ends a trial.  Modules that are not
# here need a GPU or Triton's interpreter.
TESTS = {
    "__init__.py": "signatures imports",
    "autograd.py": f"autograd reductions inplace num_items linear linear_calls {_SHARDED} compile row_options",
    "backends/__init__.py": "validation imports labels",
    "backends/compiled.py": "layouts labels dtypes numerics",
    "backends/cpu.py": "labels dtypes layouts numerics sparsity",
    "backends/devices.py": "imports validation",
    "backends/reference.py": "labels dtypes numerics sparsity",
    "checks.py": "validation hints labels layouts inplace linear_calls linear row_options",
    "config.py": "signatures validation hints linear_softcap sparsity reductions",
    "distributed/collectives.py": _SHARDED,
    "distributed/dtensors.py": "hints vocab_parallel",
    "distributed/local_stats.py": _SHARDED,
    "distributed/shard.py": f"signatures {_SHARDED} hints",
    "divisor.py": "num_items reductions compile_schedules",
    "functional.py": f"row_options validation reductions num_items layouts inplace labels sparsity {_COMPILED}",
    "linear.py": "signatures hints linear_calls linear linear_softcap compile row_options",
    "integrations/counting.py": "signatures count_items",
    "integrations/heads.py": "heads heads_refused model_loss_ranks",
    "integrations/model_loss.py": "model_loss model_life heads model_loss_ranks",
    "integrations/passes.py": "model_loss row_options_of_models model_life transformers heads trl model_loss_ranks",
    "integrations/probe.py": "probe model_loss heads heads_refused model_life model_loss_ranks",
    "integrations/trainer.py": "transformers model_loss_ranks",
    "integrations/transformers.py": "signatures model_loss model_life heads transformers model_loss_ranks",
    "integrations/trl.py": "signatures trl",
    "linear_chunks.py": "linear linear_calls linear_softcap compile row_options",
    "modules.py": "signatures validation hints reductions num_items linear",
    "objective.py": "oracle numerics sparsity reductions properties",
    "ops.py": f"autograd dtypes linear {_COMPILED} row_options",
    "sparsity.py": "signatures validation sparsity properties",
}

# (module, line before the change, its new part): why no test can tell the change from the source.
EQUIVALENT = {
    (
        "config.py",
        "close = difflib.get_close_matches(name, known, n=1)",
        "2",
    ): "only the first of the matches is read",
    (
        "sparsity.py",
        "tie_weight = missing.to(logits.dtype) / equal.sum(-1, keepdim=True).clamp_min(1)",
        "(1)",
    ): "the rows are (N, V), so dimension 1 is the last",
}
