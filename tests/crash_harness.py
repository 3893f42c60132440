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


class Round:
    """One experiment that is killed and resumed until the kills are used up or it is finished."""

    def __init__(self, settings, folder: Path, kills: int, longest: float, generator: random.Random) -> None:
        self.folder, self.diary = folder, folder.with_suffix(".diary")
        self.done = self.in_sync = 0
        self._settings = settings
        while self.done < kills:
            fatal_sync = generator.randint(1, 60) if self.done % 4 == 3 else None
            status = self._attempt(fatal_sync, generator.uniform(0, longest))
            if not os.WIFSIGNALED(status):
                if os.waitstatus_to_exitcode(status) != 0:
                    raise ValueError(f"a child ended with {status}")
                break
            self.done += 1
            self.in_sync += fatal_sync is not None

    def _attempt(self, fatal_sync: int | None, seconds: float) -> int:
        child = os.fork()
        if child == 0:
            attempt(self._settings, self.folder, self.diary, fatal_sync)
        if fatal_sync is None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    def finish(self, whole: dict[str, dict], undisturbed: Path) -> tuple[int, int, int]:
        """Run what is left and check everything; runs that were finished before, steps made and steps needed."""
        tally, crashed = run(self._settings, self.folder, Diary(self.diary, Results(self.folder)))
        if tally.failed or tally.busy:
            raise ValueError(f"{len(tally.failed)} runs failed and {len(tally.busy)} stayed locked")
        compare(whole, crashed, undisturbed, self.folder)
        lines = self.diary.read_text(encoding="utf-8").splitlines()
        repeated = [line for line in lines if line.startswith("begin") and line.endswith("True")]
        if repeated:
            raise ValueError(f"finished runs were repeated: {repeated}")
        steps = lines.count("step")
        least = sum(row["curve"][-1]["step"] for row in whole.values() if row["curve"])
        # A kill costs the steps since the last checkpoint, and that step whose checkpoint it cut short.
        if not least <= steps <= least + self.done * SAVE_STEPS:
            raise ValueError(
                f"{steps} steps were made; {least} are needed and {self.done * SAVE_STEPS} may be repeated"
            )
        leftovers = [path.name for path in (self.folder / "work").iterdir()]
        if leftovers:
            raise ValueError(f"left behind: {leftovers}")
        return len(tally.found), steps, least


def crash(kills: int, seed: int, folder: Path) -> str:
    """Run with that many kills, in as many experiments as they take; a line that sums it up.

    Raises:
        ValueError: something was lost, doubled or repeated, or differs.
    """
    generator = random.Random(seed)
    model = save_model(folder / "model", "t5")
    # Dropout and the allocator's memory make a lost state visible.
    settings = tiny_settings(
        model, variants=VARIANTS, splits=(0, 1 + kills // 12), save_steps=SAVE_STEPS, adalora_target_r=2
    )
    start = time.perf_counter()
    _, whole = run(settings, folder / "whole")
    # An attempt then gets through most of a run on average, on any machine.
    longest = 1.5 * (time.perf_counter() - start) / len(whole)
    done = in_sync = found = steps = needed = rounds = 0
    while done < kills:
        rounds += 1
        one = Round(settings, folder / f"crashed{rounds}", kills - done, longest, generator)
        finished, made, least = one.finish(whole, folder / "whole")
        done, in_sync, found = done + one.done, in_sync + one.in_sync, found + finished
        steps, needed = steps + made, needed + least
    rows = rounds * len(whole)
    return (
        f"{kills} kills, {in_sync} of them within a sync: {rows} rows equal those of the undisturbed run; "
        f"{found} were finished between kills; {steps - needed} of {needed} steps were repeated"
    )


def compare(whole: dict[str, dict], crashed: dict[str, dict], undisturbed: Path, folder: Path) -> None:
    """Raise if rows or answers differ."""
    if whole.keys() != crashed.keys():
        raise ValueError(f"other rows: {sorted(whole.keys() ^ crashed.keys())}")
    for name, row in whole.items():
        if lasting(row) != lasting(crashed[name]):
            raise ValueError(f"{name} differs:\n{json.dumps(row)}\n{json.dumps(crashed[name])}")
        one, other = (place / "answers" / f"{name}.jsonl" for place in (undisturbed, folder))
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
