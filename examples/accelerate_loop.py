"""A loop with Accelerate, on one process or several.

    accelerate launch examples/accelerate_loop.py --accumulation 4 --fuse-head

Accumulation: ``Accelerator.backward`` divides every loss by ``gradient_accumulation_steps`` (DeepSpeed does it for it).
Ranks: DDP, FSDP or DeepSpeed averages gradients over them.  ``count_items`` is told of both.
"""

import contextlib
import itertools

import torch
from accelerate import Accelerator
from tiny import STEP_SIZE, causal_model, examples, options
from torch.utils.data import DataLoader

from caref_kernels.integrations import count_items
from caref_kernels.integrations.transformers import apply_caref


def main(argv=None):
    args = options(__doc__, argv)
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulation, cpu=args.device == "cpu")
    ranks, steps = accelerator.num_processes, accelerator.gradient_accumulation_steps
    model = apply_caref(causal_model(args.model), lambda_sced=0.1, lambda_kl=0.1, fuse_head=args.fuse_head)
    data = examples(model.config.vocab_size)
    model, optimizer, loader = accelerator.prepare(
        model.train(),
        torch.optim.SGD(model.parameters(), lr=args.lr),
        DataLoader(data, batch_size=STEP_SIZE // ranks // steps),
    )
    batches = iter(loader)
    losses = []
    while micro_batches := list(itertools.islice(batches, steps)):
        items = count_items([batch["labels"] for batch in micro_batches], averaged_over=ranks * steps)
        step_loss = torch.zeros((), device=accelerator.device)
        for batch in micro_batches:
            # Not accelerator.accumulate(model): it takes the fetch of the last batch for the end of the accumulation.
            accelerator.sync_gradients = batch is micro_batches[-1]
            with contextlib.nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
                loss = model(**batch, num_items_in_batch=items).loss
                accelerator.backward(loss)
            optimizer.step()  # does nothing before the last micro-batch
            optimizer.zero_grad()
            step_loss += loss.detach() / steps
        losses.append(accelerator.reduce(step_loss, "mean").item())  # the mean over all labels
    accelerator.print("loss of each step:", losses)
    return accelerator.unwrap_model(model), losses


if __name__ == "__main__":
    main()
