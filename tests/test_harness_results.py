"""The results file under damage, and in the hands of several processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

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
        Results(tmp_path).path("failed", name)


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    results = Results(tmp_path / "results")
    (results.folder / "failed").symlink_to(outside)
    with pytest.raises(ValueError, match="must not lead out of the results folder"):
        results.path("failed", "run")
    results.file.symlink_to(outside / "file")
    with pytest.raises(OSError, match="symbolic"):
        results.append(row(1))
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(ValueError, match="must be a folder, not a link"):
        Results(tmp_path / "link")


def test_every_job_has_a_good_name() -> None:
    name = Job("esnli", "CAREF-AQKV-SELF", 9991, 2.5, 0.5).name
    assert name == "esnli.CAREF-AQKV-SELF.s9991.a2.5.b0.5"
