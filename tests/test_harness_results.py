"""The results file and the checkpoints under damage."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from caref_kernels.harness.checkpoints import MANIFEST, CheckpointStore
from caref_kernels.harness.results import Job, Results, finite, write_atomically

pytest.importorskip("filelock")


def row(number: int, **fields) -> dict:
    return {"run": f"r{number}", "value": number / 7, "text": 'quote " and \n line', **fields}


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "folder")
    assert [results.append(row(n)) for n in (1, 2, 1)] == [True, True, False]
    assert [r["run"] for r in results.read().rows] == ["r1", "r2"]
    assert results.read().rows[0] == row(1)
    assert results.finished() == {"r1", "r2"}


def test_any_truncation_loses_the_last_record_at_most(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for n in range(3):
        results.append(row(n))
    whole = results.file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        results.file.write_bytes(whole[:size])
        reading = results.read()
        complete = sum(end <= size for end in ends)
        assert len(reading.rows) == complete
        assert reading.torn == size - (ends[complete - 1] if complete else 0)
    for size in (ends[1] + 1, ends[2] - 1):
        results.file.write_bytes(whole[:size])
        assert results.append(row(2))
        assert results.file.read_bytes() == whole


def test_damage_inside_is_not_passed_over(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for text, message in (
        ('{"run": "a"}\n{"run": \n', r"results\.jsonl:2: line: expected a JSON object"),
        ("[1]\n", r"results\.jsonl:1: line"),
        ('{"run": "a"}\n{"run": "b"}\n{"run": "a"}\n', r"results\.jsonl:3: run: 'a' occurs twice"),
    ):
        results.file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            results.read()
        with pytest.raises(ValueError, match=message):
            results.append(row(9))


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append(row(1, bad=[float("nan"), {"x": float("inf")}, (1.0, -0.0)]))
    assert results.read().rows[0]["bad"] == [None, {"x": None}, [1.0, 0.0]]
    assert "NaN" not in results.file.read_text(encoding="utf-8")
    assert finite({"a": float("-inf")}) == {"a": None}


@pytest.mark.parametrize("failing", ["pwrite", "fsync"])
def test_a_full_disk_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    results = Results(tmp_path)
    results.append(row(1))
    before = results.file.read_bytes()
    real = os.pwrite

    def full(descriptor, data=b"", offset=0):
        if failing == "pwrite":
            real(descriptor, data[:5], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        results.append(row(2))
    monkeypatch.undo()
    if failing == "pwrite":
        assert results.file.read_bytes() == before
    assert results.append(row(3)) is True
    assert [r["run"] for r in results.read().rows][0] == "r1"


def test_an_atomic_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text(encoding="utf-8") == "old"


def _append_many(folder: str, first: int) -> None:
    results = Results(folder)
    for n in range(20):
        results.append(row((first + n) % 30))


def test_concurrent_writers_double_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(str(tmp_path), first)) for first in (0, 15)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert {r["run"] for r in Results(tmp_path).read().rows} == {f"r{n}" for n in range(30)}


def test_a_lock_is_seen_and_ends(tmp_path: Path) -> None:
    first, second = Results(tmp_path), Results(tmp_path)
    with first.lock("job") as is_mine:
        assert is_mine
        with second.lock("job") as is_theirs:
            assert not is_theirs
    with second.lock("job") as is_theirs:
        assert is_theirs


def test_settings_bind_the_folder_and_differences_are_listed(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.bind({"a": 1, "b": "x"})
    results.bind({"b": "x", "a": 1})
    with pytest.raises(ValueError, match=r"begun with other settings \(b 'x' -> 'y', c None -> 2\)"):
        results.bind({"a": 1, "b": "y", "c": 2})


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\0", "x" * 101, "ü"])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a name of a run must match"):
        Results(tmp_path).path("work", name)


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    results = Results(tmp_path / "results")
    (results.folder / "work").symlink_to(outside)
    with pytest.raises(ValueError, match="must not lead out of the results folder"):
        results.path("work", "run")
    results.file.symlink_to(outside / "file")
    with pytest.raises(OSError, match="symbolic"):
        results.append(row(1))
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(ValueError, match="must be a folder, not a link"):
        Results(tmp_path / "link")


def test_every_job_has_a_good_name() -> None:
    name = Job("esnli", "CAREF-AQKV-SELF", 9991, 2.5, 0.5).name
    assert name == "esnli.CAREF-AQKV-SELF.s9991.a2.5.b0.5"


# ------------------------------------------------------------------------------------------------- checkpoints


def writer(content: bytes):
    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(content)
        (folder / "state").write_bytes(content[::-1])

    return write


def store(folder: Path, **identity) -> CheckpointStore:
    return CheckpointStore(folder, {"run": "r", **identity})


def test_checkpoints_are_kept_and_replaced(tmp_path: Path) -> None:
    ours = store(tmp_path / "work")
    assert ours.latest(pytest.fail) is None
    for step in (4, 8, 12):
        ours.save(step, writer(bytes([step]) * 9))
    assert sorted(p.name for p in ours.folder.iterdir()) == ["checkpoint-000008", "checkpoint-000012"]
    last = ours.latest(pytest.fail)
    assert (last.step, (last.folder / "weights").read_bytes()) == (12, bytes([12]) * 9)
    ours.save(12, writer(b"again"))
    assert (ours.latest(pytest.fail).folder / "weights").read_bytes() == b"again"
    ours.clear()
    assert ours.latest(pytest.fail) is None


DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / "weights", 3),
    "empty": lambda folder: os.truncate(folder / "state", 0),
    "bit flip": lambda folder: (folder / "weights").write_bytes(b"\x0d" + bytes([12]) * 8),
    "missing": lambda folder: (folder / "weights").unlink(),
    "one more": lambda folder: (folder / "extra").write_bytes(b""),
    "swapped": lambda folder: shutil.copy(folder.parent / "checkpoint-000008" / "weights", folder / "weights"),
    "manifest of another step": lambda folder: shutil.copy(
        folder.parent / "checkpoint-000008" / MANIFEST, folder / MANIFEST
    ),
    "half a manifest": lambda folder: os.truncate(folder / MANIFEST, 40),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_the_older_one_taken(tmp_path: Path, damage: str) -> None:
    ours = store(tmp_path)
    for step in (8, 12):
        ours.save(step, writer(bytes([step]) * 9))
    DAMAGES[damage](tmp_path / "checkpoint-000012")
    notes: list[str] = []
    assert ours.latest(notes.append).step == 8
    assert "checkpoint-000012" in notes[0]
    os.truncate(tmp_path / "checkpoint-000008" / "weights", 1)
    with pytest.raises(ValueError, match=r"no checkpoint is whole: .*checkpoint-000008/weights: sha256 mismatch"):
        ours.latest(notes.append)


def test_a_save_cut_short_is_removed(tmp_path: Path) -> None:
    ours = store(tmp_path)
    ours.save(4, writer(b"four"))
    (tmp_path / "checkpoint-000008.tmp-123").mkdir()
    (tmp_path / "checkpoint-000008.tmp-123" / "weights").write_bytes(b"half")
    (tmp_path / "checkpoint-000012").mkdir()
    assert ours.latest(pytest.fail).step == 4
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000004"]


def test_a_checkpoint_of_something_else_lists_what_differs(tmp_path: Path) -> None:
    store(tmp_path, settings="a", tokenizer="t").save(4, writer(b"x"))
    with pytest.raises(ValueError, match=r"made with something else \(settings 'a' -> 'b'\)"):
        store(tmp_path, settings="b", tokenizer="t").latest(pytest.fail)


@pytest.mark.parametrize("times", [1, 2])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, times: int) -> None:
    ours = store(tmp_path)
    ours.save(4, writer(b"four"))
    calls = []

    def fails(folder: Path) -> None:
        calls.append(folder)
        (folder / "weights").write_bytes(b"eight")
        if len(calls) <= times:
            raise OSError(errno.ENOSPC, "No space left on device")

    if times == 1:
        assert ours.save(8, fails).step == 8
    else:
        with pytest.raises(OSError, match=r"step 8 cannot be written .*No space left.* bytes are free"):
            ours.save(8, fails)
        assert ours.latest(pytest.fail).step == 4
    assert not list(tmp_path.glob("*.tmp-*"))


class CrashingSaves(RuleBasedStateMachine):
    """Whatever is saved, cut short or damaged, what is read back is the newest whole checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=os.environ["CAREF_TEST_FOLDER"]))
        self.store = store(self.folder)
        self.whole: dict[int, bytes] = {}
        self.damaged: set[int] = set()
        self.step = 0

    @rule(content=st.binary(min_size=1, max_size=20))
    def save(self, content: bytes) -> None:
        self.step += 1
        self.store.save(self.step, writer(content))
        self.whole[self.step] = content
        self._forget()

    @rule(content=st.binary(min_size=1, max_size=20), files=st.integers(0, 2))
    def crash_in_a_save(self, content: bytes, files: int) -> None:
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / f"checkpoint-{self.step + 1:06d}.tmp-99"
        temporary.mkdir(exist_ok=True)
        for name in ("weights", "state")[:files]:
            (temporary / name).write_bytes(content)

    @precondition(lambda self: len(self.whole) > 1)
    @rule(position=st.integers(0, 10**6))
    def damage_the_newest(self, position: int) -> None:
        step = max(self.whole)
        path = self.folder / f"checkpoint-{step:06d}" / "weights"
        content = bytearray(path.read_bytes())
        content[position % len(content)] ^= 1 << position % 8
        path.write_bytes(content)
        del self.whole[step]
        self.damaged.add(step)

    def _forget(self) -> None:
        kept = sorted(self.whole.keys() | self.damaged)[-self.store.keep :]
        self.whole = {step: content for step, content in self.whole.items() if step in kept}
        self.damaged &= set(kept)

    @invariant()
    def the_newest_whole_one_comes_back(self) -> None:
        if not self.whole:
            return
        found = store(self.folder).latest(lambda text: None)
        assert found.step == max(self.whole)
        assert (found.folder / "weights").read_bytes() == self.whole[found.step]
        assert not list(self.folder.glob("*.tmp-*"))


def test_any_prefix_and_resume_is_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setenv("CAREF_TEST_FOLDER", str(tmp_path))
    few = settings(
        max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(CrashingSaves, settings=few)


def test_a_manifest_names_every_file(tmp_path: Path) -> None:
    checkpoint = store(tmp_path, settings="a").save(4, writer(b"abc"))
    manifest = json.loads((checkpoint.folder / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["step"] == 4
    assert manifest["identity"] == {"run": "r", "settings": "a"}
    assert manifest["files"]["weights"] == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
