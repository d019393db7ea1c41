"""Sound as arrays and files: level, sample rate, writing.

Arrays are float32 [channels, samples], full scale at 1.0.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from errors import StudioError

if TYPE_CHECKING:
    import numpy as np

PEAK_DBFS = -1.0
"""Where the highest sample of a finished take stands."""

SILENCE_DBFS = -60.0
"""Below this peak a take is left as quiet as it is: raising it would only raise the noise."""


def level(sound: np.ndarray) -> tuple[np.ndarray, float | None]:
    """Scale `sound` so that its highest sample stands at `PEAK_DBFS`.

    Returns:
        The scaled sound and its new peak in dBFS. A sound below `SILENCE_DBFS` comes back as it
        is with its own peak; digital silence has none (None).
    """
    import numpy as np

    peak = np.float32(np.abs(sound).max(initial=0.0))
    if peak == 0.0:
        return sound, None
    if 20 * math.log10(peak) < SILENCE_DBFS:
        return sound, 20 * math.log10(peak)
    if peak > 1.0:
        sound = sound / peak
        peak = np.float32(np.abs(sound).max())
    return sound * (np.float32(10 ** (PEAK_DBFS / 20)) / peak), PEAK_DBFS


def resample(sound: np.ndarray, rate: int, to_rate: int, samples: int) -> np.ndarray:
    """`sound` at `to_rate` Hz with exactly `samples` samples, by soxr HQ (no lag)."""
    import numpy as np

    if rate != to_rate:
        import soxr

        sound = np.ascontiguousarray(soxr.resample(sound.T, rate, to_rate, quality="HQ").T)
    missing = samples - sound.shape[1]
    return np.pad(sound, ((0, 0), (0, missing))) if missing > 0 else sound[:, :samples]


def write(path: Path, sound: np.ndarray, rate: int) -> None:
    """Write `sound` as 24-bit WAV or FLAC (by the name's ending), complete or not at all.

    Raises:
        StudioError: `disk-full` or `not-writable`; no file is left behind.
    """
    import numpy as np
    import soundfile

    half = path.with_name(f".{path.name}.part")
    kind = "FLAC" if path.suffix.lower() == ".flac" else "WAV"
    frames = np.nan_to_num(sound.T, nan=0.0, posinf=1.0, neginf=-1.0)
    try:
        soundfile.write(half, frames, rate, subtype="PCM_24", format=kind)
        os.replace(half, path)
    except (OSError, soundfile.LibsndfileError) as error:
        raise _no_room(path, error, sound.size * 3) from error
    finally:
        half.unlink(missing_ok=True)


def hand_over(source: Path, target: Path) -> None:
    """Put the finished WAV `source` at `target`, as WAV or FLAC by its ending. Raises as `write`."""
    if target.suffix.lower() != ".flac":
        half = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(source, half)
            os.replace(half, target)
        except OSError as error:
            raise _no_room(target, error, source.stat().st_size) from error
        finally:
            half.unlink(missing_ok=True)
        return
    import soundfile

    sound, rate = soundfile.read(source, dtype="float32", always_2d=True)
    write(target, sound.T, rate)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text`, complete or not at all. Raises as `write` does."""
    half = path.with_name(f".{path.name}.part")
    try:
        half.write_text(text, encoding="utf-8")
        os.replace(half, path)
    except OSError as error:
        raise _no_room(path, error, len(text)) from error
    finally:
        half.unlink(missing_ok=True)


def _no_room(path: Path, error: Exception, needed: int) -> StudioError:
    """What a failed write means: a full disk, or a place that takes no files."""
    import errno

    place = path.parent.name or str(path.parent)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    try:
        full = full or shutil.disk_usage(path.parent).free < needed
    except OSError:
        full = full or False
    if full:
        return StudioError("disk-full", place=place, needed=f"{max(1, needed >> 20)} MB")
    return StudioError("not-writable", place=place)
