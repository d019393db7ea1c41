"""What is done to a finished take: its loudness set under a true-peak ceiling, its stems split off.

Sound is float32 [2, samples] at 48 kHz, full scale at 1.0, finite. Long work is a generator.
"""

from __future__ import annotations

import math
import shutil
import zipfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from audio import loudness
from audio.tags import Tags, add_tags_to_wav
from core.files import staging, write_error
from core.requests import SAMPLE_RATE
from core.results import Progress

if TYPE_CHECKING:
    import numpy as np


TARGET_LUFS, CEILING_DBTP = -14.0, -1.0
"""What streaming services play, and the room that lossy coding needs."""


LARGEST_GAIN_DB = 20.0
"""More would raise the noise of a sketch, not its music."""


DEEPEST_DB = 6.0
"""The limiter takes at most this off the highest peak: a quieter master, not a pumping one."""


CLOSE_LU = 0.05
"""The gain is sought until the loudness is this close."""


LOOK_S, RELEASE_DB_S = 0.005, 30.0
"""How far the limiter looks ahead, and how fast it lets go."""


class Loudness(BaseModel):
    """What mastering did. The loudnesses are None for silence, which stays as it is.

    `gain_db` is what the whole sound was raised by, `reduction_db` the most that the limiter took
    off a peak (0 or below). `reached` tells whether the target was met within 0.2 LU.
    """

    model_config = ConfigDict(frozen=True)
    target_lufs: float
    before_lufs: float | None
    after_lufs: float | None
    true_peak_dbtp: float | None
    gain_db: float = 0.0
    reduction_db: float = 0.0
    reached: bool = False


def master(
    sound: np.ndarray, target_lufs: float = TARGET_LUFS, ceiling_dbtp: float = CEILING_DBTP
) -> Iterator[Progress]:
    """Bring `sound` to a loudness without any true peak above the ceiling.

    Gain is bounded by `LARGEST_GAIN_DB`, and so that no peak is reduced by more than `DEEPEST_DB`.
    Silence (nothing above -70 LUFS) comes back as it is.

    Args:
        target_lufs: integrated, BS.1770-4.
        ceiling_dbtp: true peak, at four times the rate.

    Returns:
        (sound, Loudness), the sound in a new array.
    """
    import numpy as np

    stage = "Setting the loudness"
    yield Progress(stage=stage)
    before = loudness.loudness(sound)
    envelope = loudness.peak_envelope(sound)
    highest = float(envelope.max(initial=0.0))
    if before is None:
        peak = 20 * math.log10(highest) if highest else None
        told = Loudness(
            target_lufs=target_lufs, before_lufs=None, after_lufs=None, true_peak_dbtp=peak
        )
        return sound.copy(), told

    ceiling = 10 ** (ceiling_dbtp / 20)
    most = min(LARGEST_GAIN_DB, 20 * math.log10(ceiling / highest) + DEEPEST_DB)
    gain_db, tried = min(target_lufs - before, most), []
    for step in range(1, 6):
        yield Progress(stage=stage, step=step, steps=6)
        gains = _limiter(envelope * np.float32(10 ** (gain_db / 20)), ceiling)
        done = sound * (gains * np.float32(10 ** (gain_db / 20)))
        after = loudness.loudness(done)
        off = target_lufs - after
        tried.append((gain_db, after))
        if abs(off) <= CLOSE_LU or (off > 0 and gain_db >= most):
            break
        # A limited sound gains less than it is raised by: go by the slope seen, within reason.
        slope = 1.0
        if len(tried) > 1:
            (g0, l0), (g1, l1) = tried[-2:]
            slope = min(1.0, max(0.2, (l1 - l0) / (g1 - g0)))
        gain_db = min(gain_db + off / slope, most)
    yield Progress(stage=stage, step=6, steps=6)
    # Between samples whose gains differ the wave passes the ceiling by some 1e-5 dB.
    done *= np.float32(min(1.0, ceiling / float(loudness.peak_envelope(done).max()) * (1 - 1e-6)))
    after = loudness.loudness(done)
    return done, Loudness(
        target_lufs=target_lufs,
        before_lufs=round(before, 2),
        after_lufs=round(after, 2),
        true_peak_dbtp=round(loudness.true_peak(done), 2),
        gain_db=round(tried[-1][0], 2),
        reduction_db=round(20 * math.log10(float(gains.min())), 2),
        reached=abs(after - target_lufs) <= 0.2,
    )


def _limiter(envelope: np.ndarray, ceiling: float) -> np.ndarray:
    """The gain, 0 to 1 for each sample, that keeps an envelope [samples] under `ceiling`.

    It is down before a peak comes, stays while it passes, rises by at most `RELEASE_DB_S` after it,
    and bends smoothly: a running minimum over the look-ahead to both sides, then two running means
    that together are no wider. A mean of values that are low enough is low enough.
    """
    import numpy as np
    from scipy.ndimage import minimum_filter1d, uniform_filter1d

    if envelope.max(initial=0.0) <= ceiling:
        return np.ones_like(envelope)
    look = round(LOOK_S * SAMPLE_RATE)
    # A point between two samples is moved by both their gains.
    either = np.maximum(envelope, np.pad(envelope[:-1], (1, 0)))
    needed_db = 20 * np.log10(np.minimum(1.0, ceiling / np.maximum(either, 1e-9)))
    held_db = minimum_filter1d(needed_db, 2 * look + 1, mode="nearest")
    slope = RELEASE_DB_S / SAMPLE_RATE * np.arange(len(held_db))
    held_db = np.minimum.accumulate(held_db - slope) + slope
    gains = 10 ** (np.minimum(held_db, 0.0) / 20)
    for _ in range(2):
        gains = uniform_filter1d(gains, look + 1 - look % 2, mode="nearest")
    return np.minimum(gains, 1.0).astype(np.float32)


@dataclass(frozen=True)
class StemFiles:
    """Where the stems are: a WAV for each name of `STEMS`, and one zip of them all."""

    wavs: dict[str, Path]
    zip: Path


def save_stems(
    stems: dict[str, np.ndarray], folder: Path, name: str, tags: Tags | None = None
) -> Generator[Progress, None, StemFiles]:
    """Write the stems into `folder` as "`name`-vocals.wav" and so on, and "`name`-stems.zip".

    WAVs hold 32-bit floats: a stem may rise above full scale where the mix does not. Files appear
    all together or not at all, whatever stops the writing. The same stems make the same bytes.

    Args:
        tags: of the song; each stem's title names the stem as well.

    Raises:
        StudioError: `disk-full` or `not-writable`.
    """
    import numpy as np
    from scipy.io import wavfile

    steps = 2 * len(stems)
    archive = folder / f"{name}-stems.zip"
    try:
        with staging(folder) as staged:
            wavs = {stem: staged / f"{name}-{stem}.wav" for stem in stems}
            with zipfile.ZipFile(staged / archive.name, "w") as together:
                for step, (stem, path) in enumerate(wavs.items()):
                    yield Progress(stage="Writing the stems", step=2 * step, steps=steps)
                    # Not by libsndfile, which writes the time of day into a WAV of floats.
                    wavfile.write(path, SAMPLE_RATE, np.ascontiguousarray(stems[stem].T))
                    if tags:
                        add_tags_to_wav(path, replace(tags, title=f"{tags.title} ({stem})"))
                    yield Progress(stage="Writing the stems", step=2 * step + 1, steps=steps)
                    inside = zipfile.ZipInfo(path.name)
                    inside.external_attr, inside.file_size = 0o644 << 16, path.stat().st_size
                    with path.open("rb") as source, together.open(inside, "w") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        needed = sum(sound.nbytes for sound in stems.values()) * 2
        raise write_error(archive, error, needed) from error
    return StemFiles({stem: folder / path.name for stem, path in wavs.items()}, archive)
