"""Files: writes that are complete or leave nothing, safe names, private and cache folders."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import re
import secrets
import shutil
import string
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import cast

import platformdirs

from core import text
from core.errors import StudioError

Piece = bytes | bytearray | memoryview

APP_NAME = "ace-music-studio"
"""The name of the cache folder."""

LETTERS = string.ascii_lowercase + string.digits

PRIVATE = "ace-studio-"
"""How the names of private folders begin."""

BLOCK = 1 << 20
"""Bytes that are copied at a time."""

MAX_NAME_BYTES, MAX_STEM_CHARS = 200, 40
"""The longest name of an uploaded file, in bytes of UTF-8, and the longest name made from a prompt,
in characters. Most file systems allow 255 bytes, encrypted ones 143 characters."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that has no room for what is written: on it, for this user, in one file."""

NOT_WRITABLE = {
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission was denied",
    errno.EPERM: "permission was denied",
    errno.ENOENT: "the folder does not exist",
    errno.ENOTDIR: "part of the path is not a folder",
    errno.EISDIR: "there is a folder of that name",
    errno.ENAMETOOLONG: "the file name is too long",
    errno.ELOOP: "the path is a loop of links",
    errno.EIO: "the disk reports an error",
}
"""Why a file cannot be written, as a clause, by error number."""


def atomic_write(
    target: Path,
    content: str | Piece | Path | Iterable[Piece],
    size: int = 0,
    *,
    durable: bool = False,
) -> None:
    """Write a file, complete or not at all: until the end, what was at `target` stays as it is.

    Args:
        content: text (as UTF-8), bytes, pieces of bytes, or the path of a file to copy.
        size: bytes of all pieces together, for the message about a full disk.
        durable: let the file outlast a power cut.

    Raises:
        StudioError: `disk-full`, `not-writable`, or `source-missing` for a path. No temporary file
            is left. Errors of the iterable that gives the pieces come through as they are.
    """
    pieces: Iterable[Piece]
    if isinstance(content, Path):
        size, pieces = _blocks_of(content)
    elif isinstance(content, str):
        pieces = (content.encode("utf-8"),)
        size = len(pieces[0])
    elif isinstance(content, bytes | bytearray | memoryview):
        size, pieces = len(content), cast("tuple[Piece]", (content,))
    else:
        pieces = content
    try:
        replace_file(target, pieces, durable=durable)
    except OSError as error:
        raise write_error(target, error, size) from error


def replace_file(target: Path, pieces: Iterable[Piece], *, durable: bool = False) -> None:
    """`atomic_write` for code that decides itself what an `OSError` means."""
    handle, temporary = _temporary_beside(target)
    try:
        try:
            for piece in pieces:
                _write_all(handle, piece)
            if durable:
                os.fsync(handle)
        except BaseException:
            # The first error is the one that explains the failure.
            with contextlib.suppress(OSError):
                os.close(handle)
            raise
        os.close(handle)  # network disks report a full disk only here
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Let new names in `folder` outlast a power cut, where the system can. Raises `OSError`."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`, whose files move into `folder` when the block ends well.

    If the block or one of the moves fails, none of the files is left in `folder`, except in place
    of an older file of the same name. However the block ends, the temporary folder is gone.

    Raises:
        OSError: a move failed.
    """
    staged = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=folder))
    new: list[Path] = []
    try:
        yield staged
        for path in sorted(staged.iterdir()):
            target = folder / path.name
            if not os.path.lexists(target):
                new.append(target)
            os.replace(path, target)
    except BaseException:
        for target in new:
            with contextlib.suppress(OSError):
                os.unlink(target)
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_writable(target: Path, needed: int = 0) -> None:
    """Check that a file can be written to `target`, before the work that makes it.

    Args:
        needed: bytes that the file will have.

    Raises:
        StudioError: `not-writable` where the folder is missing or takes no files, the name is too
            long, or something other than a file has that name; `disk-full`.
    """
    try:
        # Also fails for a name that is too long, by the rules of this very file system.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "is not a file")
        handle, temporary = _temporary_beside(target)
        try:
            try:
                _write_all(handle, bytes(4096))
            finally:
                os.close(handle)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        disk = shutil.disk_usage(target.parent)
    except (OSError, ValueError) as error:
        raise write_error(target, error, needed) from error
    if disk.total and disk.free < needed:  # some network disks do not tell their size
        raise _disk_full(target, needed)


def write_error(path: Path, error: Exception, needed: int) -> StudioError:
    """The error to show for a failed write: a full disk, or a place that takes no files.

    Args:
        path: what was written.
        error: why it failed. Its number decides, not the free space, which may have changed since.
        needed: bytes that were to be written.
    """
    number = getattr(error, "errno", None) or 0
    # numpy reports a short write like this, and without a number.
    short = not number and re.search(r"\d+ requested and \d+ written", str(error))
    if number in FULL or short:
        return _disk_full(path, needed)
    problem = NOT_WRITABLE.get(number, "the system refused it")
    fix = "Choose another folder or file name (on the command line with --out)"
    if _is_temporary(path):
        fix = "Set TMPDIR to a folder that can be written to, and start again"
    return StudioError("not-writable", place=_place(path), problem=problem, fix=fix)


def safe_name(name: str, default: str = "song", max_bytes: int = MAX_NAME_BYTES) -> str:
    """A file name that every common system accepts, as close to `name` as possible.

    Letters of every script keep their combining marks, and emoji stay whole. Path separators,
    control characters and what Windows forbids become "_". The suffix survives the limit.

    Args:
        default: the name for what leaves nothing.
        max_bytes: of UTF-8, the suffix included.
    """
    name = unicodedata.normalize("NFC", name)
    name = "".join(c if _is_safe(c) else "_" for c in name).strip(" ").lstrip(".").rstrip(". ")
    stem, dot, suffix = name.rpartition(".")
    if not dot or not re.fullmatch(r"\w{1,10}", suffix):
        stem, suffix = name, ""
    suffix = dot + suffix if suffix else ""
    stem = f"_{stem}" if _is_reserved(stem) else stem
    stem = text.truncate(stem, max_bytes, max_bytes - len(suffix.encode())).rstrip(". ")
    return (stem or default) + suffix


def name_from_text(words: str, default: str) -> str:
    """A short file name, without suffix, from a prompt: its words in small letters, with dashes."""
    normal = unicodedata.normalize("NFC", words.lower())
    kept = "".join(c if _is_word(c) else " " for c in normal)
    short = text.truncate("-".join(kept.split()), MAX_STEM_CHARS, MAX_NAME_BYTES)
    return safe_name(short.strip("-_" + text.JOINERS), default)


@cache
def private_folder() -> Path:
    """A temporary folder that only this user can read, removed when this process ends.

    Folders of processes that ended without removing theirs are removed, too.
    """
    import psutil

    root = Path(tempfile.gettempdir())
    for stale in root.glob(f"{PRIVATE}*-*"):
        pid = stale.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{PRIVATE}{os.getpid()}-"))
    owner = os.getpid()
    # A forked process must not remove the folder of its parent.
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


def cache_folder() -> Path:
    """Where the studio keeps between starts what it measured on this computer."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    older = Path(base) / APP_NAME
    folder = platformdirs.user_cache_path(APP_NAME, appauthor=False)
    # Earlier versions wrote there on every system, and what they measured still holds.
    return older if older.is_dir() and not folder.is_dir() else folder


def _blocks_of(source: Path) -> tuple[int, Iterator[bytes]]:
    """The size of a file, and its content. The file is open from now on, whatever its name does."""
    try:
        file = source.open("rb")
    except OSError as error:
        raise StudioError("source-missing", name=source.name) from error

    def blocks() -> Iterator[bytes]:
        with file:
            while True:
                try:
                    block = file.read(BLOCK)
                except OSError as error:
                    problem = "the disk reports an error"
                    raise StudioError(
                        "source-unreadable", name=source.name, problem=problem
                    ) from error
                if not block:
                    return
                yield block

    return os.fstat(file.fileno()).st_size, blocks()


def _temporary_beside(target: Path) -> tuple[int, Path]:
    """A new file in the folder of `target`, open for writing.

    Its name is no longer than that of `target`: where that one fits, this one does.
    """
    length = len(os.fsencode(target.name))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    for _ in range(100):
        # At least two letters between the dots, if the name is long enough for dots.
        spare = length - len("..part")
        letters = (secrets.choice(LETTERS) for _ in range(min(12, spare if spare > 1 else length)))
        name = "".join(letters)
        path = target.with_name(f".{name}.part" if spare > 1 else name)
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags, 0o666), path
    raise FileExistsError(errno.EEXIST, "no name is free for a temporary file")


def _write_all(handle: int, piece: Piece) -> None:
    left = memoryview(piece).cast("B")
    while left:
        written = os.write(handle, left)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left = left[written:]


def _disk_full(path: Path, needed: int) -> StudioError:
    megabytes = max(1, -(-needed // (1 << 20)))
    return StudioError("disk-full", place=_place(path), needed=f"{megabytes} MB")


def _place(path: Path) -> str:
    """The folder of `path` by its own name: where it lies is nobody's business."""
    if _is_temporary(path):
        return "the temporary folder"
    return path.parent.name or "this folder"


def _is_temporary(path: Path) -> bool:
    return any(folder.name.startswith(PRIVATE) for folder in path.parents)


def _is_safe(char: str) -> bool:
    if char in '/\\:*?"<>|':
        return False
    return char.isprintable() or char in text.JOINERS


def _is_word(char: str) -> bool:
    """Whether `char` is part of a word, or of an emoji."""
    emoji = unicodedata.category(char) in ("So", "Sk") and ord(char) > 0x2000
    return char.isalnum() or char == "_" or text.is_mark(char) or char in text.JOINERS or emoji


def _is_reserved(stem: str) -> bool:
    """Whether Windows keeps the name for a device."""
    return bool(
        re.fullmatch(
            r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(\..*)?", stem.lower()
        )
    )
