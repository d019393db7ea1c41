"""Decodes audio files that people bring, in a child process that may crash or hang.

The child is `audio.decode_worker`. It gets an open file on stdin and a nameless result file on
stdout, never a path: a file's name cannot mislead it, it knows of no other file, and nothing
stays behind however it ends.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from core.errors import StudioError
from core.files import write_error
from core.text import printable

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

SHORTEST_S = 0.1
"""Below this a file is a click, not music."""

PATIENCE_S, METADATA_PATIENCE_S = 60.0, 15.0
"""How long the child may take to decode, on a busy machine, or to read tags. 240 s of MP3 cost it
one second."""

FRAME_SLACK_S = 0.07
"""How much longer than a limit an MP3 or AAC without a header may seem: its encoder added up to
three frames, and nothing in the file says so."""

DISK_FULL, WRITE_FAILED = 74, 73
"""Exit statuses of a child that could not write its result."""

CRASHES = tuple(
    -getattr(signal, name)
    for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
    if hasattr(signal, name)
)
"""Exit statuses of a child that a hostile file crashed inside FFmpeg."""

CRASHES_ON_WINDOWS = 0xC0000000
"""Exit statuses from here on are access violations and the like."""

TOO_SLOW = -getattr(signal, "SIGXCPU", 24)

LOG_BYTES = 8192
"""How much of the child's stderr goes to the log."""

WORKER = (sys.executable, "-m", "audio.decode_worker")

ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds the packages `audio` and `core`: a checkout or site-packages."""


@dataclass(frozen=True, eq=False)
class DecodedAudio:
    """The sound of a file.

    Attributes:
        sound: float32 [2, samples] at `SAMPLE_RATE`, finite, within full scale; mono is doubled.
        rate: Hz, in the file.
        channels: 1 to 8, in the file. More than two were mixed down by FFmpeg's matrix.
        seconds: how long it really plays, whatever its header says.
        notes: one sentence for each thing that was repaired or chosen.
    """

    sound: np.ndarray
    rate: int
    channels: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileMetadata:
    """The tags of a file of any format, unchecked: lower-case names as FFmpeg spells them.

    `cover` is the first attached picture, empty where there is none.
    """

    fields: dict[str, str] = field(default_factory=dict)
    cover: bytes = b""


def decode(
    path: Path,
    longest_s: float,
    folder: Path,
    shortest_s: float = SHORTEST_S,
    stopped: Callable[[], bool] = lambda: False,
) -> DecodedAudio:
    """Decode an audio file of any common format.

    Args:
        longest_s: seconds; a longer file is refused before it is decoded.
        folder: private, on a disk with room for 0.4 MB a second.
        stopped: called ten times a second; once true the child is killed and the file counts as
            unreadable.

    Raises:
        StudioError: `source-missing`, `source-unreadable`, `source-too-long`, `source-too-short`,
            `disk-full`, `not-writable`, or `internal` where the decoder itself is broken.
    """
    from core.requests import SAMPLE_RATE

    path, folder = Path(path), Path(folder)
    name = display_name(path)
    wanted = ["audio", str(SAMPLE_RATE), str(longest_s)]
    needed = int(longest_s * SAMPLE_RATE * 8)
    with open_regular_file(path, name) as file, _temporary_file(folder) as result:
        reply = _ask_worker(file, result, wanted, name, folder, needed, stopped)
        decoded = _received(result, reply)
    if decoded is None:
        raise _disk_full(folder, needed)
    if decoded.seconds < shortest_s:
        raise StudioError("source-too-short", name=name, seconds=decoded.seconds, limit=shortest_s)
    return decoded


def read_metadata(path: Path, folder: Path) -> FileMetadata:
    """Read the tags and the cover art of an audio file of any common format.

    Raises:
        StudioError: as `decode`, but for the lengths.
    """
    path, folder = Path(path), Path(folder)
    name = display_name(path)
    with open_regular_file(path, name) as file, _temporary_file(folder) as result:
        reply = _ask_worker(
            file, result, ["metadata"], name, folder, 1 << 24, patience_s=METADATA_PATIENCE_S
        )
        cover = result.read(reply["cover"])
    return FileMetadata(fields=reply["fields"], cover=cover)


def display_name(path: Path) -> str:
    """The name of a file as messages show it."""
    return printable(path.name) or "?"


def open_regular_file(
    path: Path, name: str, kind: Literal["source", "adapter"] = "source"
) -> BinaryIO:
    """Open once and for all what must be a regular file: no folder, pipe or device.

    Args:
        name: what messages call it.
        kind: whose errors are raised.

    Raises:
        StudioError: `source-missing`, `source-unreadable`, or the same of an adapter.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StudioError(f"{kind}-missing", name=name) from error
    except (OSError, ValueError) as error:
        problem = "it cannot be opened"
        raise StudioError(f"{kind}-unreadable", name=name, problem=problem) from error
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return os.fdopen(handle, "rb")
    os.close(handle)
    problem = "it is empty" if stat.S_ISREG(status.st_mode) else "it is not a file"
    raise StudioError(f"{kind}-unreadable", name=name, problem=problem)


def _temporary_file(folder: Path) -> BinaryIO:
    """A file in `folder` that is gone when it is closed, or when this process ends."""
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise write_error(folder / "sound", error, 1 << 20) from error


def _ask_worker(
    file: BinaryIO,
    result: BinaryIO,
    wanted: list[str],
    name: str,
    folder: Path,
    needed: int,
    stopped: Callable[[], bool] = lambda: False,
    patience_s: float | None = None,
) -> dict[str, Any]:
    """Run the child on `file` and return its reply; `result` then stands at what follows it.

    Raises:
        StudioError: what the child said, or what its end means.
    """
    with _temporary_file(folder) as errors:
        status = _run_worker(file, result, errors, wanted, stopped, patience_s or PATIENCE_S)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - LOG_BYTES))
        complaint = errors.read(LOG_BYTES).decode("utf-8", "replace")
    if status is None or status == TOO_SLOW:
        problem = "reading it takes too long"
        raise StudioError("source-unreadable", name=name, problem=problem)
    if status == DISK_FULL:
        raise _disk_full(folder, needed)
    if status == WRITE_FAILED:
        raise write_error(folder / "sound", OSError(errno.EIO, "write failed"), needed)
    if status in CRASHES or status >= CRASHES_ON_WINDOWS:
        log.warning("The audio decoder crashed on %s (exit status %s)", name, status)
        raise StudioError("source-unreadable", name=name, problem="it is damaged")
    reply = _reply(result) if status == 0 else None
    if reply is None:
        log.error("The audio decoder failed (exit status %s):\n%s", status, complaint)
        raise StudioError("internal", kind=_kind_of_failure(status, complaint))
    if "code" in reply:
        if reply.get("cause"):
            log.warning("The audio decoder could not read %s:\n%s", name, reply["cause"])
        raise StudioError(reply["code"], **{**reply["facts"], "name": name})
    return reply


def _disk_full(folder: Path, needed: int) -> StudioError:
    return StudioError("disk-full", place=folder.name, needed=f"{max(1, needed >> 20)} MB")


def _run_worker(
    file: BinaryIO,
    result: BinaryIO,
    errors: BinaryIO,
    wanted: list[str],
    stopped: Callable[[], bool],
    patience_s: float,
) -> int | None:
    """The child's exit status, or None if it was stopped or took longer than `patience_s`."""
    until = time.monotonic() + patience_s
    # Not by the working folder alone: PYTHONSAFEPATH keeps that out of the search path.
    search_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [*WORKER, *wanted],
        stdin=file,
        stdout=result,
        stderr=errors,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": search_path,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    ) as child:
        try:
            while time.monotonic() < until and not stopped():
                with suppress(subprocess.TimeoutExpired):
                    return child.wait(0.1)
        finally:
            child.kill()
    return None


def _reply(result: BinaryIO) -> dict[str, Any] | None:
    """The child's line of JSON; None if it is anything else."""
    result.seek(0)
    try:
        reply = json.loads(result.readline())
        if "code" in reply:
            StudioError(reply["code"], **{**reply["facts"], "name": ""})
            return reply
        return reply if {"samples", "fields"} & reply.keys() else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _kind_of_failure(status: int, complaint: str) -> str:
    """The exception at the end of a traceback, or what the exit status means."""
    lines = complaint.strip().splitlines()
    if lines and (found := re.match(r"(?:\w+\.)*(\w*(?:Error|Exception|Warning))\b", lines[-1])):
        return found[1]
    if status < 0:
        with suppress(ValueError):
            return f"decoder ended by {signal.Signals(-status).name}"
    return f"decoder ended with status {status}"


def _received(result: BinaryIO, reply: dict[str, Any]) -> DecodedAudio | None:
    """The sound behind the child's reply; None if less was written than it says."""
    import numpy as np

    sound = np.fromfile(result, np.float32)
    if sound.size != 2 * reply["samples"]:
        return None
    return DecodedAudio(
        sound=sound.reshape(2, reply["samples"]),
        rate=reply["rate"],
        channels=reply["channels"],
        seconds=reply["seconds"],
        notes=tuple(reply["notes"]),
    )
