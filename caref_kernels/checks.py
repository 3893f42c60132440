"""Every check of a tensor argument, and the text of every error about one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import objective
from .config import CarefConfig
from .distributed import dtensors

LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TENSOR_TYPES = ("Tensor", "Parameter", "FakeTensor", "FunctionalTensor")


def check_floating(name: str, tensor: Tensor, function: str) -> None:
    """Raise an error unless ``tensor`` is a dense, plain floating-point tensor outside of torch.func transforms.

    ``function`` is the public function whose argument is called ``name``.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense torch.Tensor; got {describe(tensor)}")
    if not torch.compiler.is_compiling():
        if dtensors.is_dtensor(tensor):
            dtensors.refuse(name, tensor, function)
        if type(tensor).__name__ not in _TENSOR_TYPES:
            raise TypeError(
                f"{name}: expected a plain torch.Tensor; got the subclass {type(tensor).__name__} (convert it first)"
            )
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "caref_kernels does not support torch.func transforms (grad, vmap, jvp, ...); use torch.autograd.grad, "
                "or differentiate caref_kernels.objective, which is plain PyTorch"
            )
    if tensor.dtype not in LOGITS_DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in LOGITS_DTYPES)
        raise TypeError(f"{name}: dtype must be one of {accepted}; got {tensor.dtype}")


def check_logits(name: str, logits: Tensor, function: str, least_columns: int = 1) -> None:
    """Raise an error unless ``logits`` are (..., V), of a dtype and size that the kernels take."""
    check_floating(name, logits, function)
    if logits.dim() < 2 or not least_columns <= logits.size(-1) <= objective.MAX_COLUMNS:
        raise ValueError(
            f"{name}: expected shape (..., V) with at least one leading dimension and V in "
            f"[{least_columns}, {objective.MAX_COLUMNS}]; got {tuple(logits.shape)}"
        )


def check_order(floating: Tensor, labels: Tensor, rows: Tensor, names: tuple[str, str], signature: str) -> None:
    """Raise TypeError where ``labels`` and the argument before it can only have been swapped.

    ``rows`` is the argument to whose rows the labels belong.
    """
    if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.dim() < 2:
        return
    if not isinstance(floating, Tensor) or floating.is_floating_point() or not isinstance(rows, Tensor):
        return
    if floating.shape == rows.shape[:-1]:
        raise TypeError(f"{names[0]} and {names[1]} look swapped: {signature}")


def check_labels(labels: Tensor, logits: Tensor, config: CarefConfig, of: str = "logits") -> Tensor:
    """The labels as (N,), contiguous, shifted if ``config`` asks; ``of`` names the tensor to whose rows they belong."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a torch.Tensor; got {describe(labels)}")
    if dtensors.is_dtensor(labels):
        dtensors.refuse("labels", labels, "")
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels: target must hold class indices (int32 or int64); got {labels.dtype}")
    _check_row_shape("labels", labels, logits, of)
    if config.shift:  # int64, which holds every ignore_index
        labels = _shifted(labels.long(), config.ignore_index)
    return labels.reshape(-1).contiguous()


def check_token_weights(
    weights: Tensor | None, logits: Tensor, labels: Tensor, config: CarefConfig, of: str = "logits"
) -> Tensor | None:
    """The weights as (N,), in the accumulation dtype, shifted as the labels, and 0 for rows that are not valid."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        raise TypeError(f"token_weights: expected a torch.Tensor or None; got {describe(weights)}")
    if dtensors.is_dtensor(weights):
        dtensors.refuse("token_weights", weights, "")
    if weights.dtype.is_complex:
        raise TypeError(f"token_weights: expected real numbers; got {weights.dtype}")
    if weights.requires_grad:
        raise ValueError("token_weights must not require grad: no gradient is provided; pass token_weights.detach()")
    _check_row_shape("token_weights", weights, logits, of)
    weights = weights.to(objective.accumulation_dtype(logits.dtype))
    weights = (_shifted(weights, 0) if config.shift else weights).reshape(-1)
    return torch.where(valid_labels(labels, config.ignore_index), weights, 0)


def _shifted(rows: Tensor, last: float) -> Tensor:
    """The value at i + 1 for each position i of (..., T), and ``last`` at the last position."""
    rows = rows.roll(-1, -1)
    rows[..., -1:] = last
    return rows


def valid_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Which labels are not ``ignore_index``, which torch would wrap to the 32 bits of labels that are int32."""
    return (labels.long() if labels.dtype == torch.int32 else labels) != ignore_index


def valid_rows(targets: Tensor, ignore_index: int) -> Tensor:
    """Which rows are valid: a valid mask as it is, or the rows of valid labels."""
    return targets if targets.dtype == torch.bool else valid_labels(targets, ignore_index)


def check_label_range(labels: Tensor, columns: int, ignore_index: int) -> None:
    """Raise IndexError for the first label on the CPU that is neither in [0, columns) nor ``ignore_index``.

    Labels on a device are not read, which would synchronise; there the kernels make the row NaN.
    """
    if labels.device.type != "cpu":
        return
    wrong = ((labels < 0) | (labels >= columns)) & valid_labels(labels, ignore_index)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise IndexError(
            f"labels: target {int(labels[row])} at row {row} is out of range [0, {columns}) "
            f"and is not ignore_index={ignore_index}"
        )


def check_valid(valid: Tensor, logits: Tensor) -> Tensor:
    """The valid mask as (N,) bool, contiguous."""
    if not isinstance(valid, Tensor):
        raise TypeError(f"valid: expected a torch.Tensor; got {describe(valid)}")
    if dtensors.is_dtensor(valid):
        dtensors.refuse("valid", valid, "")
    if valid.dtype.is_floating_point or valid.dtype.is_complex:
        raise TypeError(f"valid: expected a bool or integer mask; got {valid.dtype}")
    _check_row_shape("valid", valid, logits)
    return (valid != 0).reshape(-1).contiguous()


def _check_row_shape(name: str, rows: Tensor, logits: Tensor, of: str = "logits") -> None:
    if rows.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name}: expected shape {tuple(logits.shape[:-1])} for {of} of shape {tuple(logits.shape)}; "
            f"got {tuple(rows.shape)}{_columns_first(name, rows, logits, of)}"
        )
    if rows.device != logits.device:
        raise ValueError(f"{name}: on {rows.device}, but {of} are on {logits.device}")


def _columns_first(name: str, rows: Tensor, logits: Tensor, of: str) -> str:
    """A hint where the vocabulary is dimension 1 of ``logits``, as torch's cross-entropy takes them."""
    if of == "hidden" or logits.dim() < 3 or rows.shape != logits.shape[:1] + logits.shape[2:]:
        return ""
    if logits.dim() == 3:
        return f" ({name} of shape (B, T) fit {of} transposed to (B, T, V): pass {of}.transpose(1, 2))"
    return f" ({name} fit {of} with the vocabulary last: pass {of}.movedim(1, -1))"


def check_linear_order(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Raise an error where two arguments of linear_caref_loss can only have been swapped."""
    signature = "linear_caref_loss takes (hidden, weight, labels)"
    if not all(isinstance(tensor, Tensor) for tensor in (hidden, weight, labels)):
        return
    if labels.shape == hidden.shape[:-1]:
        return
    check_order(weight, labels, hidden, ("labels", "weight"), signature)
    is_weight = hidden.dim() == 2 <= weight.dim() and hidden.size(1) == weight.size(-1)
    if is_weight and labels.shape == weight.shape[:-1]:
        raise ValueError(f"hidden and weight look swapped: {signature}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, least_columns: int) -> torch.dtype:
    """The dtype of the products, after every check of the three tensors of linear_caref_loss."""
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        check_floating(name, tensor, "linear_caref_loss")
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
    if weight.dim() != 2 or not least_columns <= weight.size(0) <= objective.MAX_COLUMNS:
        raise ValueError(
            f"{name}: expected shape (V, D) with V in [{least_columns}, {objective.MAX_COLUMNS}]; "
            f"got {tuple(weight.shape)}"
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


def check_inplace(logits: Tensor, rows: Tensor) -> None:
    """Raise an error unless the gradient may be written into the memory of ``logits``, whose rows are ``rows``."""
    if torch.compiler.is_compiling():
        raise NotImplementedError("inplace_backward=True is not supported under torch.compile; leave it False there")
    if logits.is_neg():
        raise ValueError(
            "inplace_backward=True cannot write a view that negates its memory (its negative bit is set, as that of "
            "conj().imag is); pass logits.resolve_neg()"
        )
    if rows.data_ptr() != logits.data_ptr():
        raise ValueError(
            f"inplace_backward=True needs logits whose rows can be written where they lie (last stride 1, leading "
            f"dimensions that collapse); got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )
    if _may_overlap(rows):
        raise ValueError(
            f"inplace_backward=True needs logits whose elements share no memory (not expanded, no unfold or as_strided "
            f"with rows that overlap); got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )
    if logits.is_leaf and logits.requires_grad:
        raise ValueError("inplace_backward=True would overwrite a leaf that requires grad; pass an intermediate result")
    saves = logits.requires_grad and torch.is_grad_enabled()
    if saves and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        raise RuntimeError(
            "inplace_backward=True cannot be used under saved-tensor hooks (torch.autograd.graph.saved_tensors_hooks, "
            "save_on_cpu, non-reentrant checkpointing, activation offloading): what they hand back is not guarded by a "
            "version counter, so that another use of the logits would silently see their gradient; leave it False, or "
            "compute the loss outside of the hooks"
        )


def _may_overlap(rows: Tensor) -> bool:
    """Whether two elements may share memory: each stride must exceed the extent of the dimensions with shorter ones."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(rows.stride(), rows.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def describe(value: object) -> str:
    """A short description of a value for an error message."""
    if isinstance(value, Tensor):
        shape = "(nested)" if value.is_nested else tuple(value.shape)
        return f"a {value.layout} tensor of shape {shape}, {value.dtype}"
    return f"{value!r:.80} of type {type(value).__name__}"
