"""Files that came in, read once: their sound on disk for the jobs, their look for the page."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from audio import decode, levels
from core import files
from core.requests import SAMPLE_RATE
from core.results import AudioInfo

LONGEST_S = 600.0
"""What is read of any file, in seconds. Modes have limits of their own."""


BUCKETS = 1000
"""Stretches of a waveform's picture."""


KEPT = 6
"""Decoded files that wait for another use. Ten minutes of sound are 230 MB on disk."""


@dataclass(frozen=True)
class Upload:
    """A file that was read: its sound as float32 [2, samples] at 48 kHz in `sound` (.npy), the
    sha256 of its bytes, and how it looks."""

    sound: Path
    sha256: str
    samples: int
    look: AudioInfo


class Uploads:
    """The decoded files of this process. Thread-safe."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple, Upload] = OrderedDict()
        self._guard = threading.Lock()

    def read(self, path: Path, stopped: Callable[[], bool] = lambda: False) -> Upload:
        """Decode the file at `path`, unless that was done already.

        Args:
            stopped: asked ten times a second; once true the reading ends with an error.

        Raises:
            StudioError: those of `decoding.decode`.
        """
        key = _identity(path)
        with self._guard:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        known = _decoded(path, stopped)
        with self._guard:
            self._known[key] = known
            while len(self._known) > KEPT:
                self._known.popitem(last=False)[1].sound.unlink(missing_ok=True)
        return known

    def lend(
        self, path: Path, folder: Path, stopped: Callable[[], bool]
    ) -> tuple[Upload, Path, Path]:
        """What is known of `path`, and the file and its sound again under `folder`, to keep.

        Both are links where the disk allows it, copies elsewhere: neither what a visitor deletes
        nor what is forgotten here takes them away from a job.

        Raises:
            StudioError: as `read`; `disk-full`, `not-writable`.
        """
        known = self.read(path, stopped)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            sound = folder / "sound.npy"
            try:
                link(known.sound, sound)
            except FileNotFoundError:  # forgotten in this very moment
                known = _decoded(path, stopped)
                os.replace(known.sound, sound)
            mine = folder / plain(path.name)
            link(path, mine)
        except OSError as error:
            raise files.write_error(folder, error, known.samples * 8) from error
        return known, mine, sound


def _decoded(path: Path, stopped: Callable[[], bool]) -> Upload:
    import numpy as np

    heard = decode.decode(path, LONGEST_S, files.private_folder(), stopped=stopped)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    kept = files.private_folder() / f"sound-{secrets.token_hex(8)}.npy"
    try:
        np.save(kept, heard.sound)
    except OSError as error:
        kept.unlink(missing_ok=True)
        raise files.write_error(kept, error, heard.sound.nbytes) from error
    look = AudioInfo(
        name=plain(path.name),
        seconds=heard.sound.shape[1] / SAMPLE_RATE,
        rate=heard.rate,
        channels=heard.channels,
        peaks=tuple(levels.waveform_peaks(heard.sound, BUCKETS)),
        notes=heard.notes,
    )
    return Upload(kept, sha256, heard.sound.shape[1], look)


def _identity(path: Path) -> tuple:
    """Equal for a file that has not changed; unequal for all that cannot be looked at."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return (object(),)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def plain(name: str) -> str:
    """A file's name without what a terminal or another system would stumble over."""
    kept = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name)
    return kept[-80:].lstrip(".") or "song"


def link(source: Path, target: Path) -> None:
    """Make `target` a link to the file `source`, or a copy where links cannot be."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
