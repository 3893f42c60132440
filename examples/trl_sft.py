"""Supervised fine-tuning with TRL, on one process or several.

    python examples/trl_sft.py --accumulation 4 --fuse-head
    torchrun --nproc-per-node 2 examples/trl_sft.py --accumulation 4 --fuse-head

Accumulation and ranks: as in trainer.py, nothing is to be passed.  TRL's own SFTTrainer never asks a model for its
loss; CarefSFTTrainer does, in one forward pass per micro-batch, and logs TRL's metrics from the same pass.
"""

from datasets import Dataset
from tiny import STEP_SIZE, causal_model, examples, options, tokenizer
from trl import SFTConfig

from caref_kernels import CarefConfig
from caref_kernels.integrations.trl import CarefSFTTrainer


def main(argv=None):
    args = options(__doc__, argv)
    model = causal_model(args.model)
    config = SFTConfig(
        output_dir=args.output,
        use_cpu=args.device == "cpu",
        bf16=args.device != "cpu",
        gradient_checkpointing=False,
        max_length=None,  # with a length, TRL drops the examples that have no label left
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
    config.per_device_train_batch_size = STEP_SIZE // config.world_size // args.accumulation
    columns = ("input_ids", "labels")  # or text, messages, prompt and completion: see TRL's documentation
    rows = examples(model.config.vocab_size)
    trainer = CarefSFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({name: [row[name].tolist() for row in rows] for name in columns}),
        processing_class=tokenizer(args.model),
        caref=CarefConfig(lambda_sced=0.1, lambda_kl=0.1),
        fuse_head=args.fuse_head,
    )
    trainer.train()  # logs loss, ce, sced, kl, entropy and mean_token_accuracy
    return model, [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    main()
