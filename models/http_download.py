"""One file from the hub to disk over HTTP: gone on with, proven by its hash, stopped at any piece."""

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
"""Attempts in a row that may bring nothing new."""


PAUSE_S, LONGEST_PAUSE_S = 0.5, 120.0
"""The first wait between two attempts, doubled each time; the longest that a server may ask for."""


PULSE_S = 0.25
"""Seconds between two signs of life while nothing can be done but wait."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `hash` is its sha256, or git's sha1 where it is no LFS file."""

    path: str
    size: int
    hash: str

    def digest(self) -> Any:
        """The hash of nothing yet (git's begins with the length)."""
        if len(self.hash) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def is_safe(self) -> bool:
        """Whether its names stay in the folders they are meant for."""
        path = PurePosixPath(self.path)
        inside = not path.is_absolute() and ".." not in path.parts
        plain = not re.search(r"[\\:\0]", self.path)
        return inside and plain and bool(re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", self.hash))


class PartialFile:
    """What is on disk of a file, with its hash so far. Only the holder of its lock touches it.

    Beside it stands the ETag of the answer that began it: the hub's own files are named by their
    hash, but what a server calls a file is what its If-Range must be told.
    """

    def __init__(self, file: RemoteFile, path: Path, address: str) -> None:
        self._file, self._path, self._address = file, path, address
        self._tag = path.with_name(f"{path.name}.etag")
        self._at, self._digest = 0, file.digest()

    def complete(self) -> Iterator[int]:
        """Go on to the file's end and prove it. Yields the bytes on disk.

        What an earlier run left is read back first; if the whole turns out wrong, it is begun anew
        once, in case that part was at fault.
        """
        for anew in (False, True):
            yield from self._read_back()
            mine = not self._at
            yield from self._go_on()
            if self._at == self._file.size and self._digest.hexdigest() == self._file.hash:
                return
            self._begin_anew()
            if mine or anew:
                break
        raise WrongContent("has other contents than published")

    def settle(self, blob: Path) -> None:
        """Make it a finished file, safe from a power cut, under its hash."""
        with self._path.open("ab") as whole:
            os.fsync(whole.fileno())
        os.replace(self._path, blob)
        self._tag.unlink(missing_ok=True)

    def _begin_anew(self) -> None:
        self._path.unlink(missing_ok=True)
        self._tag.unlink(missing_ok=True)
        self._at, self._digest = 0, self._file.digest()

    def _read_back(self) -> Iterator[int]:
        have = size_of(self._path)
        if have > self._file.size:
            self._begin_anew()
        elif have:
            with self._path.open("rb") as begun:
                while piece := begun.read(1 << 20):
                    self._digest.update(piece)
                    self._at += len(piece)
                    yield have

    def _go_on(self) -> Iterator[int]:
        """Receive the rest, in as many attempts as bring something new."""
        from huggingface_hub.errors import HTTPError

        patience, furthest = Backoff(), self._at
        while self._at < self._file.size:
            try:
                yield from self._receive()
                trouble = WrongContent(f"is {self._at} bytes long and should be {self._file.size}")
            except HTTPError as error:
                trouble = error
                if status_of(error) == 416:
                    self._begin_anew()
            if self._at > furthest:
                patience, furthest = Backoff(), self._at
            if self._at < self._file.size:
                for _ in patience.after(trouble):
                    yield self._at

    def _receive(self) -> Iterator[int]:
        """One answer of the server, to its end or the file's, each piece on disk before it counts.

        The client drops the token where a redirect leaves the hub's origin.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if self._at:
            headers["Range"] = f"bytes={self._at}-"
            if self._tag.is_file():
                headers["If-Range"] = self._tag.read_text()
        with get_session().stream(
            "GET",
            self._address,
            headers=headers,
            follow_redirects=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as answer:
            hf_raise_for_status(answer)
            if not self._continues(answer):
                self._begin_anew()
                if (tag := answer.headers.get("ETag", "")).startswith('"'):
                    self._tag.write_text(tag)
            with self._path.open("ab") as disk:
                for piece in answer.iter_bytes():
                    disk.write(piece)
                    disk.flush()
                    self._digest.update(piece)
                    self._at += len(piece)
                    yield self._at
                    if self._at > self._file.size:
                        return

    def _continues(self, answer: Any) -> bool:
        """Whether an answer goes on where the disk ends; if not, it must be the whole file."""
        size, sent = self._file.size, answer.headers.get("Content-Length")
        if answer.status_code == 206:
            said = answer.headers.get("Content-Range", "")
            if self._at and re.fullmatch(rf"bytes {self._at}-\d+/({size}|\*)", said):
                return True
            self._begin_anew()
            raise WrongContent("came from another place than asked for")
        if sent and "Content-Encoding" not in answer.headers and int(sent) != size:
            raise WrongContent(f"is {sent} bytes long and should be {size}")
        return False


class Backoff:
    """How long to wait for a server that fails, and when to stop."""

    def __init__(self) -> None:
        self._failures = 0

    def after(self, error: Exception) -> Iterator[None]:
        """Wait, as long as the server asks or twice as long as before; yields while it does.

        Raises:
            Exception: `error` itself, where another attempt is of no use or too many were.
        """
        self._failures += 1
        status, asked = status_of(error), _retry_after(error)
        final = status is not None and status < 500 and status not in (408, 416, 429)
        if final or self._failures > RETRIES or (asked or 0) > LONGEST_PAUSE_S:
            raise error
        wait = PAUSE_S * 2 ** (self._failures - 1) if asked is None else asked
        until = time.monotonic() + wait
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, PULSE_S))
            yield


class WrongContent(Exception):
    """What came is not what the hub's listing says; the text goes on from the file's name."""


def status_of(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: Exception) -> float | None:
    """The seconds that a server asks to wait, told as seconds or as a date (RFC 9110, 10.2.3)."""
    said = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    if said.isdigit():
        return float(said)
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def size_of(path: Path) -> int:
    """Bytes in the file at `path`, 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
