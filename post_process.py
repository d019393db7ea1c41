"""Post-processing of a finished take: mastering to a loudness, and writing stem files.

Audio is float32 [2, samples] at 48 kHz, full scale at 1.0, finite. Long work is a generator.
"""

from __future__ import annotations

import math
import shutil
import zipfile
from collections.abc import Generator
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
"""Streaming services' loudness, and the headroom that lossy coding needs."""


LARGEST_GAIN_DB = 20.0
"""Largest gain: more would raise noise rather than music."""


DEEPEST_DB = 6.0
"""Largest gain reduction of the limiter: a quieter master rather than audible pumping."""


CLOSE_LU = 0.05
"""The gain search stops this close to the target."""


LOOK_S, RELEASE_DB_S = 0.005, 30.0
"""Look-ahead of the limiter, and its release."""


class Loudness(BaseModel):
    """Result of mastering. The loudnesses are None for silence, which stays unchanged.

    `gain_db` is the gain applied to the whole sound, `reduction_db` the largest reduction by the
    limiter (0 or below), `reached` whether the target was met within 0.2 LU.
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
) -> Generator[Progress, None, tuple[np.ndarray, Loudness]]:
    """Raise or lower `sound` to a loudness, with no true peak above the ceiling.

    The gain is at most `LARGEST_GAIN_DB`, and such that no peak is reduced by more than
    `DEEPEST_DB`. Silence (nothing above -70 LUFS) is returned unchanged.

    Args:
        target_lufs: integrated loudness by BS.1770-4.
        ceiling_dbtp: true peak, measured at four times the sample rate.

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
        unchanged = Loudness(
            target_lufs=target_lufs, before_lufs=None, after_lufs=None, true_peak_dbtp=peak
        )
        return sound.copy(), unchanged

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
        # Limiting makes loudness rise less than the gain: use the measured slope, bounded.
        slope = 1.0
        if len(tried) > 1:
            (g0, l0), (g1, l1) = tried[-2:]
            slope = min(1.0, max(0.2, (l1 - l0) / (g1 - g0)))
        gain_db = min(gain_db + off / slope, most)
    yield Progress(stage=stage, step=6, steps=6)
    # Between samples with different gains the wave exceeds the ceiling by some 1e-5 dB.
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

    It falls before a peak, holds through it, rises by at most `RELEASE_DB_S` after it, and is
    smooth: a running minimum over the look-ahead on both sides, then two running means that are
    together no wider, so that a mean of sufficient reductions is sufficient.
    """
    import numpy as np
    from scipy.ndimage import minimum_filter1d, uniform_filter1d

    if envelope.max(initial=0.0) <= ceiling:
        return np.ones_like(envelope)
    look = round(LOOK_S * SAMPLE_RATE)
    # A point between two samples is scaled by both of their gains.
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
    """Paths of the stems: a WAV for each name of `STEMS`, and one zip of them all."""

    wavs: dict[str, Path]
    zip: Path


def save_stems(
    stems: dict[str, np.ndarray], folder: Path, name: str, tags: Tags | None = None
) -> Generator[Progress, None, StemFiles]:
    """Write the stems into `folder` as "`name`-vocals.wav" and so on, and "`name`-stems.zip".

    WAVs hold 32-bit floats, since a stem may exceed full scale where the mix does not. If writing fails
    or is stopped, none of the files is left. The same stems give the same bytes.

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
                    # libsndfile would write the time of day into float WAVs.
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
