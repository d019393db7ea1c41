"""Download of one file over HTTP: resumable, checked by its hash, cancellable at any piece."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any

RETRIES = 5
"""Attempts in a row without any new byte before the download fails."""


PAUSE_S, LONGEST_PAUSE_S = 0.5, 120.0
"""First delay between two attempts, doubled each time; longest Retry-After that is obeyed."""


PULSE_S = 0.25
"""Interval in seconds between two yields while waiting."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `hash` is its sha256, or git's sha1 for files outside of LFS."""

    path: str
    size: int
    hash: str

    def digest(self) -> Any:
        """A new hash object of the kind of `hash` (git's begins with the length)."""
        if len(self.hash) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def is_safe(self) -> bool:
        """Whether its path and its hash are plain names that stay inside the cache."""
        path = PurePosixPath(self.path)
        inside = not path.is_absolute() and ".." not in path.parts
        plain = not re.search(r"[\\:\0]", self.path)
        return inside and plain and bool(re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", self.hash))


class PartialFile:
    """The part of a file that is on disk, with its hash so far. The caller holds the file's lock.

    The ETag of the response that began it is stored beside it, for If-Range: the server that
    sends the bytes may name them otherwise than the hub, whose name is the hash.
    """

    def __init__(self, file: RemoteFile, path: Path, url: str) -> None:
        self._file, self._path, self._url = file, path, url
        self._etag = path.with_name(f"{path.name}.etag")
        self._size, self._digest = 0, file.digest()

    def complete(self) -> Iterator[int]:
        """Download the rest and check the hash. Yields the number of bytes on disk.

        What an earlier run left is hashed first. If the result is wrong, the download restarts
        once, in case that part was to blame.

        Raises:
            WrongContent: the file's contents are not what the hub lists.
        """
        for restarted in (False, True):
            yield from self._hash_existing()
            from_scratch = not self._size
            yield from self._download_rest()
            if self._size == self._file.size and self._digest.hexdigest() == self._file.hash:
                return
            self._restart()
            if from_scratch or restarted:
                break
        raise WrongContent("has other contents than published")

    def publish(self, blob: Path) -> None:
        """Move the complete file to `blob`, flushed to disk first."""
        with self._path.open("ab") as file:
            os.fsync(file.fileno())
        os.replace(self._path, blob)
        self._etag.unlink(missing_ok=True)

    def _restart(self) -> None:
        self._path.unlink(missing_ok=True)
        self._etag.unlink(missing_ok=True)
        self._size, self._digest = 0, self._file.digest()

    def _hash_existing(self) -> Iterator[int]:
        existing = size_of(self._path)
        if existing > self._file.size:
            self._restart()
        elif existing:
            with self._path.open("rb") as file:
                while piece := file.read(1 << 20):
                    self._digest.update(piece)
                    self._size += len(piece)
                    yield existing

    def _download_rest(self) -> Iterator[int]:
        """Receive the rest, retrying as long as attempts bring new bytes."""
        from huggingface_hub.errors import HTTPError

        backoff, furthest = Backoff(), self._size
        while self._size < self._file.size:
            try:
                yield from self._receive()
                trouble = WrongContent(
                    f"is {self._size} bytes long and should be {self._file.size}"
                )
            except HTTPError as error:
                trouble = error
                if status_of(error) == 416:
                    self._restart()
            if self._size > furthest:
                backoff, furthest = Backoff(), self._size
            if self._size < self._file.size:
                for _ in backoff.wait(trouble):
                    yield self._size

    def _receive(self) -> Iterator[int]:
        """Read one response to its end or the file's; every piece is on disk before it counts.

        The HTTP client drops the token where a redirect leaves the hub's origin.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if self._size:
            headers["Range"] = f"bytes={self._size}-"
            if self._etag.is_file():
                headers["If-Range"] = self._etag.read_text()
        with get_session().stream(
            "GET",
            self._url,
            headers=headers,
            follow_redirects=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            hf_raise_for_status(response)
            if not self._continues(response):
                self._restart()
                if (etag := response.headers.get("ETag", "")).startswith('"'):
                    self._etag.write_text(etag)
            with self._path.open("ab") as disk:
                for piece in response.iter_bytes():
                    disk.write(piece)
                    disk.flush()
                    self._digest.update(piece)
                    self._size += len(piece)
                    yield self._size
                    if self._size > self._file.size:
                        return

    def _continues(self, response: Any) -> bool:
        """Whether a response continues where the disk ends; otherwise it must be the whole file."""
        size, length = self._file.size, response.headers.get("Content-Length")
        if response.status_code == 206:
            sent = response.headers.get("Content-Range", "")
            if self._size and re.fullmatch(rf"bytes {self._size}-\d+/({size}|\*)", sent):
                return True
            self._restart()
            raise WrongContent("came from another place than asked for")
        if length and "Content-Encoding" not in response.headers and int(length) != size:
            raise WrongContent(f"is {length} bytes long and should be {size}")
        return False


class Backoff:
    """Waits between attempts, exponentially longer, and gives up after `RETRIES` of them."""

    def __init__(self) -> None:
        self._failures = 0

    def wait(self, error: Exception) -> Iterator[None]:
        """Wait as long as the server asks, or twice as long as before; yields meanwhile.

        Raises:
            Exception: `error` itself, if retrying is pointless or was done often enough.
        """
        self._failures += 1
        status, requested = status_of(error), _retry_after(error)
        final = status is not None and status < 500 and status not in (408, 416, 429)
        if final or self._failures > RETRIES or (requested or 0) > LONGEST_PAUSE_S:
            raise error
        delay = PAUSE_S * 2 ** (self._failures - 1) if requested is None else requested
        until = time.monotonic() + delay
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, PULSE_S))
            yield


class WrongContent(Exception):
    """The bytes differ from the hub's listing. The message continues a sentence: "model.json …"."""


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error carries, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: Exception) -> float | None:
    """The seconds of a Retry-After header, given as seconds or as a date (RFC 9110, 10.2.3)."""
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def size_of(path: Path) -> int:
    """The size of the file at `path` in bytes, 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
