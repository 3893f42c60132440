"""Tensor parallelism with the output head split over the vocabulary: no rank ever has a whole row of logits.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py --accumulation 4 --fuse-head
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --model PATH --transformers-plan

Accumulation: nothing is divided, ``backward`` adds the micro-batches up.  Ranks: every rank has the same batch and
makes the same loss, nothing is averaged.  As each of them counts the same labels, ``averaged_over`` is the number of
ranks; with data parallelism beside it, ``averaged_over`` is the number of all ranks as well.

The head of PLAN returns DTensor logits, split over their last dimension.  ``--transformers-plan`` takes the plan that
transformers has for the model, which gathers the logits on every rank, unless the head is fused.
"""

import itertools

import torch
import torch.distributed as dist
from tiny import STEP_SIZE, causal_model, examples, options
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from caref_kernels.integrations import count_items
from caref_kernels.integrations.transformers import apply_caref

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
PLAN = {
    **{f"model.layers.*.{name}": ColwiseParallel() for name in COLUMNS},
    **{f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")},
    "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
}


def main(argv=None):
    args = options(__doc__, argv, "--transformers-plan")
    if not dist.is_initialized():
        dist.init_process_group()
    ranks = dist.get_world_size()
    if args.transformers_plan:
        plan = DistributedConfig(tp_plan="auto", tp_size=ranks)
        model = AutoModelForCausalLM.from_pretrained(args.model, distributed_config=plan)
    else:
        model = causal_model(args.model).to(args.device)
        parallelize_module(model, init_device_mesh(args.device, (ranks,)), PLAN)
    apply_caref(model.train(), lambda_sced=0.1, lambda_kl=0.1, fuse_head=args.fuse_head)
    # foreach=False: some parameters are DTensors, some are not.
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, foreach=False)
    batches = iter(DataLoader(examples(model.config.vocab_size), batch_size=STEP_SIZE // args.accumulation))
    losses = []
    while micro_batches := list(itertools.islice(batches, args.accumulation)):
        micro_batches = [{name: value.to(args.device) for name, value in batch.items()} for batch in micro_batches]
        items = count_items([batch["labels"] for batch in micro_batches], averaged_over=ranks)
        step_loss = torch.zeros((), device=args.device)
        for batch in micro_batches:
            loss = model(**batch, num_items_in_batch=items).loss
            loss.backward()
            step_loss += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss.item())  # the mean over all labels, on every rank
    if dist.get_rank() == 0:
        print("loss of each step:", losses)
    return model, losses


if __name__ == "__main__":
    main()
