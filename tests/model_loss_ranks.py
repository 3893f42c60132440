"""The checks of each process of test_model_loss_ranks.py: ``apply_caref`` in data and tensor parallelism, over gloo."""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from pathlib import Path

import peft
import tiny_heads
import tiny_trainers
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from caref_kernels.integrations.transformers import apply_caref, attach_caref, remove_caref
from caref_kernels.testing import IDENTITIES, check_identity

FUSED = (False, True)
# What torchrun would set, for a Trainer.
VARIABLES = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}


def run(rank: int, world: int, folder: Path) -> None:
    """Run all checks of one process."""
    warnings.simplefilter("ignore")
    check_data_parallel(rank, world)
    check_fully_sharded(rank, world)
    check_mixed_precision(rank, world)
    check_tensor_parallel(rank, world)
    check_tensor_parallel_refusals(rank, world)
    check_trainer_records(rank, world, folder)


def batch_of(rank: int, model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and labels of one rank: different numbers of labels, and none on the second."""
    inputs, labels = tiny_heads.batch(model)
    inputs = {name: value.roll(rank, -1) for name, value in inputs.items()}
    return inputs, torch.full_like(labels, -100) if rank == 1 else labels.roll(rank, -1)


def expected_of(model: torch.nn.Module, world: int):
    """Number of items, and the float64 gradients of the loss of all ranks' batches together."""
    total, number, base = 0.0, 0, model.get_base_model() if hasattr(model, "get_base_model") else model
    gradients: dict[str, torch.Tensor] = {}
    for rank in range(world):
        inputs, labels = batch_of(rank, base)
        count = int((labels if base.config.is_encoder_decoder else labels[..., 1:]).ne(-100).sum())
        if count == 0:
            continue
        loss, parts = tiny_heads.exact(model, inputs, labels)
        number, total = number + count, total + count * loss
        for name, part in parts.items():
            gradients[name] = gradients.get(name, 0.0) + count * part
    return number, total / number, {name: part / number for name, part in gradients.items()}


def check(wrapped, model, expected, rank: int, world: int, label: str) -> None:
    """Check one pass and its gradients, which the wrapper of the model averages over the ranks."""
    number, total, gradients = expected
    inputs, labels = batch_of(rank, model.get_base_model() if hasattr(model, "get_base_model") else model)
    # Gradients are averaged over the ranks, so each divides by its share of the items.
    loss = wrapped(**inputs, labels=labels, num_items_in_batch=torch.tensor(number / world)).loss
    shares = loss.detach().clone()
    dist.all_reduce(shares)
    check_identity(shares / world, total, "float32_terms", label)
    loss.backward()
    check_gradients(model, gradients, label)


def check_gradients(model, gradients, label: str, identity: str = "float32_gradient") -> None:
    scale = max(gradient.norm() for gradient in gradients.values())
    for name, value in model.named_parameters():
        if name in gradients:
            found = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
            error = (found - gradients[name]).norm() / scale
            if not error <= IDENTITIES[identity]:
                raise AssertionError(f"{label}: the gradient of {name} is off by {error:.3g}")


def with_own_head():
    """LoRA with a trained copy of the head."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    torch.manual_seed(3)
    return peft.get_peft_model(tiny_heads.make("llama"), config)


def check_data_parallel(rank: int, world: int) -> None:
    """DistributedDataParallel, with and without a search for unused parameters."""
    builders = {kind: lambda kind=kind: tiny_heads.make(kind) for kind in ("llama", "smollm2", "t5", "gemma2")}
    for name, build in {**builders, "own head": with_own_head}.items():
        expected = expected_of(build(), world)
        for fuse_head, find in itertools.product(FUSED, (False, True)):
            for static in (False, True) if not find else (False,):
                model = apply_caref(build(), fuse_head=fuse_head)
                wrapped = torch.nn.parallel.DistributedDataParallel(
                    model, find_unused_parameters=find, static_graph=static
                )
                check(wrapped, model, expected, rank, world, f"DDP {name} {fuse_head=} {find=} {static=}")


def check_fully_sharded(rank: int, world: int) -> None:
    """FSDP2, applied before and after sharding, the head by itself or with the root."""
    mesh = init_device_mesh("cpu", (world,))
    for kind in ("llama", "smollm2", "t5", "cohere"):
        expected = expected_of(tiny_heads.make(kind), world)
        for fuse_head, first, own in itertools.product(FUSED, ("caref", "shard"), FUSED):
            model = tiny_heads.make(kind)
            if own and model.config.tie_word_embeddings:
                continue
            if first == "caref":
                apply_caref(model, fuse_head=fuse_head)
            layers = [*model.encoder.block, *model.decoder.block] if kind == "t5" else model.model.layers
            for part in [*layers, *([model.lm_head] if own else []), model]:
                fully_shard(part, mesh=mesh)
            if first == "shard":
                apply_caref(model, fuse_head=fuse_head)
            label = f"FSDP2 {kind} {fuse_head=} {first=} {own=}"
            check(model, model, expected, rank, world, label)
            remove_caref(model)


def check_mixed_precision(rank: int, world: int) -> None:
    """Parameters in bfloat16 by FSDP2: the root may cast its outputs, the head may not."""
    mesh = init_device_mesh("cpu", (world,))
    expected = expected_of(tiny_heads.make("llama"), world)
    inputs, labels = batch_of(0, tiny_heads.make("llama"))
    for own, output_dtype in ((False, torch.float32), (True, None), (True, torch.bfloat16)):
        model = apply_caref(tiny_heads.make("llama"), fuse_head=True)
        inside = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        outside = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype)
        for part in model.model.layers:
            fully_shard(part, mesh=mesh, mp_policy=inside)
        for part in [model.lm_head, model] if own else [model]:
            fully_shard(part, mesh=mesh, mp_policy=outside)
        if own and output_dtype is not None:
            try:
                model(**inputs, labels=labels)
            except RuntimeError as error:
                if "the output of the head was cast to torch.bfloat16" not in str(error):
                    raise
                continue
            raise AssertionError("a head whose output is cast to bfloat16 was accepted")
        loss = model(**inputs, labels=labels, num_items_in_batch=expected[0]).loss
        check_identity(loss.detach(), expected[1], "bfloat16_head", "mixed precision")


def parallel_plan(kind: str, output) -> dict:
    """A plan of torch's tensor parallelism: the layers' feed-forward part, and the head over the vocabulary."""
    return {
        "model.layers.0.mlp.gate_proj": ColwiseParallel(),
        "model.layers.0.mlp.up_proj": ColwiseParallel(),
        "model.layers.0.mlp.down_proj": RowwiseParallel(),
        "lm_head": output,
    }


def check_tensor_parallel(rank: int, world: int) -> None:
    """A head sharded over the vocabulary whose output is gathered, or stays sharded as a DTensor."""
    mesh = init_device_mesh("cpu", (world,))
    layouts = {
        "gathered": lambda: ColwiseParallel(output_layouts=Replicate()),
        "gathered DTensor": lambda: ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
        "sharded DTensor": lambda: ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for kind in ("llama", "gemma2", "cohere"):
        whole = tiny_heads.make(kind, tie_word_embeddings=False)  # the plan shards the head alone
        inputs, labels = tiny_heads.batch(whole)
        loss, gradients = tiny_heads.exact(whole, inputs, labels)
        for (name, output), fuse_head, first in itertools.product(layouts.items(), FUSED, ("caref", "shard")):
            if name == "sharded DTensor" and not fuse_head and kind != "llama":
                continue  # torch's own arithmetic on the DTensor between head and loss
            model = copy.deepcopy(whole)
            if first == "caref":
                apply_caref(model, fuse_head=fuse_head)
            parallelize_module(model, mesh, parallel_plan(kind, output()))
            if first == "shard":
                apply_caref(model, fuse_head=fuse_head)
            label = f"tensor parallel {kind} {name} {fuse_head=} {first=}"
            made = model(**inputs, labels=labels).loss
            check_identity(made.detach(), loss, "float32_terms", label)
            made.backward()
            check_gradients(model, gradients, label)


def check_tensor_parallel_refusals(rank: int, world: int) -> None:
    """A head sharded over its features cannot make the loss of its rows."""
    mesh = init_device_mesh("cpu", (world,))
    model = apply_caref(tiny_heads.make("llama"), fuse_head=True)
    inputs, labels = tiny_heads.batch(model)
    parallelize_module(model, mesh, {"lm_head": RowwiseParallel(input_layouts=Replicate())})
    try:
        model(**inputs, labels=labels)
    except ValueError as error:
        if "must be sharded over the vocabulary on a 1-D mesh" not in str(error):
            raise
    else:
        raise AssertionError("a head that is sharded over its features was fused")


def check_trainer_records(rank: int, world: int, folder: Path) -> None:
    """The terms of all ranks add up to the Trainer's loss, in training and evaluation; one rank may log by itself."""
    os.environ.update(VARIABLES, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    for fuse_head, average in itertools.product(FUSED, (True, False)):
        trainer = tiny_trainers.make_trainer(
            "llama",
            str(folder / "trainer"),
            max_steps=3,
            logging_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            average_tokens_across_devices=average,
            ddp_backend="gloo",
        )
        assert trainer.args.world_size == world
        attach_caref(trainer, fuse_head=fuse_head, lambda_sced=0.5)
        trainer.train()
        if rank == 0:
            trainer.log({"loss": 1.0})
            trainer.log({"x_loss": 1.0})
        records = [(record, "") for record in trainer.state.log_history if "ce" in record]
        assert len(records) == 1
        records.append((trainer.evaluate(), "eval_"))
        for record, prefix in records:
            total = sum(w * record[prefix + name] for w, name in ((1.0, "ce"), (0.5, "sced"), (0.1, "kl")))
            label = f"{prefix} {fuse_head=} {average=}"
            check_identity(torch.tensor(total), torch.tensor(record[f"{prefix}loss"]), "float32_terms", label)
