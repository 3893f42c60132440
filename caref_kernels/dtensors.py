"""What to do instead where a DTensor cannot be taken, which depends on its placements and on the function called.

The losses exchange what they need themselves, so they take the part of a rank.  ``vocab_parallel_caref_loss`` alone
takes a DTensor, sharded over its last dimension.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

SHARDED_HEAD = (
    "if fully_shard (FSDP2) shards it, the ranks hold parts of the weight for different batches, which is no "
    "vocabulary-parallel head: compute the loss inside of the module's forward, where the weight is whole, or use "
    "caref_kernels.integrations.transformers.apply_caref(model, fuse_head=True); if tensor parallelism spreads the "
    "vocabulary, {}"
)


def is_dtensor(tensor: object) -> bool:
    """By its name, because importing torch.distributed.tensor takes longer than the rest of the package."""
    return type(tensor).__name__ == "DTensor"


def refuse(name: str, tensor: Tensor, function: str) -> NoReturn:
    """Raise TypeError for the argument ``name`` of ``function``, with what to pass, or to call, instead."""
    role = name.removeprefix("local_")
    remedy = {"logits": _logits, "weight": _weight, "bias": _weight, "hidden": _hidden}.get(role, _rows)
    placements = ", ".join(map(str, tensor.placements))
    raise TypeError(f"{name} is a DTensor, placed [{placements}]: {remedy(name, tensor, function)}")


def _axes(tensor: Tensor, dim: int) -> list[int] | None:
    """The mesh dimensions that shard ``dim``; ``None`` where the parts are neither copies nor plain shards."""
    if any(type(placement).__name__ not in ("Shard", "Replicate") for placement in tensor.placements):
        return None
    return [axis for axis, placement in enumerate(tensor.placements) if placement.is_shard(dim)]


def _is_whole(tensor: Tensor) -> bool:
    return all(placement.is_replicate() for placement in tensor.placements)


def _group(name: str, tensor: Tensor, axis: int) -> str:
    return f"{name}.device_mesh.get_group({axis if tensor.device_mesh.ndim > 1 else ''})"


def _logits(name: str, logits: Tensor, function: str) -> str:
    axes, is_spread = _axes(logits, logits.dim() - 1), function == "vocab_parallel_caref_loss"
    if _is_whole(logits):
        whole = "every rank holds all of it"
        return (
            f"{whole}: use caref_loss({name}.to_local(), labels)" if is_spread else f"{whole}: pass {name}.to_local()"
        )
    if axes is None or len(axes) > 1 or (axes and function == "fused_sced"):
        return f"pass {name}.full_tensor()" + (" to caref_loss" if is_spread else "")
    if not axes:
        rows = "the labels (or valid) of its rows; the number of items of all ranks is num_items"
        pass_on = f"call caref_loss with {name}.to_local()" if is_spread else f"pass {name}.to_local()"
        return f"the ranks hold whole rows: {pass_on} and {rows}"
    if logits.device_mesh.ndim == 1:
        return f"its columns are spread over the ranks: use vocab_parallel_caref_loss({name}, labels)"
    parts = f"{name}.to_local(), the labels of its rows, and {_group(name, logits, axes[0])}"
    return "its columns are spread over one dimension of the mesh: " + (
        f"pass {parts} as group" if is_spread else f"call vocab_parallel_caref_loss with {parts}"
    )


def _weight(name: str, weight: Tensor, function: str) -> str:
    axes, is_spread = _axes(weight, 0), function == "vocab_parallel_linear_caref_loss"
    if _is_whole(weight):
        whole = "every rank holds all of it"
        return f"{whole}: pass {name}.to_local()" + (" to linear_caref_loss" if is_spread else "")
    if axes is None or len(axes) != 1 or sum(placement.is_shard() for placement in weight.placements) > 1:
        return f"pass {name}.full_tensor()" + (" to linear_caref_loss" if is_spread else "")
    parts = f"{name}.to_local() and the group {_group(name, weight, axes[0])}"
    return SHARDED_HEAD.format(f"pass {parts}" if is_spread else f"call vocab_parallel_linear_caref_loss with {parts}")


def _hidden(name: str, hidden: Tensor, function: str) -> str:
    if _is_whole(hidden):
        return f"every rank holds all of it: pass {name}.to_local()"
    if function == "linear_caref_loss" and _axes(hidden, hidden.dim() - 1) == []:
        return (
            f"the ranks hold whole rows: pass {name}.to_local() and the labels of its rows; the number of items of all "
            f"ranks is num_items"
        )
    return f"pass {name}.full_tensor()"


def _rows(name: str, rows: Tensor, function: str) -> str:  # noqa: ARG001
    if _is_whole(rows):
        return f"every rank holds all of it: pass {name}.to_local()"
    if _axes(rows, 0) is None:
        return f"pass {name}.full_tensor()"
    return f"pass {name}.to_local() for the rows of this rank, or {name}.full_tensor() for all"
