"""Finished layers on disk, so that a killed run continues where it was, to the same bytes.

One safetensors file a layer in the run's work folder, written to a temporary name and renamed; beside them the
fingerprint of the plan (model, data and options included). With another fingerprint it is
another run, and the folder is cleared.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import safetensors
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from compress.errors import InputError
from compress.files.outputs import new_file

__all__ = ["ResumeStore", "open_store"]

_PARTS = "parts.json"


@contextmanager
def open_store(
    folder: Path | None, fingerprint: str, parts: Mapping[str, str] | None = None, *, restart: bool = True
) -> Iterator[ResumeStore]:
    """A store that goes when the block ends well; if not, its finished layers stay, but without ``folder``.

    Args:
        folder: None for one that is not to be continued.
        fingerprint: of the run.
        parts: what the run is made of, by name; said where it differs from what ``folder`` was begun with.
        restart: whether finished layers of another run may be thrown away.

    Raises:
        InputError: ``folder`` holds finished layers of another run.
    """
    if folder is not None and not restart:
        _refuse_another(folder, fingerprint, parts or {})
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="compress-") as work:
            yield ResumeStore(Path(work) / "work", fingerprint)
        return
    store = ResumeStore(folder, fingerprint)
    (folder / _PARTS).write_text(json.dumps(parts or {}))
    try:
        yield store
    except BaseException:
        store.leave()
        raise
    store.clear()


def _refuse_another(folder: Path, fingerprint: str, parts: Mapping[str, str]) -> None:
    marker, count = folder / "fingerprint", len(list(folder.glob("*.safetensors")))
    if not count or not marker.exists() or marker.read_text() == fingerprint:
        return
    try:
        before = json.loads((folder / _PARTS).read_text())
    except (OSError, ValueError):
        before = {}
    differences = [
        f"{name} ({before.get(name, 'unknown')} then, {value} now)"
        for name, value in parts.items()
        if before.get(name) != value
    ]
    raise InputError(
        f"{folder} holds {count} finished layers of another run; different: {', '.join(differences) or 'unknown'}. "
        f"Finish that run with what it was begun with, choose another --out, or throw it away with --overwrite"
    )


class ResumeStore:
    """Named bundles of tensors under ``folder``, valid for one ``fingerprint`` only."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        marker = folder / "fingerprint"
        # Without a marker it is what an interrupted deletion left.
        if folder.exists() and not (marker.exists() and marker.read_text() == fingerprint):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(fingerprint)
        # Of this process alone: another run may measure the same at the same time.
        self._scratch = folder / f"scratch-{os.getpid()}"

    def fresh_scratch(self) -> Path:
        """An empty folder for files that do not outlive a step; what an earlier call gave is deleted."""
        for old in self.folder.glob("scratch-*"):
            owner = old.name.removeprefix("scratch-")
            if old == self._scratch or not (owner.isdigit() and psutil.pid_exists(int(owner))):
                shutil.rmtree(old, ignore_errors=True)
        self._scratch.mkdir()
        return self._scratch

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and strings saved under ``name``, or None."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except SafetensorError:  # cut short when the machine went down: the layer is done again
            return None

    def save(self, name: str, tensors: dict[str, Tensor], strings: dict[str, str]) -> None:
        """Save under ``name``, whole or not at all."""
        path = self._path(name)
        with new_file(path) as temporary:
            # Through Python's own file, whose errors say which file and why.
            temporary.write_bytes(save({key: value.contiguous() for key, value in tensors.items()}, strings))

    def link(self, name: str, destination: Path) -> None:
        """Give what was saved under ``name`` the further name ``destination``, or copy it where that cannot be."""
        try:
            os.link(self._path(name), destination)
        except OSError:
            shutil.copyfile(self._path(name), destination)

    def has(self, name: str) -> bool:
        """Whether ``name`` was saved."""
        return self._path(name).exists()

    def leave(self) -> None:
        """The run was interrupted: keep the finished layers, delete the rest, and all of it if there are none."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        if not any(self.folder.glob("*.safetensors")) and not any(self.folder.glob("scratch-*")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        """Delete everything: the run is finished."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        # Layer names may hold anything; the digest keeps two that differ only in a slash apart.
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        readable = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:80]
        return self.folder / f"{readable}-{digest}.safetensors"
