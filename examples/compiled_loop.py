"""A plain PyTorch loop around a compiled model, on one device.

    python examples/compiled_loop.py --accumulation 4 --fuse-head

Accumulation: nothing is divided, ``backward`` adds the micro-batches up, so ``count_items`` needs no ``averaged_over``.
"""

import itertools

import torch
from tiny import STEP_SIZE, causal_model, examples, options
from torch.utils.data import DataLoader

from caref_kernels.integrations import count_items
from caref_kernels.integrations.transformers import apply_caref


def main(argv=None, compiler="inductor"):
    args = options(__doc__, argv)
    model = apply_caref(causal_model(args.model), lambda_sced=0.1, lambda_kl=0.1, fuse_head=args.fuse_head)
    compiled = torch.compile(model.to(args.device).train(), backend=compiler)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    batches = iter(DataLoader(examples(model.config.vocab_size), batch_size=STEP_SIZE // args.accumulation))
    losses = []
    while micro_batches := list(itertools.islice(batches, args.accumulation)):
        micro_batches = [{name: value.to(args.device) for name, value in batch.items()} for batch in micro_batches]
        items = count_items([batch["labels"] for batch in micro_batches])
        step_loss = torch.zeros((), device=args.device)
        for batch in micro_batches:
            loss = compiled(**batch, num_items_in_batch=items).loss
            loss.backward()
            step_loss += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss.item())  # the mean over all labels
    print("loss of each step:", losses)
    return model, losses


if __name__ == "__main__":
    main()
