"""A cache folder that nobody else can write, and entries that appear in it whole or not at all.

What is cached is loaded as model weights, so a folder that another user could write is refused, not repaired.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MANIFEST = "MANIFEST.json"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# A temporary folder this old belongs to a run that was killed.
_STALE_SECONDS = 3600


class UnsafeFolderError(PermissionError):
    """A folder that another user could have written to."""


def private_root() -> Path:
    """``${XDG_CACHE_HOME:-~/.cache}/caref_kernels``, created with mode 0700 if it is not there.

    Raises:
        UnsafeFolderError: it is a symbolic link, belongs to somebody else, or it or a folder above it can be written
            by others (a sticky folder such as /tmp may stand above it).
        OSError: it cannot be created.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")  # noqa: TID251 - the one place of the XDG convention
    # The convention says to ignore a relative path, which would mean a folder of the current directory.
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise UnsafeFolderError(f"no absolute home folder: {base!r}")
    root = Path(base) / "caref_kernels"
    _make_private(root)
    check_private(root)
    return root


def check_private(folder: Path) -> None:
    """Return if only this user (and root) can write to ``folder`` or exchange it.

    Raises:
        UnsafeFolderError: otherwise; the message says what to change.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UnsafeFolderError(f"{folder}: must be a folder, not a symbolic link or a file")
    if status.st_uid != os.geteuid():
        raise UnsafeFolderError(f"{folder}: must belong to user {os.geteuid()}; it belongs to user {status.st_uid}")
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise UnsafeFolderError(f"{folder}: must not be writable by others; mode is {stat.S_IMODE(status.st_mode):04o}")
    for parent in (folder.parent.resolve(), *folder.parent.resolve().parents):
        status = parent.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise UnsafeFolderError(f"{parent}: must belong to this user or root; it belongs to user {status.st_uid}")
        if status.st_mode & _WRITABLE_BY_OTHERS and not status.st_mode & stat.S_ISVTX:
            mode = stat.S_IMODE(status.st_mode)
            raise UnsafeFolderError(f"{parent}: must not be writable by others; mode is {mode:04o}")


def entry(root: Path, key: str, fill: Callable[[Path], None], note: Callable[[str], None]) -> Path:
    """The folder ``root/key``, made by ``fill(folder)`` unless a complete one is there.

    ``fill`` writes plain files into a temporary folder beside it, which is renamed when all of them and their hashes
    are on disk.  The hashes detect damage; who could have caused it is the matter of :func:`check_private`.

    Raises:
        OSError: the files cannot be written; nothing is left behind.
    """
    final = root / key
    if final.is_dir() and not final.is_symlink():
        damage = _damage(final)
        if damage is None:
            return final
        note(f"cache entry {key[:12]} is damaged ({damage}); making it again")
        shutil.rmtree(final)
    _remove_leftovers(root)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
    try:
        fill(temporary)
        _write_manifest(temporary)
        try:
            temporary.rename(final)
        except OSError:
            # Another process may have finished first; its entry is as good if it is whole.
            if not final.is_dir() or _damage(final) is not None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def sha256(path: Path) -> str:
    """The hexadecimal hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _make_private(folder: Path) -> None:
    # Path.mkdir(parents=True) would give the parents the mode of the umask.
    missing = []
    while not folder.exists() and not folder.is_symlink():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    hashes = {path.name: sha256(path) for path in files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(hashes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _damage(folder: Path) -> str | None:
    """What is wrong with a finished entry, or ``None``."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = {path.name for path in folder.iterdir()} - {MANIFEST}
        if not isinstance(hashes, dict) or names != set(hashes):
            return "its files are not those of its manifest"
        wrong = [name for name, value in hashes.items() if sha256(folder / name) != value]
    except (OSError, ValueError) as error:
        return str(error)
    return f"{wrong[0]}: sha256 mismatch" if wrong else None


def _remove_leftovers(root: Path) -> None:
    for path in root.glob(".making-*"):
        if time.time() - path.lstat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
