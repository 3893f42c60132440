"""A plain PyTorch loop under DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/ddp.py --accumulation 4 --fuse-head

Accumulation: nothing is divided, ``backward`` adds the micro-batches up.  Ranks: DDP averages gradients over them, so
``count_items`` is told so, and the step is that of the mean over all labels, however unevenly ranks have them.
"""

import contextlib
import itertools

import torch
import torch.distributed as dist
from tiny import STEP_SIZE, causal_model, examples, options
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from caref_kernels.integrations import count_items
from caref_kernels.integrations.transformers import apply_caref


def main(argv=None):
    args = options(__doc__, argv)
    if not dist.is_initialized():
        dist.init_process_group()
    ranks = dist.get_world_size()
    model = apply_caref(causal_model(args.model), lambda_sced=0.1, lambda_kl=0.1, fuse_head=args.fuse_head)
    ddp = DistributedDataParallel(model.to(args.device).train())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=args.lr)
    data = examples(model.config.vocab_size)
    sampler = DistributedSampler(data, shuffle=False)
    batches = iter(DataLoader(data, batch_size=STEP_SIZE // ranks // args.accumulation, sampler=sampler))
    losses = []
    while micro_batches := list(itertools.islice(batches, args.accumulation)):
        micro_batches = [{name: value.to(args.device) for name, value in batch.items()} for batch in micro_batches]
        items = count_items([batch["labels"] for batch in micro_batches], averaged_over=ranks)
        step_loss = torch.zeros((), device=args.device)
        for batch in micro_batches:
            with contextlib.nullcontext() if batch is micro_batches[-1] else ddp.no_sync():
                loss = ddp(**batch, num_items_in_batch=items).loss
                loss.backward()
            step_loss += loss.detach() / ranks
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(step_loss)  # the mean over all labels, for the record
        losses.append(step_loss.item())
    if dist.get_rank() == 0:
        print("loss of each step:", losses)
    return model, losses


if __name__ == "__main__":
    main()
