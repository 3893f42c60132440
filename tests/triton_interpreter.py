"""Triton's interpreter in the suite: which tests are too large for it, and shortcuts that make it six times faster.

It runs the kernels as numpy calls, about 20 us each, for one program after another.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable

import torch

from caref_kernels.backends import triton as backend

ACTIVE = backend.INTERPRETED
# The widest rows, and the most rows, that a test may have under it.
WIDEST = 33_000
# Of the rows of a real model it takes every fourth.
STEP = 4
# Tests of many rows, of a width that is written in the test, or of many threads (the interpreter has global state).
TOO_LARGE = frozenset(
    {
        "test_any_split",
        "test_calls_from_several_threads_at_once",
        "test_compiled_equals_eager",
        "test_exchanges_and_their_bytes",
        "test_checkpointed_head",
        "test_double_backward_is_refused",
        "test_float16_gradient_is_scaled_before_it_is_rounded",
        "test_gradcheck",
        "test_incoming_gradients",
        "test_largest_value_and_slope",
        "test_many_rows",
        "test_masks_do_not_depend_on_threads",
        "test_many_short_rows",
        "test_mean_of_many_sixteen_bit_rows",
        "test_memory_of_a_cap",
        "test_micro_batches",
        "test_loss_scale_arrives_before_rounding",
        "test_no_gradient_no_work",
        "test_no_logits_and_no_gradient_of_a_frozen_head",
        "test_number_of_threads",
        "test_only_requested_gradients_exist",
        "test_opcheck_of_heads",
        "test_second_backward",
        "test_second_backward_between_any_two_bytecodes_of_the_first",
        "test_sparsity",
        "test_sum_over_many_rows",
        "test_terms",
        "test_terms_of_real_rows",
        "test_weight_gradient_does_not_degrade_with_the_number_of_chunks",
        "test_widest_rows",
        "test_widest_vocabulary",
    }
)
# The paths of the kernels that differ: one pass, two passes, and one pass with most sums.
GRADCHECKED = ((2.0, 1.0), (1.5, 0.5), (4.0, 2.0))
# Of each test of heads and shards that runs here at all: the parameters that it runs with.
FEW: dict[str, dict[str, object]] = {
    "test_chunked_equals_unchunked": {"chunk_rows": None},
    "test_dtypes_and_exponents": {"exponents": (2.0, 1.0)},
    "test_regimes": {"regime": "tied_maxima"},
    "test_schedules_of_logits": {"name": "alpha"},
    "test_schedules_of_heads": {"name": "lambdas"},
    "test_a_number_of_items_that_is_not_read": {"function": "caref_loss"},
    "test_no_row_and_no_item": {"kind": "int"},
    "test_value_and_gradients": {"dtype": torch.bfloat16},
    "test_options": {"regime": "lm_like", "options": {"alpha": 1.5, "beta": 0.5}},
}
# Regimes in rows as wide as a vocabulary.
WIDE_REGIMES = ("near_uniform", "confident_1e-7", "lm_like", "tied_maxima")


def is_too_large(name: str, parameters: dict[str, object]) -> bool:
    """Whether a test with these parameters would take the interpreter too long."""
    if name == "test_gradcheck" and (parameters["alpha"], parameters["beta"]) not in GRADCHECKED:
        return True
    # What surrounds the kernels of a head or a shard is the same for every backend: a few of their tests are enough.
    if name in FEW and not all(parameters.get(key, value) == value for key, value in FEW[name].items()):
        return True
    # Rows of float64 lie like those of float32.
    if name == "test_layout" and parameters["dtype"] == torch.float64:
        return True
    # Regimes differ within a tile; of whole rows, those where tiles differ or sums are long.
    if name == "test_distributions" and parameters["columns"] == 32_128:
        return parameters["regime"] not in WIDE_REGIMES
    # Of the rows that are wider than the lists of a selection, ones with ties and ones without.
    if name == "test_values_given_the_support" and parameters["columns"] == 5000:
        return parameters["regime"] not in ("lm_like", "tied_maxima")
    columns = parameters.get("columns", 0)
    return name in TOO_LARGE or (isinstance(columns, int) and columns > WIDEST)


def quicken() -> None:
    """Skip what has no effect.

    The interpreter prepares triton.language again at every call of a device function, also where it still is: three
    quarters of its time.  It computes every sum of integers a second time in 64 bits for an assertion that is made with
    the option ``debug`` alone: two fifths of the rest.
    """
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

    language = interpreter.tl

    @functools.cache
    def modules(function: Callable) -> list:
        found = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return [module for module in found if module in (language, language.core)]

    def call(self, *arguments, **options):
        if any(language.core.is_builtin(module.load) for module in modules(self.fn)):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call
