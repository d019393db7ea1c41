"""Times of lyrics as text: LRC, which players show line by line, and SRT subtitles.

A line that is probably not sung is written like the others, at the time where it would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from core.files import atomic_write
from core.results import LyricLine
from core.text import one_line

LINE_CHARACTERS = 500
"""Longest line that is written."""


def lrc(lines: Sequence[LyricLine]) -> str:
    """One line `[mm:ss.xx]text` each, in hundredths of a second."""
    written = []
    for line in lines:
        minutes, hundredths = divmod(round(line.start_s * 100), 6000)
        stamp = f"[{minutes:02}:{hundredths // 100:02}.{hundredths % 100:02}]"
        written.append(f"{stamp}{text_of(line)}\n")
    return "".join(written)


def srt(lines: Sequence[LyricLine]) -> str:
    """Numbered subtitles, in milliseconds. One without a length is left out: none can be shown."""
    shown = [line for line in lines if line.end_s > line.start_s]
    return "".join(
        f"{number}\n{_srt_time(line.start_s)} --> {_srt_time(line.end_s)}\n{text_of(line)}\n\n"
        for number, line in enumerate(shown, 1)
    )


FORMATS: dict[str, Callable[[Sequence[LyricLine]], str]] = {"lrc": lrc, "srt": srt}
"""By file suffix."""


def write(lines: Sequence[LyricLine], song: Path, kinds: Iterable[str]) -> list[Path]:
    """Write files of these kinds beside `song`, under its name; returns their paths.

    Raises:
        StudioError: `disk-full`, `not-writable`.
    """
    paths = []
    for kind in kinds:
        paths.append(song.with_suffix(f".{kind}"))
        atomic_write(paths[-1], FORMATS[kind](lines))
    return paths


def text_of(line: LyricLine) -> str:
    """The text of a line as files hold it: printable, on one line."""
    return one_line(line.text, LINE_CHARACTERS)


def _srt_time(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    return (
        f"{milliseconds // 3_600_000:02}:{milliseconds // 60_000 % 60:02}:"
        f"{milliseconds // 1000 % 60:02},{milliseconds % 1000:03}"
    )
