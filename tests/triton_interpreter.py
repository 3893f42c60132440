"""Triton's interpreter in the suite: the tests that are too slow for it, and changes that make it six times faster.

The interpreter executes each operation of a kernel as a numpy call, which takes about 20 us, one program after another.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable

import torch

from caref_kernels.backends import triton as backend

ACTIVE = backend.INTERPRETED
# The widest rows that a test may have under the interpreter.
WIDEST = 33_000
# Tests of many rows, of a width that is written in the test, or of many threads (the interpreter has global state).
TOO_LARGE = frozenset(
    {
        "test_a_scale_costs_no_operator",
        "test_a_scale_of_a_power_of_two_is_bitwise_identical_to_scaled_states",
        "test_a_small_scale_does_not_underflow_in_float16",
        "test_any_split",
        "test_calls_from_several_threads_at_once",
        "test_compiled_head_equals_eager",
        "test_every_real_dtype_of_weights",
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
        "test_saturated_caps_keep_their_gradients",
        "test_second_backward_of_a_head",
        "test_second_backward_between_any_two_bytecodes_of_the_first",
        "test_sparsity",
        "test_sum_over_many_rows",
        "test_terms_of_a_head",
        "test_terms_of_real_rows",
        "test_weight_gradient_does_not_degrade_with_the_number_of_chunks",
        "test_widest_rows",
        "test_widest_vocabulary",
    }
)
# Exponents of different variants of the kernels: one pass and two passes.
GRADCHECKED = ((2.0, 1.0), (1.5, 0.5))
# Tests of heads and shards, and the only parameters with which they run under the interpreter.
FEW: dict[str, dict[str, object]] = {
    "test_chunked_equals_unchunked": {"chunk_rows": None},
    "test_dtypes_and_exponents": {"exponents": (2.0, 1.0)},
    "test_regimes": {"regime": "tied_maxima"},
    "test_schedules_of_logits": {"name": "alpha"},
    "test_schedules_of_heads": {"name": "lambdas"},
    "test_a_number_of_items_that_is_not_read": {"function": "caref_loss"},
    "test_no_row_and_no_item": {"kind": "int"},
    "test_value_and_gradients": {"dtype": torch.bfloat16},
    "test_shift_is_the_loss_of_slices": {"function": "logits"},
    "test_shift_with_every_ignore_index": {"dtype": torch.int32},
    "test_token_weights_multiply_the_rows": {"function": "logits", "shift": True},
    "test_options": {"regime": "lm_like", "options": {"alpha": 1.5, "beta": 0.5}},
}
# The regimes that are tested in rows as wide as a vocabulary.
WIDE_REGIMES = ("near_uniform", "confident_1e-7", "lm_like", "tied_maxima")


def is_too_large(name: str, parameters: dict[str, object]) -> bool:
    """Whether a test with these parameters is too slow for the interpreter."""
    if name == "test_gradcheck_of_exponents" and (parameters["alpha"], parameters["beta"]) not in GRADCHECKED:
        return True
    # The code around the kernels of a head or a shard is the same for every backend, so a few of these tests suffice.
    if name in FEW and not all(parameters.get(key, value) == value for key, value in FEW[name].items()):
        return True
    # The layouts of float64 rows are those of float32 rows.
    if name == "test_layout" and parameters["dtype"] == torch.float64:
        return True
    # Most regimes are covered by rows of a few tiles; in wide rows only those in which tiles differ or sums are long.
    if name == "test_distributions" and parameters["columns"] == 32_128:
        return parameters["regime"] not in WIDE_REGIMES
    # Rows wider than the lists of a selection are tested with one regime that has ties and one that has none.
    if name == "test_values_given_the_num_kept" and parameters["columns"] == 5000:
        return parameters["regime"] not in ("lm_like", "tied_maxima")
    columns = parameters.get("columns", 0)
    return name in TOO_LARGE or (isinstance(columns, int) and columns > WIDEST)


def quicken() -> None:
    """Make the interpreter skip work that has no effect.

    It patches triton.language at every call of a device function even if it is patched already, which takes three
    quarters of its time.  It also repeats every integer sum in 64 bits for an assertion that is only checked with the
    option ``debug``, which takes two fifths of the rest.
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
