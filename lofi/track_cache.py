"""Cache of finished tracks on disk: ids, atomic writes, eviction.

Any number of daemons share the folder, and each may be killed at any moment. A track is a WAV file
and a JSON sidecar. Both are written under temporary names first, and renamed while holding a lock
that the system releases when its holder dies.
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
"""Raise it when the same request would give a different file although no model version changed."""


TRACK_ID = re.compile(r"[0-9a-f]{16}")


LOCK_TIMEOUT_S = 2.0
"""How long to wait for another daemon, which only renames two files under the lock."""


STALE_S = 600.0
"""A temporary file of this age was abandoned: writing one takes a second."""


def track_id(
    backend: str,
    model_version: str,
    prompt: str,
    seed: int,
    duration_s: float,
    sampling: Sequence[Any] = (),
) -> str:
    """The id of the track that these values produce: 16 hexadecimal digits.

    Args:
        prompt: as sent, not normalised: tracks that older versions cached under it are found.
        duration_s: as requested.
        sampling: further values that shape the sound, in a fixed order. 7 and 7.0 are the same.
    """
    values = [SCHEMA, backend, model_version, prompt, seed, duration_s, *sampling]
    numbers = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    text = json.dumps(numbers, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


REQUIRED_KEYS = {
    *("track_id", "backend", "model_version", "prompt", "seed", "duration_sec", "sample_rate"),
    *("channels", "last_used", "size_bytes"),
}
"""Keys without which a sidecar is invalid."""


class Staged(NamedTuple):
    """A complete audio file under a temporary name."""

    path: Path
    size_bytes: int
    sha256: str


class TrackCache:
    """The tracks in one folder, limited in bytes and number; the least recently used go first.

    Args:
        max_bytes: of all WAV files together. The newest track stays even if it alone is larger.
        max_tracks: None for any number.
    """

    def __init__(self, folder: Path, max_bytes: int, max_tracks: int | None = None) -> None:
        self.folder = folder.absolute()
        self._max_bytes, self._max_tracks = max_bytes, max_tracks

    def path(self, track: str) -> Path:
        """The track's WAV file, whether it exists or not."""
        return self.folder / f"{track}.wav"

    def find(self, track: str, use: bool = True) -> dict[str, Any] | None:
        """The sidecar of `track`, if its WAV is complete; otherwise both files are removed.

        Args:
            use: whether this counts as a use of the track.
        """
        if not TRACK_ID.fullmatch(track):  # anything else could lead out of the folder
            return None
        if not self._sidecar(track).exists() and not self.path(track).exists():
            return None
        with self._locked():
            facts = self._read(track)
            if facts is None:
                self._remove(track)
            elif use:
                facts["last_used"] = _now()
                with contextlib.suppress(OSError):  # a read-only cache can still be played from
                    self._write_sidecar(track, facts)
            return facts

    def stage(self, track: str, wav: bytes) -> Staged:
        """Write `wav` under a temporary name.

        Raises:
            StudioError: `disk-full`, `not-writable`.
        """
        temporary = self.folder / f".{track}.{os.getpid()}.wav.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.replace_file(temporary, [wav], durable=True)
        except OSError as error:
            raise files.write_error(temporary, error, len(wav)) from error
        return Staged(temporary, len(wav), hashlib.sha256(wav).hexdigest())

    def publish(
        self, track: str, staged: Staged, facts: dict[str, Any], keep: Collection[str] = ()
    ) -> dict[str, Any]:
        """Rename a staged file to its final name and write `facts` beside it.

        A track that another daemon has published meanwhile stays as it is. Old tracks are evicted,
        but none in `keep`.

        Returns:
            The sidecar.

        Raises:
            StudioError: `disk-full`, `not-writable`; no file of the track is left then.
        """
        now = _now()
        with self._locked():
            existing = self._read(track)
            if existing is not None:
                staged.path.unlink(missing_ok=True)
                return existing
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
                files.sync_folder(self.folder)
            except OSError as error:
                self._remove(track)
                staged.path.unlink(missing_ok=True)
                raise files.write_error(self.path(track), error, staged.size_bytes) from error
            self._evict({track, *keep})
        return facts

    def _read(self, track: str) -> dict[str, Any] | None:
        try:
            facts = json.loads(self._sidecar(track).read_text("utf-8"))
            valid = facts.keys() >= REQUIRED_KEYS and isinstance(facts["last_used"], str)
            valid = valid and facts["track_id"] == track
            return facts if valid and self._size(track) == facts["size_bytes"] else None
        except (OSError, ValueError, AttributeError):
            return None

    def _size(self, track: str) -> int:
        return self.path(track).stat().st_size

    def _evict(self, keep: Collection[str]) -> None:
        """Remove leftovers and broken tracks, then the least recently used beyond the limits."""
        found = {}
        for path in self.folder.iterdir():
            if path.suffix == ".part":
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE_S:
                        path.unlink()
            elif path.suffix in (".wav", ".json") and TRACK_ID.fullmatch(path.stem):
                found[path.stem] = self._read(path.stem)
        for track in [track for track, facts in found.items() if facts is None]:
            self._remove(track)
            del found[track]
        total, count = sum(facts["size_bytes"] for facts in found.values()), len(found)
        for track in sorted(found, key=lambda track: found[track]["last_used"]):
            fits = self._max_tracks is None or count <= self._max_tracks
            if fits and total <= self._max_bytes:
                return
            if track not in keep:
                self._remove(track)
                total, count = total - found[track]["size_bytes"], count - 1

    def _remove(self, track: str) -> None:
        """The sidecar goes first: a WAV without one is not a track any more."""
        for path in (self._sidecar(track), self.path(track)):
            with contextlib.suppress(OSError):
                path.unlink()

    def _sidecar(self, track: str) -> Path:
        return self.folder / f"{track}.json"

    def _write_sidecar(self, track: str, facts: dict[str, Any]) -> None:
        text = json.dumps(facts, indent=2) + "\n"
        files.replace_file(self._sidecar(track), [text.encode()], durable=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder. Goes on without where locks do not work or the holder keeps it."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".lock")
        with contextlib.suppress(Timeout, OSError, NotImplementedError):
            lock.acquire(timeout=LOCK_TIMEOUT_S, poll_interval=0.01)
        try:
            yield
        finally:
            lock.release()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
