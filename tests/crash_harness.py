"""Kill -9 an experiment at random instants, within saves too, resume it each time, and compare with an undisturbed one.

    python tests/crash_harness.py KILLS [SEED]

Every attempt is a forked child, so that a kill costs milliseconds and not the import of the libraries.  Three in four
children are killed after a random time; the fourth kills itself within the n-th fsync, in the middle of a save or of
the append of a row.  Exit code 1 and a message if anything differs.
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

SAVE_STEPS = 2
VARIANTS = ("CAREF-AQ", "ADALORA-32", "ZERO-STEP", "CE-LAQ")


class Diary(Listener):
    """Writes to a file, which outlives the process, what begins and every step; tells whether a row was there."""

    def __init__(self, file: Path, results: Results) -> None:
        super().__init__()
        self._file, self._results = file, results

    def _write(self, line: str) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def job(self, job, steps: int) -> None:
        self._write(f"begin {job.name} {job.name in self._results.finished()}")

    def step(self) -> None:
        self._write("step")


def attempt(settings, folder: Path, diary: Path, fatal_sync: int | None) -> None:
    """The life of a child: run, and perhaps die in a sync."""
    real, count = os.fsync, 0

    def fatal(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == fatal_sync:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fatal
    run(settings, folder, Diary(diary, Results(folder)))
    os._exit(0)


def crash(kills: int, seed: int, folder: Path) -> str:
    """Run with that many kills; a line that sums it up.

    Raises:
        ValueError: something was lost, doubled or repeated, or differs.
    """
    generator = random.Random(seed)
    model = save_model(folder / "model", "t5")
    # Dropout and the allocator's memory make a lost state visible.
    splits = (0, 1 + kills // 6)
    settings = tiny_settings(model, variants=VARIANTS, splits=splits, save_steps=SAVE_STEPS, adalora_target_r=2)
    start = time.perf_counter()
    _, whole = run(settings, folder / "whole")
    # An attempt then gets through most of a run on average, and the kills use up most of the runs, on any machine.
    longest = 1.5 * (time.perf_counter() - start) / len(whole)
    diary, done, in_sync = folder / "diary", 0, 0
    while done < kills:
        fatal_sync = generator.randint(1, 60) if done % 4 == 3 else None
        child = os.fork()
        if child == 0:
            attempt(settings, folder / "crashed", diary, fatal_sync)
        if fatal_sync is None:
            time.sleep(generator.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise ValueError(f"a child ended with status {status} after {done} of {kills} kills, before it was killed")
        done += 1
        in_sync += fatal_sync is not None
    tally, crashed = run(settings, folder / "crashed", Diary(diary, Results(folder / "crashed")))
    if tally.failed or tally.busy:
        raise ValueError(f"{len(tally.failed)} runs failed and {len(tally.busy)} stayed locked")
    found = len(tally.found)
    compare(whole, crashed, folder)
    lines = diary.read_text(encoding="utf-8").splitlines()
    repeated = [line for line in lines if line.startswith("begin") and line.endswith("True")]
    if repeated:
        raise ValueError(f"finished runs were repeated: {repeated}")
    steps = lines.count("step")
    least = sum(row["curve"][-1]["step"] for row in whole.values() if row["curve"])
    # A kill costs the steps since the last checkpoint, and that step whose checkpoint it cut short.
    if not least <= steps <= least + kills * SAVE_STEPS:
        raise ValueError(f"{steps} steps were made; {least} are needed and {kills * SAVE_STEPS} may be repeated")
    leftovers = [path.name for path in (folder / "crashed" / "work").iterdir()]
    if leftovers:
        raise ValueError(f"left behind: {leftovers}")
    return (
        f"{kills} kills, {in_sync} of them within a sync: {len(crashed)} rows equal those of the undisturbed run; "
        f"{found} were finished between kills; {steps - least} of {least} steps were repeated"
    )


def compare(whole: dict[str, dict], crashed: dict[str, dict], folder: Path) -> None:
    """Raise if rows or answers differ."""
    if whole.keys() != crashed.keys():
        raise ValueError(f"other rows: {sorted(whole.keys() ^ crashed.keys())}")
    for name, row in whole.items():
        if lasting(row) != lasting(crashed[name]):
            raise ValueError(f"{name} differs:\n{json.dumps(row)}\n{json.dumps(crashed[name])}")
        one, other = (folder / kind / "answers" / f"{name}.jsonl" for kind in ("whole", "crashed"))
        if one.read_bytes() != other.read_bytes():
            raise ValueError(f"{name}: other answers")


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
