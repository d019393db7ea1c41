"""Uploaded files: decoded once, and copied into the folders of the jobs that use them."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from audio import decode, levels
from core import files
from core.params import Request
from core.requests import AUDIO_FIELDS, SAMPLE_RATE
from core.results import AudioInfo
from runtime.job import JobFolder

LONGEST_S = 600.0
"""The longest file that is decoded, in seconds. Modes have limits of their own."""


WAVEFORM_POINTS = 1000
"""Points of the waveform that the page draws."""


UPLOADS_KEPT = 6
"""Decoded files kept for another use. Ten minutes of sound take 230 MB on disk."""


@dataclass(frozen=True)
class Upload:
    """A decoded file.

    Attributes:
        sound: a NumPy file with float32 [2, samples] at 48 kHz.
        sha256: of the bytes that were uploaded.
        info: what the page shows of it.
    """

    sound: Path
    sha256: str
    samples: int
    info: AudioInfo


@dataclass(frozen=True)
class JobFiles:
    """The job's own copies of the files in its request, by field; see `Job` for the meaning."""

    paths: dict[str, Path] = field(default_factory=dict)
    sounds: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    sha256s: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Uploads:
    """The decoded uploads of this process, so that a file is read once. Thread-safe."""

    def __init__(self) -> None:
        self._decoded: OrderedDict[tuple, Upload] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, stopped: Callable[[], bool] = lambda: False) -> Upload:
        """Decode the file at `path`, unless that was done already.

        Args:
            stopped: called ten times a second; once it returns True, decoding ends with an error.

        Raises:
            StudioError: those of `decode.decode`.
        """
        key = _identity(path)
        with self._lock:
            if key in self._decoded:
                self._decoded.move_to_end(key)
                return self._decoded[key]
        upload = _decode(path, stopped)
        with self._lock:
            self._decoded[key] = upload
            while len(self._decoded) > UPLOADS_KEPT:
                self._decoded.popitem(last=False)[1].sound.unlink(missing_ok=True)
        return upload

    def copy_into(self, folder: JobFolder, request: Request) -> JobFiles:
        """Decode the files of `request` and keep them, with their sound, in the job's folder.

        Both are links where the disk allows it and copies elsewhere, so that nothing that a
        visitor deletes or that is dropped here takes them away from the job.

        Raises:
            StudioError: as `read`; `disk-full`, `not-writable`.
        """
        found, notes = JobFiles(), []
        for name in AUDIO_FIELDS:
            path = getattr(request, name, None)
            if path is None:
                continue
            upload, copy, sound = self._copy(path, folder.path / name, folder.stopped)
            found.paths[name], found.sounds[name] = copy, sound
            found.seconds[name], found.samples[name] = upload.info.seconds, upload.samples
            found.sha256s[name] = upload.sha256
            notes += upload.info.notes
        return replace(found, notes=tuple(notes))

    def _copy(
        self, path: Path, folder: Path, stopped: Callable[[], bool]
    ) -> tuple[Upload, Path, Path]:
        upload = self.read(path, stopped)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            sound = folder / "sound.npy"
            try:
                link(upload.sound, sound)
            except FileNotFoundError:  # dropped in this very moment
                upload = _decode(path, stopped)
                os.replace(upload.sound, sound)
            copy = folder / files.safe_name(path.name)
            link(path, copy)
        except OSError as error:
            raise files.write_error(folder, error, upload.samples * 8) from error
        return upload, copy, sound


def _decode(path: Path, stopped: Callable[[], bool]) -> Upload:
    import numpy as np

    decoded = decode.decode(path, LONGEST_S, files.private_folder(), stopped=stopped)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    kept = files.private_folder() / f"sound-{secrets.token_hex(8)}.npy"
    # Not by np.save, whose short writes have no errno: a full disk would not be called full.
    header, sound = io.BytesIO(), np.ascontiguousarray(decoded.sound)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(sound))
    files.atomic_write(kept, (header.getvalue(), sound.data.cast("B")))
    info = AudioInfo(
        name=files.safe_name(path.name),
        seconds=decoded.sound.shape[1] / SAMPLE_RATE,
        rate=decoded.rate,
        channels=decoded.channels,
        peaks=tuple(levels.waveform_peaks(decoded.sound, WAVEFORM_POINTS)),
        notes=decoded.notes,
    )
    return Upload(kept, sha256, decoded.sound.shape[1], info)


def _identity(path: Path) -> tuple:
    """A key that is equal for an unchanged file, and never equal for one that cannot be read."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return (object(),)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def link(source: Path, target: Path) -> None:
    """Make `target` a link to the file `source`, or a copy where links cannot be."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
