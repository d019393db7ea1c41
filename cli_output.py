"""What a command shows and writes: its progress line, its result, its files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO, cast

import platformdirs

from audio import encode, lyric_files, metadata, settings
from audio.tags import Kind, Tags
from core import files
from core.errors import StudioError
from core.results import Cancelled, Draft, ExportedFiles, Failed, Idea, LyricLine, Take
from core.startup import FAILED, INTERRUPTED

Ending = Take | Draft | Idea | ExportedFiles | Cancelled | Failed


def deliver(ending: Ending, args: argparse.Namespace) -> int:
    """Write the result to its place and describe it; returns the exit code."""
    if isinstance(ending, Cancelled):
        print("Cancelled.", file=sys.stderr)
        return INTERRUPTED
    if isinstance(ending, Failed):
        print(f"{ending.code}: {ending.message} {ending.action}", file=sys.stderr)
        return FAILED
    result = ending.model_dump(mode="json")
    if isinstance(ending, Take):
        seed = ending.request["seed"]
        out = args.out or Path(f"song-{seed}.wav")
        written = _write_or_keep(
            Path(ending.path), out, lambda: _write_song(ending, out, not args.without_settings)
        )
        result = {**ending.for_sharing().model_dump(mode="json"), "path": str(written)}
        if written == out:
            print(f"{out}: {ending.duration_s:g} s, seed {seed}", file=sys.stderr)
        complete = written == out and _write_lyric_files(ending.lyric_times, out, args)
    elif isinstance(ending, ExportedFiles):
        outs = _destinations(ending, args.out)
        written = [
            _write_or_keep(path, out, lambda p=path, o=out: files.atomic_write(o, p))
            for path, out in zip(map(Path, ending.paths), outs, strict=True)
        ]
        for path, out in zip(written, outs, strict=True):
            if path == out:
                print(out, file=sys.stderr)
        result["paths"] = [str(path) for path in written]
        complete = written == outs and _write_lyric_files(None, outs[0], args)
    else:
        assert isinstance(ending, Draft), "no command asks for ideas"
        complete = _write_text(ending, args)
    for note in ending.notes:
        print(note, file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    return 0 if complete else FAILED


def _write_text(draft: Draft, args: argparse.Namespace) -> bool:
    """Write lyrics to `--out` or standard output; whether they are where they were wanted."""
    if args.out:
        try:
            files.atomic_write(args.out, draft.text + "\n")
            return True
        except StudioError as error:
            print(f"{error.code}: {error} Here is the text:", file=sys.stderr)
            print(draft.text)
            return False
    if not args.json:
        print(draft.text)
    return True


def _write_song(take: Take, out: Path, with_settings: bool) -> None:
    """Write a take's song to `out`, in the format of its name."""
    kind = cast("Kind", out.suffix.lower().lstrip("."))
    if kind == "wav" and with_settings:
        files.atomic_write(out, Path(take.path))
        return
    saved = settings.settings_of(take) if with_settings else None
    title = take.request["prompt"] or out.stem
    tags = Tags(title, take.model.name, take.model.licence, lyrics=take.lyric_times)
    for _ in encode.convert(Path(take.path), out, kind, saved, tags):
        pass


def _write_lyric_files(
    lines: Sequence[LyricLine] | None, song: Path, args: argparse.Namespace
) -> bool:
    """Write the times of a song's lyrics beside it, in the formats that the flags name.

    Args:
        lines: None for those in the file that was exported or replayed.

    Returns:
        Whether every file could be written. Where there are no times, none is.
    """
    kinds = [kind for kind in lyric_files.FORMATS if getattr(args, kind, False)]
    if not kinds:
        return True
    if lines is None:
        stored, _ = settings.usable_settings(Path(getattr(args, "source", None) or args.file))
        lines = metadata.lyrics_in(stored or {})
    if not lines:
        print(
            "No times of lyrics were written: no lyrics of this song were timed.", file=sys.stderr
        )
        return True
    try:
        for path in lyric_files.write(lines, song, kinds):
            print(path, file=sys.stderr)
    except StudioError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return False
    return True


def _write_or_keep(source: Path, out: Path, write: Callable[[], None]) -> Path:
    """Write `source` to `out` by calling `write`; if that fails, keep it elsewhere and say where.

    Returns:
        Where the file is.
    """
    try:
        write()
        return out
    except StudioError as error:
        problem = error
    except OSError as error:
        problem = files.write_error(out, error, source.stat().st_size)
    kept = keep_file(source, f"{out.stem[:40]}{source.suffix}")
    print(f"{problem.code}: {problem} The finished file was saved as {kept}", file=sys.stderr)
    return kept


def keep_file(source: Path, name: str) -> Path:
    """Move a finished file out of the private folder, which is deleted when the process ends.

    It goes to the user's data folder; if that cannot be written either, it stays on the disk that
    holds it, under a name of its own.

    Returns:
        Where it is now.
    """
    folder = platformdirs.user_data_path("ace-music-studio", appauthor=False) / "unsaved"
    target = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.atomic_write(target, source)
        return target
    except (OSError, StudioError):
        # Renaming within one disk needs no room on it.
        return source.replace(Path(tempfile.mkdtemp(prefix="ace-unsaved-")) / name)


def _destinations(exported: ExportedFiles, out: Path | None) -> list[Path]:
    """Where exported files go: a single one to `out`, several into the folder `out`."""
    names = [Path(path).name for path in exported.paths]
    if len(names) == 1:
        return [out or Path(names[0])]
    folder = out or Path()
    folder.mkdir(exist_ok=True)
    return [folder / name for name in names]


def exit_now(code: int, message: str = "") -> NoReturn:
    """End the process from a signal handler, whatever it is doing.

    Unwinding by an exception would end in a traceback wherever one cannot be raised, such as in
    the middle of an import or a destructor.
    """
    os.write(2, message.encode())  # sys.stderr may be in the middle of a write
    if files.private_folder.cache_info().currsize:
        shutil.rmtree(files.private_folder(), ignore_errors=True)
    os._exit(code)


class ProgressLine:
    """Progress on a terminal: one line that is rewritten, or in a log one line per stage."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live, self._stage, self._next = stream, stream.isatty(), "", 0.0

    def show(self, text: str, stage: str) -> None:
        """Show `text`; on a terminal at most ten times a second while the stage is the same."""
        now, same = time.monotonic(), stage == self._stage
        if self._live and not (same and now < self._next):
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{text[:width]:<{width}}")
            self._next = now + 0.1
        elif not self._live and not same:
            self._stream.write(text + "\n")
        self._stage = stage
        self._stream.flush()

    def end(self, text: str = "") -> None:
        """Clear the line and write `text`."""
        if self._live and self._stage:
            self._stream.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        self._stream.write(text + "\n" if text else "")
        self._stream.flush()
