"""An encoder-decoder model in transformers' Seq2SeqTrainer, on one process or several.

    python examples/seq2seq_t5.py --model google/flan-t5-small --accumulation 4 --fuse-head
    torchrun --nproc-per-node 2 examples/seq2seq_t5.py --accumulation 4

Accumulation and ranks: as in trainer.py, nothing is to be passed.  Labels are not shifted; T5, BART and the like make
their decoder's inputs from them, so that a batch needs input_ids, attention_mask and labels only.
"""

from tiny import STEP_SIZE, examples, options, seq2seq_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from caref_kernels.integrations.transformers import attach_caref


def main(argv=None):
    args = options(__doc__, argv)
    model = seq2seq_model(args.model)
    arguments = Seq2SeqTrainingArguments(
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
    # With text of several lengths: data_collator=DataCollatorForSeq2Seq(tokenizer, model=model).
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=examples(model.config.vocab_size))
    attach_caref(trainer, lambda_sced=0.1, lambda_kl=0.1, fuse_head=args.fuse_head)
    trainer.train()  # logs loss, ce, sced, kl and entropy
    return model, [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    main()
