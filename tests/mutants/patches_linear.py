"""Mutants of fused heads and sharded vocabularies."""

from __future__ import annotations

from .patches import AUTOGRAD, Mutant, mutants

CHUNKS = "caref_kernels/linear_chunks.py"
LINEAR_MODULE = "caref_kernels/linear.py"
PARTIAL_ROWS = "caref_kernels/distributed/local_stats.py"
SHARDS = "caref_kernels/distributed/shard.py"

LINEAR: list[Mutant] = [
    *mutants(
        "products of chunks added in 16 bits",
        CHUNKS,
        "linear",
        "weight_gradient_does_not_degrade_with_the_number_of_chunks",
        (
            "weight-gradient-in-the-input-dtype",
            "(columns, features) if needs_input_grad.weight else 0, dtype=dtype)",
            "(columns, features) if needs_input_grad.weight else 0)",
        ),
    ),
    *mutants(
        "chunks lost, or rows that do not count read",
        CHUNKS,
        "linear linear_calls",
        "chunked or dtypes_and_exponents or gradcheck or loss_scale or ignored_rows or no_label_at_all",
        ("every-chunk-is-the-first", "chunk.hidden, self.is_first)", "chunk.hidden, True)"),
        ("ignored-rows-multiplied", "return None if valid.numel() == targets.numel() else valid", "return None"),
        (
            "gradients-of-the-first-rows",
            "rows.gradient(grad_terms[chunk.rows]",
            "rows.gradient(grad_terms[: len(chunk.hidden)]",
        ),
        ("bias-of-the-last-chunk", "self.bias += gradient.sum", "self.bias = gradient.sum"),
        ("unwritten-gradient-of-no-row", "if self.is_first and self.needs_input_grad.weight:", "if False:"),
    ),
    *mutants(
        "weights of tokens left out of the gradients of a head",
        LINEAR_MODULE,
        "row_options",
        "head",
        (
            "head-gradient-not-weighted",
            "varying if token_weights is None else _row_weights(call, varying, token_weights)",
            "varying",
        ),
    ),
    *mutants(
        "weights of other tokens in the gradients of a head",
        CHUNKS,
        "row_options",
        "head",
        (
            "token-weights-of-the-first-rows",
            "grad_terms[chunk.rows] if grad_terms.dim() == 2",
            "grad_terms[: len(chunk.hidden)] if grad_terms.dim() == 2",
        ),
    ),
    *mutants(
        "work for a frozen head",
        CHUNKS,
        "linear",
        "frozen_head or only_requested",
        ("gradient-of-a-frozen-head", "(columns, features) if needs_input_grad.weight else 0,", "(columns, features),"),
    ),
    *mutants(
        "divisor lost, infinite, or applied before the loss scale",
        LINEAR_MODULE,
        "linear linear_calls",
        "chunked or dtypes_and_exponents or gradcheck or loss_scale or no_label_at_all",
        (
            "head-divisor-not-in-gradient",
            "grad_loss if divisor is None else divided(",
            "grad_loss if True else divided(",
        ),
    ),
    *mutants(
        "divisor of 0 in the gradient",
        AUTOGRAD,
        "linear linear_calls",
        "chunked or dtypes_and_exponents or gradcheck or loss_scale or no_label_at_all",
        ("head-mean-over-nothing", "torch.where(divisor == 0, 0.0, grad_loss / divisor)", "grad_loss / divisor"),
    ),
    *mutants(
        "a second backward scales the scaled",
        LINEAR_MODULE,
        "linear_calls",
        "second_backward",
        (
            "head-gradients-used-twice",
            "saved or take(ctx.gradients)",
            "saved or (ctx.gradients and ctx.gradients[0])",
        ),
    ),
    *mutants(
        "a softcap or a scale lost, or applied in 16 bits",
        CHUNKS,
        "linear_softcap",
        "",
        ("cap-without-derivative", "        if self.product is self.logits:\n", "        if True:\n"),
        ("bias-not-scaled", "beta=factor, alpha=factor", "beta=1.0, alpha=factor"),
        (
            "derivative-from-tanh",
            "torch.div(self.logits, self.product.cosh_().square_(), out=self.product)",
            "torch.mul(self.logits, 1 - self.product.tanh_().square_(), out=self.product)",
        ),
        ("cap-in-16-bits", "out.copy_(product).tanh_().mul_(softcap)", "out.copy_(product.tanh()).mul_(softcap)"),
        ("cap-takes-no-memory", "wanted = wanted * a // head.logit_bytes", "wanted = wanted * 1"),
    ),
    *mutants(
        "a softcap or a scale lost, or applied in 16 bits",
        LINEAR_MODULE,
        "linear_softcap",
        "",
        ("scale-not-in-ready-gradients", "scale = scale * factor if factor != 1 else scale", "scale = scale * 1"),
        ("scale-not-in-later-gradients", "grad_terms = grad_terms * factor if", "grad_terms = grad_terms * 1 if"),
    ),
    *mutants(
        "autocast ignored",
        "caref_kernels/checks.py",
        "linear_calls",
        "autocast",
        ("head-outside-autocast", "return torch.get_autocast_dtype(hidden.device.type)", "return hidden.dtype"),
    ),
    *mutants(
        "maxima of several ranks",
        PARTIAL_ROWS,
        "shards",
        "options or regimes or maxima_on_several_ranks",
        ("own-maximum-not-joined", "moments[:, 0] += ~is_owner", "moments[:, 0] += 0"),
        ("moments-not-moved", "powers[j - i] * moments[:, i]", "powers[0] * moments[:, i]"),
        ("maximum-in-the-local-sums", ".scatter_(-1, argmax[block, None], 0.0)", ""),
    ),
    *mutants(
        "maxima of several ranks",
        SHARDS,
        "shards",
        "options or regimes or maxima_on_several_ranks or ignored_rows",
        ("other-maxima-not-counted", "sums[:, place.start] += sums[:, NUM_MAXIMA] - 1", "sums[:, place.start] += 0"),
        (
            "other-maxima-not-in-sced",
            "rest + (num_maxima * top_weight - 1) * density",
            "rest + (top_weight - 1) * density",
        ),
        ("other-maxima-not-in-slopes", "slope_sum + (num_maxima - 1) * top_weight * slope", "slope_sum"),
        (
            "ties-of-the-mask-ignored",
            "missing = num_kept - (best > threshold).sum(-1, keepdim=True)",
            "missing = num_kept",
        ),
    ),
    *mutants(
        "a label of another rank",
        SHARDS,
        "shards",
        "options or regimes or ignored_rows",
        ("labels-not-local", "label = targets.long() - self.first_column", "label = targets.long()"),
        (
            "label-elsewhere-is-column-0",
            "is_elsewhere = (labels == ELSEWHERE) | (",
            "is_elsewhere = (labels == -9) | (",
        ),
        ("maximum-elsewhere-is-column-0", "((stats[:, ARGMAX] < 0) & (labels != IGNORED))", "(labels == -9)"),
        ("local-label-equals-ignore-index", "spec = self.spec._replace(ignore_index=IGNORED)", "spec = self.spec"),
    ),
    *mutants(
        "whole logits on every rank taken for a larger vocabulary, or parts for whole logits",
        SHARDS,
        "vocab_parallel",
        "processes",
        ("same-columns-accepted", "bool((ranks == ranks[0]).all())", "bool((ranks != ranks).any())"),
        ("labels-beyond-not-looked-at", "0 <= last < columns:", "0 <= last:"),
    ),
    *mutants(
        "whole logits on every rank taken for a larger vocabulary, or parts for whole logits",
        "caref_kernels/distributed/collectives.py",
        "vocab_parallel",
        "processes",
        ("zeros-taken-for-the-same", "bits.unique().numel() < LEAST_DIFFERENT", "False"),
    ),
]
