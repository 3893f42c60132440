"""Kill -9 an experiment at random instants, start it again each time, and compare with an undisturbed one.

    python tests/crash_harness.py KILLS [SEED]

Every attempt is a forked child, so that a kill costs milliseconds and not the import of the libraries.  Three in four
children are killed after a random time; the fourth kills itself within the n-th fsync, in the middle of a write of
answers or of the append of a row.  What is left after the last kill is done by two processes at a time.  Exit code 1
and a message if anything differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from tiny_experiments import Listener, lasting, run, save_model, tiny_settings  # noqa: E402
from transformers.utils import logging  # noqa: E402

from caref_kernels.harness.results import Results  # noqa: E402

VARIANTS = ("CAREF-AQ", "ADALORA-32", "ZERO-STEP", "CE-LAQ")


class Diary(Listener):
    """Writes to a file, which outlives the process, what begins and whether its row was there already."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._file, self._results = folder.with_suffix(".diary"), Results(folder)

    def job(self, job, steps: int) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{job.name} {job.name in self._results.finished()}\n")


def start(settings, folder: Path, fatal_sync: int | None = None) -> int:
    """The process id of a child that runs what is left, and perhaps dies in a sync; it exits with 1 if a run fails."""
    child = os.fork()
    if child:
        return child
    real, count = os.fsync, 0

    def fatal(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == fatal_sync:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fatal
    code = 1
    try:
        code = int(bool(run(settings, folder, Diary(folder))[0].failed))
    finally:
        os._exit(code)


def disturb(settings, folder: Path, kills: int, longest: float, generator: random.Random) -> tuple[int, int]:
    """Run and kill until the kills are used up or two runs are left: kills, and those within a sync.

    Raises:
        ValueError: a child failed.
    """
    done = in_sync = 0
    while done < kills and len(Results(folder).finished()) <= len(VARIANTS) - 2:
        # A run syncs four times: its answers, its row, and the folder of each.
        fatal_sync = generator.randint(1, 6) if done % 4 == 3 else None
        child = start(settings, folder, fatal_sync)
        if fatal_sync is None:
            time.sleep(generator.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status) != 0:
                raise ValueError(f"a child ended with {status}")
            break
        done += 1
        in_sync += fatal_sync is not None
    return done, in_sync


def finish(settings, folder: Path, whole: dict[str, dict], undisturbed: Path) -> int:
    """Let two processes run what is left, and check everything; how many runs were finished before.

    Raises:
        ValueError: something was lost, doubled or repeated, or differs.
    """
    before = Results(folder).finished()
    children = [start(settings, folder) for _ in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if codes != [0, 0]:
        raise ValueError(f"the two processes ended with {codes}")
    crashed = {row["run"]: row for row in Results(folder).read().rows}
    if whole.keys() != crashed.keys():
        raise ValueError(f"other rows: {sorted(whole.keys() ^ crashed.keys())}")
    for name, row in whole.items():
        if lasting(row) != lasting(crashed[name]):
            raise ValueError(f"{name} differs:\n{json.dumps(row)}\n{json.dumps(crashed[name])}")
        one, other = (place / "answers" / f"{name}.jsonl" for place in (undisturbed, folder))
        if one.read_bytes() != other.read_bytes():
            raise ValueError(f"{name}: other answers")
    begun = folder.with_suffix(".diary").read_text(encoding="utf-8").splitlines()
    repeated = [line for line in begun if line.endswith("True")]
    if repeated:
        raise ValueError(f"finished runs were repeated: {repeated}")
    return len(before)


def crash(kills: int, seed: int, folder: Path) -> str:
    """Run with that many kills, in as many experiments as they take; a line that sums it up.

    Raises:
        ValueError: something was lost, doubled or repeated, or differs.
    """
    generator = random.Random(seed)
    # Dropout and the allocator's memory make a lost state visible.
    model = save_model(folder / "model", "t5")
    settings = tiny_settings(model, variants=VARIANTS, max_steps=6, adalora_target_r=2)
    start_time = time.perf_counter()
    _, whole = run(settings, folder / "whole")
    # An attempt then finishes one run on average, on any machine.
    longest = 2 * (time.perf_counter() - start_time) / len(whole)
    done = in_sync = found = rounds = 0
    while done < kills:
        rounds += 1
        place = folder / f"crashed{rounds}"
        killed, within = disturb(settings, place, kills - done, longest, generator)
        done, in_sync = done + killed, in_sync + within
        found += finish(settings, place, whole, folder / "whole")
    return (
        f"{kills} kills, {in_sync} of them within a sync: {rounds * len(whole)} rows equal those of the undisturbed "
        f"run; {found} were finished between kills, the others by two processes at a time"
    )


def main(arguments: list[str]) -> int:
    kills, seed = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 0
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        try:
            print(crash(kills, seed, Path(folder)))
        except ValueError as error:
            print(error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
