"""A plain PyTorch loop under FSDP2 (``fully_shard``).

    torchrun --nproc-per-node 2 examples/fsdp2.py --accumulation 4 --fuse-head

Accumulation: nothing is divided, ``backward`` adds the micro-batches up.  Ranks: the reduce-scatter averages gradients
over them, so ``count_items`` is told so.  ``apply_caref`` may come before or after ``fully_shard``.  With
``--fuse-head`` the loss is made inside of the head's forward pass, where its weight is gathered.
"""

import itertools

import torch
import torch.distributed as dist
from tiny import STEP_SIZE, causal_model, examples, options
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from caref_kernels.integrations import count_items
from caref_kernels.integrations.transformers import apply_caref


def main(argv=None):
    args = options(__doc__, argv)
    if not dist.is_initialized():
        dist.init_process_group()
    ranks = dist.get_world_size()
    mesh = init_device_mesh(args.device, (ranks,))
    model = causal_model(args.model).to(args.device).train()
    for layer in [module for module in model.modules() if type(module).__name__ in model._no_split_modules]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    apply_caref(model, lambda_sced=0.1, lambda_kl=0.1, fuse_head=args.fuse_head)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    data = examples(model.config.vocab_size)
    sampler = DistributedSampler(data, shuffle=False)
    batches = iter(DataLoader(data, batch_size=STEP_SIZE // ranks // args.accumulation, sampler=sampler))
    losses = []
    while micro_batches := list(itertools.islice(batches, args.accumulation)):
        micro_batches = [{name: value.to(args.device) for name, value in batch.items()} for batch in micro_batches]
        items = count_items([batch["labels"] for batch in micro_batches], averaged_over=ranks)
        step_loss = torch.zeros((), device=args.device)
        for batch in micro_batches:
            model.set_requires_gradient_sync(batch is micro_batches[-1])
            loss = model(**batch, num_items_in_batch=items).loss
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
