"""The loss of logits, or of a head, whose vocabulary is spread over the ranks of a process group."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backends, dtensors
from .autograd import LinearCarefFunction, LinearPlan, ShardFunction, ShardPlan
from .backends.reference import labelled
from .checks import check_inplace, check_labels, check_logits, check_order
from .config import CarefConfig, HeadOptions, Reduction
from .functional import CarefOutput, divisor_of, name_results
from .fused_linear import check_arguments, check_head, needed_gradients
from .objective import MAX_COLUMNS
from .shards import GroupExchange, ShardRows, fingerprint
from .sparsity import Sparsity

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """The columns of a vocabulary that this rank holds: ``columns`` of ``total``, from ``first_column`` on.

    Args:
        group: process group of the ranks that share the vocabulary; ``None`` is the default group.
        first_column, columns, total: non-negative integers; shards follow one another in any order of ranks, without
            gap or overlap, and may be of any size, also 0.
    Raises:
        ValueError: the shard is not inside the vocabulary.
    """

    group: dist.ProcessGroup | None
    first_column: int
    columns: int
    total: int

    def __post_init__(self) -> None:
        end = self.first_column + self.columns
        if not (0 <= self.first_column <= end <= self.total and 0 < self.total <= MAX_COLUMNS):
            raise ValueError(
                f"first_column, columns and total must describe columns inside [0, total), total in "
                f"[1, {MAX_COLUMNS}]; got {self.first_column}, {self.columns} and {self.total}"
            )

    @classmethod
    def gather(cls, columns: int, group: dist.ProcessGroup | None = None, device: str = "cpu") -> VocabShard:
        """The shard of a rank that holds ``columns``, where ranks hold the vocabulary in their order.

        One small all-gather; make it once, when the weight is sharded, and pass it to every call.  ``device`` is that
        of the group's tensors ("cuda" for NCCL).  That the ranks hold different columns is not checked.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        return cls._of(_gathered([columns], group, device)[:, 0], group)

    @classmethod
    def of_dtensor(cls, tensor: Tensor, dim: int) -> VocabShard:
        """The shard of a rank whose DTensor has the vocabulary as dimension ``dim``, sharded on a 1-D mesh."""
        mesh, total = tensor.device_mesh, tensor.size(dim)
        width = -(-total // mesh.size())  # as DTensor splits: equal parts, the last ones shorter or empty
        first = min(mesh.get_local_rank() * width, total)
        return cls(mesh.get_group(), first, min(width, total - first), total)

    @classmethod
    def _of(cls, sizes: Tensor, group: dist.ProcessGroup | None) -> VocabShard:
        rank = _distributed().get_rank(group)
        return cls(group, int(sizes[:rank].sum()), int(sizes[rank]), int(sizes.sum()))


def vocab_parallel_caref_loss(
    local_logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | VocabShard | None = None,
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
    inplace_backward: bool = CarefConfig.inplace_backward,
    return_terms: bool = CarefConfig.return_terms,
) -> Tensor | CarefOutput:
    r"""The CAREF objective of logits whose columns are spread over the ranks of ``group``.

    Every rank calls it with its columns of the same rows and the same labels, and gets the same loss, bit for bit; its
    backward gives the gradient of its columns.

    Args:
        local_logits: ``(..., V_local)``, this rank's columns, in the order of the ranks; as in :func:`caref_loss`
            otherwise.  Or a DTensor sharded over its last dimension (and nothing else), which brings its own group.
        labels: ``(...)``, int32 or int64, among all columns, the same on all ranks.
        group: process group; ``None`` is the default one.  A :class:`VocabShard` saves the exchange of the sizes, and
            what goes with it: an error where every rank holds the same columns and no label is beyond them, as when
            all have whole logits (seen where a corner of 64 by 64 numbers has at least 32 different ones).
        sparsity: exact, from the gathered k largest logits of every rank: one all-gather of (N, max k) values and two
            more sums, and max k is read by the host.  ``EntropyTopK`` without ``k_max`` may ask for many.
        vocab_size: V of U = 1/V; by default the number of columns of all ranks.
        alpha, beta, lambda_sced, lambda_kl, ignore_index, reduction, num_items, backend, inplace_backward,
            return_terms: as in :func:`caref_loss`, and the same on all ranks.
    Returns:
        The loss, or :class:`CarefOutput`; float32 (float64 for float64 logits), in nats.
    Raises:
        IndexError, TypeError, ValueError, NotImplementedError: as in :func:`caref_loss`; on all ranks alike if all are
            called alike, and before anything is exchanged.
        RuntimeError: torch.distributed is not initialised.
        ValueError: also where the ranks' columns are not parts of one vocabulary, see ``group``.
    Communication: per row one MAX of 4 bytes and one SUM of 80 (alpha 2, beta 1; 56 to 152 for alpha 2 or 4 with beta
        0, 1 or 2); for other exponents a SUM of 32 and one of 16.  None in the backward.
    Precision, Memory: as in :func:`caref_loss`.  The sums run in plain torch, in blocks of rows; the gradient in the
        backend's kernel.  Not inside torch.compile.
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
        inplace_backward=inplace_backward,
        return_terms=return_terms,
    )
    return _logits_loss(local_logits, labels, group, num_items, config)


def vocab_parallel_linear_caref_loss(
    hidden: Tensor,
    local_weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | VocabShard | None = None,
    local_bias: Tensor | None = None,
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
    reduce_hidden: bool = True,
) -> Tensor | CarefOutput:
    r""":func:`caref_kernels.linear_caref_loss` with the rows of the weight spread over the ranks of ``group``.

    Args:
        hidden: ``(..., D)``, the same on all ranks.
        local_weight: ``(V_local, D)``, this rank's rows of the head, in the order of the ranks.
        local_bias: ``(V_local,)`` or ``None``.
        logit_scale, softcap, chunk_rows: as in :func:`linear_caref_loss`, and the same on all ranks.
        reduce_hidden: add the ranks' gradients of ``hidden``, one SUM of its size and dtype in the backward; False
            leaves each rank its part, for a surrounding layer that adds them itself.
        labels, group, the other options: as in :func:`vocab_parallel_caref_loss` and :func:`linear_caref_loss`.
    Returns, Raises, Precision: as in these two.
    Communication: that of :func:`vocab_parallel_caref_loss` for every chunk of rows, and the gradient of ``hidden``.
    Memory: as in :func:`linear_caref_loss`, for V_local columns.
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
    if not isinstance(reduce_hidden, bool):
        raise TypeError(f"reduce_hidden must be True or False; got {reduce_hidden!r}")
    options = HeadOptions(logit_scale=logit_scale, softcap=softcap, chunk_rows=chunk_rows)
    head = (hidden, local_weight, local_bias)
    return _linear_loss(head, labels, group, num_items, config, (options, reduce_hidden))


def _logits_loss(local_logits: Tensor, labels: Tensor, group, num_items, config: CarefConfig):
    _check_eager()
    signature = "vocab_parallel_caref_loss takes (local_logits, labels)"
    check_order(local_logits, labels, labels, ("local_logits", "labels"), signature)
    if dtensors.is_dtensor(local_logits):
        local_logits, group = _local_part(local_logits, group)
    check_logits("local_logits", local_logits, "vocab_parallel_caref_loss", least_columns=0)
    labels = check_labels(labels, local_logits, "local_logits")
    divisor = divisor_of(local_logits, labels, num_items, config)
    shard = _shard(group, local_logits.size(-1), local_logits, labels, config)
    # The sums see through a negative bit, the kernels of the gradient would not.
    logits = local_logits.resolve_neg().reshape(math.prod(local_logits.shape[:-1]), local_logits.size(-1))
    if config.inplace_backward:
        check_inplace(local_logits, logits)
    plan = ShardPlan(
        rows=_shard_rows(shard, logits, config),
        weights=(1.0, float(config.lambda_sced), float(config.lambda_kl)),
        per_row=config.reduction == "none",
        any_items=divisor.any_items,
        inplace_backward=config.inplace_backward,
    )
    loss, terms, stats = ShardFunction.apply(logits, labels, divisor.value, plan)
    loss = loss.reshape(local_logits.shape[:-1]) if plan.per_row else loss
    return name_results(loss, terms, stats, divisor, None, config)


def _linear_loss(head: tuple[Tensor, Tensor, Tensor | None], labels: Tensor, group, num_items, config, choices):  # noqa: PLR0913
    _check_eager()
    hidden, weight, bias = head
    check_arguments(hidden, weight, labels, "vocab_parallel_linear_caref_loss takes (hidden, local_weight, labels)")
    dtype = check_head(hidden, weight, bias, "vocab_parallel_linear_caref_loss")
    labels = check_labels(labels, hidden, "hidden")
    divisor = divisor_of(hidden, labels, num_items, config)
    shard = _shard(group, weight.size(0), weight, labels, config)
    rows = hidden.reshape(-1, hidden.size(-1))
    options, reduce_hidden = choices
    shard_rows = _shard_rows(shard, hidden.new_empty((1, 1), dtype=dtype), config)
    plan = LinearPlan(
        spec=shard_rows.spec,
        backend=shard_rows.backend,
        weights=(1.0, float(config.lambda_sced), float(config.lambda_kl)),
        per_row=config.reduction == "none",
        any_items=divisor.any_items,
        with_terms=config.return_terms,
        needs=needed_gradients(rows, weight, bias),
        options=options,
        dtype=dtype,
        shard=shard_rows,
        reduce_hidden=reduce_hidden,
    )
    loss, terms, stats = LinearCarefFunction.apply(rows, weight, bias, labels, divisor.value, None, None, plan)
    loss = loss.reshape(hidden.shape[:-1]) if plan.per_row else loss
    return name_results(loss, terms, stats, divisor, None, config)


def _shard_rows(shard: VocabShard, logits: Tensor, config: CarefConfig) -> ShardRows:
    spec = config.row_spec(shard.total).for_columns(shard.total)
    name = backends.select(config.backend, logits)
    common = -(-shard.total // _distributed().get_world_size(shard.group))
    return ShardRows(GroupExchange(shard.group), shard.first_column, shard.total, name, spec, common)


def _shard(group, columns: int, part: Tensor, labels: Tensor, config: CarefConfig) -> VocabShard:
    """The columns of this rank, which are the last dimension of logits and the rows of a weight."""
    dist = _distributed()
    if isinstance(group, VocabShard):
        if group.columns != columns:
            raise ValueError(f"group: the VocabShard has {group.columns} columns, but this rank holds {columns}")
        return group
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, a VocabShard or None; got {group!r}")
    last = int(labels.masked_fill(~labelled(labels, config.ignore_index), -1).max()) if labels.numel() else -1
    ranks = _gathered([columns, fingerprint(part), last], group, part.device)
    if len(ranks) > 1 and bool((ranks == ranks[0]).all()) and ranks[0, 1] and 0 <= last < columns:
        raise ValueError(
            f"every rank holds the same {columns} columns, and no label is beyond them: they look like whole logits "
            f"(or a whole head), which would be taken for {len(ranks)} x {columns} columns: use caref_loss (or "
            f"linear_caref_loss), or pass a VocabShard as group if equal columns are meant"
        )
    return VocabShard._of(ranks[:, 0], group)


def _gathered(own: list[int], group: dist.ProcessGroup | None, device: torch.device | str) -> Tensor:
    """(R, len(own)) int64 on the CPU: the numbers of every rank, in one exchange."""
    dist = _distributed()
    numbers = torch.tensor(own, device=device)
    ranks = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, numbers, group)
    return torch.stack(ranks).cpu()


def _distributed():
    """torch.distributed, imported late because it is not small, once it can be used."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "vocab-parallel losses need torch.distributed: call torch.distributed.init_process_group first, or use "
            "caref_loss and linear_caref_loss for a vocabulary on one rank"
        )
    return dist


def _check_eager() -> None:
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "vocab-parallel losses do not run inside torch.compile; call them outside of the compiled function, or "
            "wrap the call in torch.compiler.disable"
        )


def _local_part(logits: Tensor, group: object) -> tuple[Tensor, VocabShard]:
    """The local columns of a DTensor, differentiable, and where they are."""
    if group is not None:
        raise ValueError(f"group must be None for a DTensor, which brings its own; got {group!r}")
    placements, mesh = logits.placements, logits.device_mesh
    if mesh.ndim != 1 or not placements[0].is_shard(logits.dim() - 1):
        dtensors.refuse("local_logits", logits, "vocab_parallel_caref_loss")
    return logits.to_local(grad_placements=placements), VocabShard.of_dtensor(logits, -1)
