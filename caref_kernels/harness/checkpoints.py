"""Checkpoints that are there whole or not at all, and that notice damage.

A checkpoint is written into a temporary folder beside its place, every file is synced, a manifest with the size and
sha256 of each comes last, and only then is the folder renamed and, after that, the oldest one deleted.  A reader takes
no folder without a complete manifest; one whose files differ from it is passed over for an older one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import differences, write_atomically

MANIFEST = "MANIFEST.json"
_FOLDER = re.compile(r"checkpoint-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder and the number of finished steps."""

    folder: Path
    step: int


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: of this run alone; made when it is needed.
        identity: what a checkpoint must have been made with: run, hash of the settings, hash of the split, tokenizer.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 2) -> None:
        self.folder = folder
        self.identity = identity
        self.keep = keep

    def save(self, step: int, write: Callable[[Path], None]) -> Checkpoint:
        """Make the checkpoint of ``step`` out of the plain files that ``write(folder)`` writes.

        Raises:
            OSError: it cannot be written; the older checkpoints are as they were and nothing else is left.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            return self._save(step, write)
        except OSError:
            # Once more: a full disk does not empty itself, but a network file system may have had a bad moment.
            try:
                return self._save(step, write)
            except OSError as error:
                free = shutil.disk_usage(self.folder).free
                raise OSError(
                    f"{self.folder}: the checkpoint of step {step} cannot be written ({error}; {free} bytes are free); "
                    "the older ones are intact"
                ) from error

    def _save(self, step: int, write: Callable[[Path], None]) -> Checkpoint:
        final = self.folder / f"checkpoint-{step:06d}"
        temporary = self.folder / f"{final.name}.tmp-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            files = {path.name: _entry(path) for path in sorted(temporary.iterdir())}
            manifest = {"step": step, "identity": self.identity, "files": files}
            write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(self.folder)
        for old in self._folders()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return Checkpoint(final, step)

    def latest(self, note: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint, or ``None`` if none was ever made; ``note`` is told what is passed over.

        Leftovers of a save that was cut short are removed.

        Raises:
            ValueError: there are checkpoints and none is whole, or one was made with something else.
        """
        for leftover in self.folder.glob("*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        damages = []
        for folder in reversed(self._folders()):
            damage = self._damage(folder)
            if damage is None:
                return Checkpoint(folder, _step(folder))
            if not (folder / MANIFEST).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                continue
            damages.append(damage)
            note(f"checkpoint passed over: {damage}")
        if damages:
            raise ValueError(
                f"no checkpoint is whole: {'; '.join(damages)}; delete {self.folder} to start this run anew"
            )
        return None

    def clear(self) -> None:
        """Remove every checkpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _FOLDER.fullmatch(path.name)), key=_step)

    def _damage(self, folder: Path) -> str | None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            files, identity, step = manifest["files"], manifest["identity"], manifest["step"]
            present = {path.name for path in folder.iterdir()} - {MANIFEST}
            if present != set(files):
                return f"{folder}: has the files {sorted(present)}; its manifest says {sorted(files)}"
            for name, entry in files.items():
                if _entry(folder / name, sync=False) != entry:
                    return f"{folder / name}: sha256 mismatch"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{folder / MANIFEST}: cannot be read ({error})"
        if step != _step(folder):
            return f"{folder}: holds step {step}"
        changes = differences(identity, self.identity)
        if changes:
            raise ValueError(f"{folder}: was made with something else ({changes}); to start anew, delete it")
        return None


def _step(folder: Path) -> int:
    return int(_FOLDER.fullmatch(folder.name).group(1))


def _entry(path: Path, sync: bool = True) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
