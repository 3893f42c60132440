"""transformers' Trainer, on one process or several.

    python examples/trainer.py --accumulation 4 --fuse-head
    torchrun --nproc-per-node 2 examples/trainer.py --accumulation 4 --fuse-head

Accumulation and ranks: the Trainer counts the labels of all micro-batches of all ranks, divides by their number and
undoes the average of DDP over the ranks.  Nothing is to be passed.
"""

from tiny import STEP_SIZE, causal_model, examples, options
from transformers import Trainer, TrainingArguments

from caref_kernels.integrations.transformers import attach_caref


def main(argv=None):
    args = options(__doc__, argv)
    model = causal_model(args.model)
    arguments = TrainingArguments(
        output_dir=args.output,
        use_cpu=args.device == "cpu",
        optim="sgd",
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_train_epochs=1,
        gradient_accumulation_steps=args.accumulation,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    arguments.per_device_train_batch_size = STEP_SIZE // arguments.world_size // args.accumulation
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(model.config.vocab_size))
    attach_caref(trainer, lambda_sced=0.1, lambda_kl=0.1, fuse_head=args.fuse_head)
    trainer.train()  # logs loss, ce, sced, kl and entropy
    return model, [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    main()
