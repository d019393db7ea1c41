"""Finished tracks on disk: what they are called, how they are kept whole, which of them stay.

Any number of daemons share the folder, and each may be killed at any moment. A track is a WAV and a
JSON file beside it; both are written whole under other names first, and moved under a lock that the
system gives up when its holder dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from core import files

SCHEMA = 1
"""Raised whenever the same request would give another file, and no version of a model says so."""


NAME = re.compile(r"[0-9a-f]{16}")


LOCK_S = 2.0
"""How long another daemon is waited for: moving two files takes none of it."""


STALE_S = 600.0
"""A half file this old belongs to nobody: writing one takes a second."""


def track_id(
    backend: str,
    model_version: str,
    prompt: str,
    seed: int,
    duration_s: float,
    rest: Sequence[Any] = (),
) -> str:
    """The name of the track that these values make: 16 hexadecimal digits.

    Args:
        duration_s: as requested.
        rest: what else decides how it sounds, in an order of its own; 7 and 7.0 are one.
    """
    values = [SCHEMA, backend, model_version, prompt, seed, duration_s, *rest]
    short = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    text = json.dumps(short, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


NEEDED = {
    *("track_id", "backend", "model_version", "prompt", "seed", "duration_sec", "sample_rate"),
    *("channels", "last_used", "size_bytes"),
}
"""What a sidecar must say to be one."""


class Staged(NamedTuple):
    """A sound that is on disk, whole, under a name that nobody reads."""

    path: Path
    size_bytes: int
    sha256: str


class TrackCache:
    """The tracks in one folder, at most so many bytes and so many of them.

    Args:
        max_bytes: of all WAVs together; the track just written stays even if it is larger.
        max_tracks: how many; None for any number.
    """

    def __init__(self, folder: Path, max_bytes: int, max_tracks: int | None = None) -> None:
        self.folder = folder.absolute()
        self._max_bytes, self._max_tracks = max_bytes, max_tracks

    def path(self, track: str) -> Path:
        """Where the track's sound is, or would be."""
        return self.folder / f"{track}.wav"

    def find(self, track: str, use: bool = True) -> dict[str, Any] | None:
        """What the sidecar of `track` says, if its sound is there too; else both are removed.

        Args:
            use: whether this counts as having used the track.
        """
        if not NAME.fullmatch(track):  # anything else might lead out of the folder
            return None
        if not self._sidecar(track).exists() and not self.path(track).exists():
            return None
        with self._locked():
            facts = self._read(track)
            if facts is None:
                self._remove(track)
            elif use:
                facts["last_used"] = _now()
                with contextlib.suppress(OSError):  # a read-only cache still plays
                    self._write_sidecar(track, facts)
            return facts

    def stage(self, track: str, sound: bytes) -> Staged:
        """Bring `sound`, a whole WAV, to disk.

        Raises:
            StudioError: `disk-full`, `not-writable`.
        """
        half = self.folder / f".{track}.{os.getpid()}.wav.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _put(half, sound)
        except OSError as error:
            with contextlib.suppress(OSError):
                half.unlink()
            raise files.write_error(half, error, len(sound)) from error
        return Staged(half, len(sound), hashlib.sha256(sound).hexdigest())

    def publish(
        self, track: str, staged: Staged, facts: dict[str, Any], keep: Collection[str] = ()
    ) -> dict[str, Any]:
        """Move what was staged to its name with `facts` beside it; returns what the sidecar says.

        A track that is there already, from another daemon, stays as it is. Older ones make room,
        but none in `keep`.

        Raises:
            StudioError: `disk-full`, `not-writable`; nothing of the track is left then.
        """
        now = _now()
        with self._locked():
            known = self._read(track)
            if known is not None:
                staged.path.unlink(missing_ok=True)
                return known
            facts = {
                "track_id": track,
                **facts,
                "created_at": now,
                "last_used": now,
                "size_bytes": staged.size_bytes,
                "sha256": staged.sha256,
            }
            try:
                os.replace(staged.path, self.path(track))
                self._write_sidecar(track, facts)
                _sync(self.folder)
            except OSError as error:
                self._remove(track)
                staged.path.unlink(missing_ok=True)
                raise files.write_error(self.path(track), error, staged.size_bytes) from error
            self._make_room({track, *keep})
        return facts

    def _read(self, track: str) -> dict[str, Any] | None:
        try:
            facts = json.loads(self._sidecar(track).read_text("utf-8"))
            whole = facts.keys() >= NEEDED and isinstance(facts["last_used"], str)
            whole = whole and facts["track_id"] == track
            return facts if whole and self._size(track) == facts["size_bytes"] else None
        except (OSError, ValueError, AttributeError):
            return None

    def _size(self, track: str) -> int:
        return self.path(track).stat().st_size

    def _make_room(self, keep: Collection[str]) -> None:
        """Remove what is no track, then the least recently used until the rest fits."""
        found = {}
        for path in self.folder.iterdir():
            if path.suffix == ".part":
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE_S:
                        path.unlink()
            elif path.suffix in (".wav", ".json") and NAME.fullmatch(path.stem):
                found[path.stem] = self._read(path.stem)
        for track in [track for track, facts in found.items() if facts is None]:
            self._remove(track)
            del found[track]
        whole, count = sum(facts["size_bytes"] for facts in found.values()), len(found)
        for track in sorted(found, key=lambda track: found[track]["last_used"]):
            fits = self._max_tracks is None or count <= self._max_tracks
            if fits and whole <= self._max_bytes:
                return
            if track not in keep:
                self._remove(track)
                whole, count = whole - found[track]["size_bytes"], count - 1

    def _remove(self, track: str) -> None:
        """The sidecar first: without it the sound is no track any more."""
        for path in (self._sidecar(track), self.path(track)):
            with contextlib.suppress(OSError):
                path.unlink()

    def _sidecar(self, track: str) -> Path:
        return self.folder / f"{track}.json"

    def _write_sidecar(self, track: str, facts: dict[str, Any]) -> None:
        half = self.folder / f".{track}.{os.getpid()}.json.part"
        try:
            _put(half, (json.dumps(facts, indent=2) + "\n").encode())
            os.replace(half, self._sidecar(track))
        finally:
            half.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One daemon at a time; where locks do not work or are not given up, without."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".lock")
        with contextlib.suppress(Timeout, OSError, NotImplementedError):
            lock.acquire(timeout=LOCK_S, poll_interval=0.01)
        try:
            yield
        finally:
            lock.release()


def _put(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Let a folder's new names outlast a power cut, where the system knows how."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
