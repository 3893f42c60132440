"""A LightningModule, on one process or several.

    python examples/lightning_module.py --accumulation 4 --fuse-head
    torchrun --nproc-per-node 2 examples/lightning_module.py --accumulation 4 --fuse-head

Accumulation: automatic optimization divides what ``training_step`` returns by ``accumulate_grad_batches``.  Ranks: the
strategy averages gradients over them.  Lightning hands over one micro-batch at a time, so the loader counts the labels
of the optimizer step ahead and sends the number along.
"""

import itertools
import os

import lightning.pytorch as pl
import torch
from tiny import STEP_SIZE, causal_model, examples, options
from torch.utils.data import DataLoader, DistributedSampler

from caref_kernels.integrations import count_items
from caref_kernels.integrations.transformers import apply_caref


class CountedBatches:
    """The batches of ``loader`` with the ``num_items_in_batch`` of their optimizer step."""

    def __init__(self, loader, module):
        self.loader, self.module = loader, module

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        trainer, batches = self.module.trainer, iter(self.loader)
        steps = trainer.accumulate_grad_batches
        while micro_batches := list(itertools.islice(batches, steps)):
            labels = [batch["labels"].to(self.module.device) for batch in micro_batches]
            items = count_items(labels, averaged_over=trainer.world_size * steps)
            yield from ({**batch, "num_items_in_batch": items} for batch in micro_batches)


class CarefModule(pl.LightningModule):
    def __init__(self, model, lr):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        # Over whole steps, the mean over micro-batches and ranks is the mean over the steps.
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        return loss

    def train_dataloader(self):
        data, trainer = examples(self.model.config.vocab_size), self.trainer
        sampler = DistributedSampler(data, trainer.world_size, trainer.global_rank, shuffle=False)
        size = STEP_SIZE // trainer.world_size // trainer.accumulate_grad_batches
        return CountedBatches(DataLoader(data, batch_size=size, sampler=sampler), self)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def main(argv=None):
    args = options(__doc__, argv)
    model = apply_caref(causal_model(args.model), lambda_sced=0.1, lambda_kl=0.1, fuse_head=args.fuse_head)
    trainer = pl.Trainer(
        accelerator={"cpu": "cpu", "cuda": "gpu"}[args.device],
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        accumulate_grad_batches=args.accumulation,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(CarefModule(model.train(), args.lr))
    losses = [trainer.callback_metrics["loss"].item()]
    print("mean loss:", losses)
    return model, losses


if __name__ == "__main__":
    main()
