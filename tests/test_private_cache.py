"""The cache folder of the demo: private, never under the current directory, whole or absent."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from caref_kernels.demo import private_cache, smollm2


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


def test_cache_is_made_private_whatever_the_umask(cache_home: Path) -> None:
    old = os.umask(0)
    try:
        root = private_cache.private_root()
    finally:
        os.umask(old)
    assert root == cache_home / "caref_kernels"
    assert [path.stat().st_mode & 0o777 for path in (root, cache_home)] == [0o700, 0o700]
    assert private_cache.private_root() == root


@pytest.mark.parametrize("value", [None, "", "relative/folder"])
def test_cache_is_under_home_without_an_absolute_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert private_cache.private_root() == tmp_path / ".cache" / "caref_kernels"
    assert not (tmp_path / "relative").exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_cache_that_others_can_write_is_refused(cache_home: Path, mode: int) -> None:
    root = private_cache.private_root()
    root.chmod(mode)
    with pytest.raises(private_cache.UnsafeFolderError, match=f"must not be writable by others; mode is {mode:04o}"):
        private_cache.private_root()


def test_cache_under_a_folder_that_others_can_write_is_refused(cache_home: Path) -> None:
    private_cache.private_root()
    cache_home.chmod(0o777)
    with pytest.raises(private_cache.UnsafeFolderError, match="must not be writable by others; mode is 0777"):
        private_cache.private_root()
    cache_home.chmod(0o1777)  # sticky: others cannot rename what is ours
    assert private_cache.private_root().is_dir()


def test_cache_that_is_a_link_or_a_file_is_refused(cache_home: Path, tmp_path: Path) -> None:
    cache_home.mkdir(mode=0o700)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    for make in (
        lambda path: path.symlink_to(tmp_path / "elsewhere"),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        lambda path: path.write_text(""),
    ):
        make(cache_home / "caref_kernels")
        with pytest.raises(private_cache.UnsafeFolderError, match="must be a folder, not a symbolic link or a file"):
            private_cache.private_root()
        (cache_home / "caref_kernels").unlink()


def test_cache_of_somebody_else_is_refused(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = private_cache.private_root()
    owner = root.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(private_cache.UnsafeFolderError, match=f"must belong to user {owner + 1}; it belongs to"):
        private_cache.private_root()


def test_refused_cache_is_not_written_and_the_demo_goes_on(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = private_cache.private_root()
    root.chmod(0o777)
    source = cache_home / "model.gguf"
    source.write_bytes(b"not read here")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: source)
    monkeypatch.setattr(smollm2, "convert", lambda source, folder: (folder / "file").write_text("made"))
    notes: list[str] = []
    with smollm2.model_folder(notes.append) as folder:
        assert (folder / "file").read_text() == "made"
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    assert list(root.iterdir()) == []
    assert re.match(r"not cached: .*must not be writable by others", notes[0])


def test_cache_entry_appears_whole_or_not_at_all(cache_home: Path) -> None:
    root = private_cache.private_root()
    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        assert not (root / "key").exists()
        (folder / "a").write_text("content")

    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        private_cache.entry(root, "key", fail, calls.append)
    assert list(root.iterdir()) == []
    for _ in range(2):
        assert private_cache.entry(root, "key", fill, calls.append) == root / "key"
    assert (root / "key" / "a").read_text() == "content"
    assert len(calls) == 2
    assert list(root.iterdir()) == [root / "key"]


@pytest.mark.parametrize("damage", ["changed", "missing", "extra", "no manifest", "other manifest"])
def test_damaged_cache_entry_is_made_again(cache_home: Path, damage: str) -> None:
    root = private_cache.private_root()
    notes: list[str] = []

    def get() -> Path:
        return private_cache.entry(root, "key", lambda folder: (folder / "a").write_text("content"), notes.append)

    folder = get()
    manifest = folder / private_cache.MANIFEST
    {
        "changed": lambda: (folder / "a").write_text("Content"),
        "missing": (folder / "a").unlink,
        "extra": lambda: (folder / "b").write_text(""),
        "no manifest": manifest.unlink,
        "other manifest": lambda: manifest.write_text("[]"),
    }[damage]()
    assert (get() / "a").read_text() == "content"
    assert len(notes) == 1
    assert "is damaged" in notes[0]
