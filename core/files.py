"""Files of our own: private folders, atomic writes and the errors of a full or read-only disk."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import StudioError

if TYPE_CHECKING:
    pass


def copy_file(source: Path, target: Path) -> None:
    """Put a copy of the finished file `source` at `target`, complete or not at all.

    Raises:
        StudioError: `disk-full` or `not-writable`; no file is left behind.
    """
    half = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, half)
        os.replace(half, target)
    except OSError as error:
        raise write_error(target, error, source.stat().st_size) from error
    finally:
        half.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text`, complete or not at all. Raises as `hand_over` does."""
    half = path.with_name(f".{path.name}.part")
    try:
        half.write_text(text, encoding="utf-8")
        os.replace(half, path)
    except OSError as error:
        raise write_error(path, error, len(text)) from error
    finally:
        half.unlink(missing_ok=True)


def write_error(path: Path, error: Exception, needed: int) -> StudioError:
    """What a failed write means: a full disk, or a place that takes no files."""
    import errno

    temporary = Path(tempfile.gettempdir()) in path.resolve().parents
    place = "the temporary folder" if temporary else path.parent.name or "this folder"
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    try:
        full = full or shutil.disk_usage(path.parent).free < needed
    except OSError:
        full = full or False
    if full:
        return StudioError("disk-full", place=place, needed=f"{max(1, needed >> 20)} MB")
    return StudioError("not-writable", place=place)


@cache
def private_folder() -> Path:
    """A folder of this process that only this user can read; gone when the process ends."""
    import psutil

    root = Path(tempfile.gettempdir())
    for stale in root.glob("ace-studio-*-*"):
        pid = stale.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"ace-studio-{os.getpid()}-"))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


def cache_folder() -> Path:
    """Where the studio keeps what it has learned about this machine between starts."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ace-music-studio"
