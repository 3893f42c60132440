"""DeepSpeed's ZeRO-3: parameters, gradients and optimizer states are split over the ranks.

    deepspeed --num_gpus 2 examples/deepspeed_zero3.py --accumulation 4 --fuse-head
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/deepspeed_zero3.py --device cpu

Accumulation: ``engine.backward`` divides every loss by ``gradient_accumulation_steps``.  Ranks: the engine averages
gradients over them.  ``count_items`` is told of both.  With ``--fuse-head`` the loss is made inside of the head's
forward pass, where its weight is gathered.
"""

import itertools

import deepspeed
import torch
import torch.distributed as dist
from tiny import STEP_SIZE, causal_model, examples, options
from torch.utils.data import DataLoader, DistributedSampler

from caref_kernels.integrations import count_items
from caref_kernels.integrations.transformers import apply_caref


def main(argv=None):
    args = options(__doc__, argv)
    deepspeed.init_distributed()
    ranks, steps = dist.get_world_size(), args.accumulation
    size = STEP_SIZE // ranks // steps
    model = apply_caref(causal_model(args.model), lambda_sced=0.1, lambda_kl=0.1, fuse_head=args.fuse_head)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}  # 0 splits even the parameters of a tiny model
    engine, _, _, _ = deepspeed.initialize(
        model=model.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=args.lr),
        config={
            "train_micro_batch_size_per_gpu": size,
            "gradient_accumulation_steps": steps,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # the default clips at 1.0
        },
    )
    data = examples(model.config.vocab_size)
    batches = iter(DataLoader(data, batch_size=size, sampler=DistributedSampler(data, shuffle=False)))
    losses = []
    while micro_batches := list(itertools.islice(batches, steps)):
        micro_batches = [{name: value.to(engine.device) for name, value in batch.items()} for batch in micro_batches]
        items = count_items([batch["labels"] for batch in micro_batches], averaged_over=ranks * steps)
        step_loss = torch.zeros((), device=engine.device)
        for batch in micro_batches:
            loss = engine(**batch, num_items_in_batch=items).loss
            engine.backward(loss)
            engine.step()  # updates the parameters after the last micro-batch
            step_loss += loss.detach() / (ranks * steps)
        dist.all_reduce(step_loss)  # the mean over all labels, for the record
        losses.append(step_loss.item())
    if dist.get_rank() == 0:
        print("loss of each step:", losses)
    return model, losses


if __name__ == "__main__":
    main()
