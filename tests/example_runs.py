"""Run the recipes of examples/ for test_examples.py: ``python example_runs.py FOLDER`` in a process of its own.

The process imports every framework once.  For each recipe and number of ranks it forks as many processes, with the
environment that torchrun would give them and a process group over gloo; they run the recipe as its command line would,
once for each line of options, and write what they got into FOLDER.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TIMEOUT = 100  # seconds for all runs of one recipe
# The number of processes that each recipe is run on.  MODEL is the folder of the tiny model.
WORLDS = {
    "compiled_loop": (1,),
    "trainer": (1, 2),
    "seq2seq_t5": (1, 2),
    "trl_sft": (1, 2),
    "accelerate_loop": (1, 2),
    "lightning_module": (1, 2),
    "ddp": (2,),
    "fsdp2": (2,),
    "deepspeed_zero3": (2,),
    "tensor_parallel": (2,),
    "tensor_parallel --transformers-plan --model MODEL": (2,),
}
RUNS = [(recipe, world) for recipe, worlds in WORLDS.items() for world in worlds]
OPTIONS = [(1, True), (2, False), (4, False), (4, True)]
FEWER_OPTIONS = {"compiled_loop": [(1, False), (2, True), (4, False)]}  # each compiles the model anew
# Modules that the recipes load late, loaded once for all of them.
PRELOADED = ("torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.muon_optimizer")


def options_of(recipe: str) -> list[tuple[int, bool]]:
    """Accumulation steps, and whether the head is fused, of each run of a recipe."""
    return FEWER_OPTIONS.get(recipe, OPTIONS)


def environment(rank: int, world: int) -> dict[str, str]:
    """What torchrun sets."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    return {**{name: str(value) for name, value in values.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def result_name(recipe: str, world: int, rank: int) -> str:
    """The file of one process."""
    return f"{recipe}-{world}-{rank}.pt"


def run_recipe(recipe: str, rank: int, world: int, folder: Path) -> dict:
    """The parameters and losses of each line of options, or the traceback of the first that failed."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState

    if world > 1:
        os.environ.update(environment(rank, world))
        timeout = datetime.timedelta(seconds=TIMEOUT)
        store = f"file://{folder / f'{recipe}.store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    name, *flags = recipe.split()
    flags = [str(folder / "model") if flag == "MODEL" else flag for flag in flags]
    module, results = sys.modules[name], {}
    keywords = {"compiler": "aot_eager"} if name == "compiled_loop" else {}
    for accumulation, fused in options_of(recipe):
        argv = ["--device", "cpu", "--accumulation", str(accumulation), "--output", str(folder / "out"), *flags]
        model, losses = module.main(argv + ["--fuse-head"] * fused, **keywords)
        results[accumulation, fused] = {"parameters": whole_parameters(model), "losses": losses}
        # A script has one Accelerator or Trainer; here several follow one another.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return results


def whole_parameters(model) -> dict:
    """Every parameter as one tensor, on every rank."""
    import deepspeed

    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters([p for p in parameters.values() if hasattr(p, "ds_id")]):
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for name, p in parameters.items()
        }


def child(recipe: str, rank: int, world: int, folder: Path) -> None:
    """Run, write, and leave without the clean-up of the parent's modules."""
    import torch

    try:
        result = run_recipe(recipe, rank, world, folder)
    except BaseException:  # noqa: BLE001 - whatever it is, the test reports it
        result = traceback.format_exc()
    torch.save(result, folder / result_name(recipe, world, rank))
    sys.stdout.flush()
    os._exit(0)


def wait_for(children: list[int]) -> None:
    """Wait for all, and end those that take too long: a rank may wait for one that has failed."""
    limit = time.monotonic() + TIMEOUT
    waiting = set(children)
    while waiting:
        waiting -= {pid for pid in waiting if os.waitpid(pid, os.WNOHANG)[0]}
        if waiting and time.monotonic() > limit:
            for pid in waiting:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
            return
        time.sleep(0.01)


def main(folder: Path) -> None:
    """Run every recipe."""
    os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")  # of the frameworks about one another
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    for module in ("tiny", *(recipe.split()[0] for recipe in WORLDS), *PRELOADED):
        importlib.import_module(module)
    sys.modules["tiny"].causal_model().save_pretrained(folder / "model")
    gc.freeze()  # so that a collection in a child does not look through every module
    for recipe, world in RUNS:
        started = time.monotonic()
        children = []
        for rank in range(world):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                child(recipe, rank, world, folder)
            children.append(pid)
        wait_for(children)
        print(f"{recipe} on {world}: {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
