"""The loss of a linear head, hidden weight^T + bias, without its logits: checks, dtypes, and the autograd node."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .autograd import LinearCarefFunction, LinearPlan
from .checks import check_floating, check_labels, check_order
from .config import CarefConfig, HeadOptions, Reduction
from .functional import CarefOutput, divisor_of, name_results, settled
from .objective import MAX_COLUMNS
from .sparsity import Sparsity


def linear_caref_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float = CarefConfig.alpha,
    beta: float = CarefConfig.beta,
    lambda_sced: float = CarefConfig.lambda_sced,
    lambda_kl: float = CarefConfig.lambda_kl,
    sparsity: Sparsity | None = CarefConfig.sparsity,
    ignore_index: int = CarefConfig.ignore_index,
    reduction: Reduction = CarefConfig.reduction,
    num_items: float | Tensor | None = None,
    vocab_size: int | None = CarefConfig.vocab_size,
    backend: str = CarefConfig.backend,
    return_terms: bool = CarefConfig.return_terms,
    logit_scale: float = HeadOptions.logit_scale,
    softcap: float | None = HeadOptions.softcap,
    chunk_rows: int | None = HeadOptions.chunk_rows,
) -> Tensor | CarefOutput:
    r"""The CAREF objective of ``logits = logit_scale * (hidden @ weight.T + bias)``, which are never held.

    The value and gradients are those of ``caref_loss(logits, labels)``, computed chunk by chunk over the rows that
    count; the gradients of hidden, weight and bias are made in the same sweep.

    Args:
        hidden: ``(..., D)``, float16, bfloat16, float32 or float64, at least 2-D.
        weight: ``(V, D)``, of the dtype and device of ``hidden``; a tied one gets the gradients of both uses.
        labels: ``(...)``, int32 or int64 class indices, on the device of ``hidden``.
        bias: ``(V,)`` or ``None``; one that requires no gradient is a constant.
        logit_scale: factor of the logits, finite and > 0 (Cohere's ``logit_scale``, 1 / ``logits_scaling`` of Granite).
        softcap: logits are ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``, finite and > 0;
            ``None`` for none (``final_logit_softcapping`` of Gemma 2).
        chunk_rows: rows of logits that exist at a time, >= 1; by default chosen from the memory that they, and the
            gradient of the weight, take.
        alpha, beta, lambda_sced, lambda_kl, sparsity, ignore_index, reduction, num_items, vocab_size, backend,
            return_terms: as in :func:`caref_kernels.caref_loss`.
    Returns:
        The loss, or :class:`caref_kernels.CarefOutput`; float32 (float64 for float64), in nats.
    Raises:
        IndexError: on the CPU, a label that is neither in [0, V) nor ``ignore_index``; elsewhere such a row is NaN.
        TypeError: an argument of a wrong type or dtype; a DTensor, with what to do instead.
        ValueError: shapes, dtypes or devices that do not fit (each is named), or a weight that is empty.
        NotImplementedError: an explicit backend that cannot run, or a torch.func transform.
        RuntimeError: in the backward of a backward: a second derivative is not provided.
    Precision: the logits of a chunk are rounded to the dtype of ``hidden``, as a head's are; terms, statistics and the
        gradients of weight and bias are accumulated in float32 (float64), whatever that dtype, so their error does not
        grow with the number of chunks.  Under autocast the products run in its dtype.  The scale costs no rounding.
        A softcap and its derivative are computed in float32 (float64).  Deterministic.
    Memory: one chunk of logits, the gradients of hidden, and float32 for that of the weight; nothing for a frozen
        weight.  Under a softcap a chunk exists in its dtype and in float32, three times the memory in 16 bits and
        twice in float32, for which the default takes fewer rows.  ``reduction="none"``, gradients of single terms, and
        a second backward through a retained graph compute the logits a second time.
    """
    config = CarefConfig(
        alpha=alpha,
        beta=beta,
        lambda_sced=lambda_sced,
        lambda_kl=lambda_kl,
        sparsity=sparsity,
        ignore_index=ignore_index,
        reduction=reduction,
        vocab_size=vocab_size,
        backend=backend,
        return_terms=return_terms,
    )
    options = HeadOptions(logit_scale=logit_scale, softcap=softcap, chunk_rows=chunk_rows)
    return linear_from_config(hidden, weight, labels, bias, num_items, config, options)


def linear_from_config(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    num_items: float | Tensor | None,
    config: CarefConfig,
    options: HeadOptions,
) -> Tensor | CarefOutput:
    """:func:`linear_caref_loss` with its options already in a configuration."""
    check_arguments(hidden, weight, labels, "linear_caref_loss takes (hidden, weight, labels)")
    dtype = check_head(hidden, weight, bias, "linear_caref_loss")
    labels = check_labels(labels, hidden, "hidden")
    if config.inplace_backward:
        raise ValueError("inplace_backward must be False: a fused head has no logits that could be overwritten")
    divisor = divisor_of(hidden, labels, num_items, config)
    rows = hidden.reshape(-1, hidden.size(-1))
    weights = (1.0, float(config.lambda_sced), float(config.lambda_kl))
    spec, weights, *operands = settled(config.row_spec(weight.size(0)), weights, hidden)
    plan = LinearPlan(
        spec=spec,
        backend=backends.select(config.backend, hidden.new_empty((1, 1), dtype=dtype), spec),
        weights=weights,
        per_row=config.reduction == "none",
        any_items=divisor.any_items,
        with_terms=config.return_terms,
        needs=needed_gradients(rows, weight, bias),
        options=options,
        dtype=dtype,
    )
    loss, terms, stats = LinearCarefFunction.apply(rows, weight, bias, labels, divisor.value, *operands, plan)
    loss = loss.reshape(hidden.shape[:-1]) if plan.per_row else loss
    return name_results(loss, terms, stats, divisor, labels, config)


def needed_gradients(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of the tensors a gradient will be asked for."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and tensor is not None and tensor.requires_grad for tensor in tensors)


def check_arguments(hidden: Tensor, weight: Tensor, labels: Tensor, signature: str) -> None:
    """Raise an error where two arguments can only have been swapped; ``signature`` says their order."""
    if not all(isinstance(tensor, Tensor) for tensor in (hidden, weight, labels)):
        return
    if labels.shape == hidden.shape[:-1]:
        return
    name = "local_weight" if "local_weight" in signature else "weight"
    check_order(weight, labels, hidden, ("labels", name), signature)
    is_weight = hidden.dim() == 2 <= weight.dim() and hidden.size(1) == weight.size(-1)
    if is_weight and labels.shape == weight.shape[:-1]:
        raise ValueError(f"hidden and {name} look swapped: {signature}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, function: str) -> torch.dtype:
    """The dtype of the products, after every check of the three tensors of ``function``."""
    least_columns, own = (0, "local_") if function == "vocab_parallel_linear_caref_loss" else (1, "")
    tensors = {"hidden": hidden, own + "weight": weight} | ({} if bias is None else {own + "bias": bias})
    for name, tensor in tensors.items():
        check_floating(name, tensor, function)
    if least_columns and weight.numel() == 0:
        raise ValueError(
            f"weight has 0 elements, shape {tuple(weight.shape)} (a ZeRO-3 or FSDP shard?): gather it first, e.g. with "
            f"deepspeed.zero.GatheredParameters or FSDP.summon_full_params, or compute the loss from the logits"
        )
    _check_shapes(tensors, least_columns)
    if len({tensor.device for tensor in tensors.values()}) > 1:
        raise ValueError("hidden, weight and bias must be on one device; got " + _each(tensors, "device"))
    is_double = torch.float64 in {tensor.dtype for tensor in tensors.values()}
    if torch.is_autocast_enabled(hidden.device.type) and not is_double:
        return torch.get_autocast_dtype(hidden.device.type)
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        raise ValueError(
            "hidden, weight and bias must have one dtype (or run under torch.autocast); got " + _each(tensors, "dtype")
        )
    return hidden.dtype


def _check_shapes(tensors: dict[str, Tensor], least_columns: int) -> None:
    (_, hidden), (name, weight), *rest = tensors.items()
    if weight.dim() != 2 or not least_columns <= weight.size(0) <= MAX_COLUMNS:
        raise ValueError(
            f"{name}: expected shape (V, D) with V in [{least_columns}, {MAX_COLUMNS}]; got {tuple(weight.shape)}"
        )
    is_transposed = hidden.dim() == 3 and hidden.size(1) == weight.size(1)
    hint = " (hidden of shape (B, D, T): pass hidden.transpose(1, 2))" if is_transposed else ""
    if hidden.dim() < 2 or hidden.size(-1) != weight.size(1):
        raise ValueError(
            f"hidden: expected shape (..., {weight.size(1)}) with at least one leading dimension for a {name} of shape "
            f"{tuple(weight.shape)}; got {tuple(hidden.shape)}{hint}"
        )
    for name, bias in rest:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected shape ({weight.size(0)},); got {tuple(bias.shape)}")


def _each(tensors: dict[str, Tensor], attribute: str) -> str:
    return ", ".join(f"{name} {getattr(tensor, attribute)}" for name, tensor in tensors.items())
