"""What to pass instead of a DTensor that cannot be taken, which depends on its placements and on the function called.

The losses exchange what they need by themselves, so they take the part of a rank.  ``caref_loss`` alone takes a
DTensor, where one dimension of the mesh shards its last dimension and nothing else is sharded.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

SHARDED_HEAD = (
    "if fully_shard (FSDP2) shards it, the ranks hold parts of the weight for different batches, which is no "
    "sharded vocabulary: compute the loss inside of the module's forward, where the weight is whole, or use "
    "caref_kernels.integrations.transformers.apply_caref(model, fuse_head=True); if tensor parallelism shards the "
    "vocabulary, pass {name}.to_local() and shard=VocabShard.of_dtensor({name}, 0)"
)


def is_dtensor(tensor: object) -> bool:
    """By its name, because importing torch.distributed.tensor takes longer than the rest of the package."""
    return type(tensor).__name__ == "DTensor"


def shard_axis(tensor: Tensor, dim: int) -> int | None:
    """The one mesh dimension that shards ``dim`` in equal parts; ``None`` where there is none, or more than one."""
    axes = _axes(tensor, dim % tensor.dim())
    return axes[0] if axes is not None and len(axes) == 1 else None


def refuse(name: str, tensor: Tensor, function: str) -> NoReturn:
    """Raise TypeError for the argument ``name`` of ``function``, with what to pass, or to call, instead."""
    remedy = {"logits": _logits, "weight": _weight, "bias": _weight, "hidden": _hidden}.get(name, _rows)
    placements = ", ".join(map(str, tensor.placements))
    raise TypeError(f"{name} is a DTensor, placed [{placements}]: {remedy(name, tensor, function)}")


def _axes(tensor: Tensor, dim: int) -> list[int] | None:
    """The mesh dimensions that shard ``dim``; ``None`` where the parts are neither copies nor plain shards."""
    if any(type(placement).__name__ not in ("Shard", "Replicate") for placement in tensor.placements):
        return None
    return [axis for axis, placement in enumerate(tensor.placements) if placement.is_shard(dim)]


def _is_whole(tensor: Tensor) -> bool:
    return all(placement.is_replicate() for placement in tensor.placements)


def _logits(name: str, logits: Tensor, function: str) -> str:
    axes = _axes(logits, logits.dim() - 1)
    if _is_whole(logits):
        return f"every rank holds all of it: pass {name}.to_local()"
    if axes is None or len(axes) > 1 or (axes and function == "fused_sced"):
        return f"pass {name}.full_tensor()"
    if not axes:
        return (
            f"the ranks hold whole rows: pass {name}.to_local() and the labels (or valid) of its rows; the number of "
            f"items of all ranks is num_items"
        )
    return (
        f"both its rows and its columns are sharded: pass {name}.to_local(), the labels of its rows, and "
        f"shard=VocabShard.of_dtensor({name}, -1)"
    )


def _weight(name: str, weight: Tensor, function: str) -> str:  # noqa: ARG001
    if _is_whole(weight):
        return f"every rank holds all of it: pass {name}.to_local()"
    if shard_axis(weight, 0) is None or sum(placement.is_shard() for placement in weight.placements) > 1:
        return f"pass {name}.full_tensor()"
    return SHARDED_HEAD.format(name=name)


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
