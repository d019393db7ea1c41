"""Peak level, sample rate and the outline of a waveform.

Sound is float32 [channels, samples], full scale at 1.0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


PEAK_DBFS = -1.0
"""The highest sample of a finished take."""

CEILING = 10 ** (PEAK_DBFS / 20)
"""The same as a share of full scale."""


SILENCE_DBFS = -60.0
"""Below this peak a take is left as quiet as it is: raising it would only raise the noise."""


def normalize_peak(sound: np.ndarray) -> tuple[np.ndarray, float | None]:
    """Scale `sound` so that its highest sample is at `PEAK_DBFS`.

    Returns:
        The scaled sound and its new peak in dBFS. A sound below `SILENCE_DBFS` is returned as it
        is, with its own peak; digital silence has none (None).
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
    # Reciprocal first, as torch divides a number by a tensor: bit for bit as diffusers' pipeline does.
    return sound * (np.float32(1) / peak * np.float32(10 ** (PEAK_DBFS / 20))), PEAK_DBFS


def is_silent(sound: np.ndarray) -> bool:
    """Whether no sample of `sound` is above `SILENCE_DBFS`."""
    import numpy as np

    return bool(np.abs(sound).max(initial=0.0) < 10 ** (SILENCE_DBFS / 20))


def note_above_ceiling(source: np.ndarray) -> str | None:
    """A sentence where the peak of `source` is above `PEAK_DBFS`; None where it is not.

    For edits that keep the source's samples: they keep its peak, too.
    """
    import numpy as np

    peak = float(np.abs(source).max(initial=0.0))
    if peak <= CEILING * (1 + 1e-6):
        return None
    return (
        f"Your song peaks at {20 * math.log10(peak):.1f} dBFS, above the usual {PEAK_DBFS:g} dBFS;"
        " its samples were kept as they are."
    )


def resample(sound: np.ndarray, rate: int, to_rate: int, samples: int) -> np.ndarray:
    """Convert `sound` from `rate` to `to_rate` Hz, with exactly `samples` samples.

    By soxr HQ, which has no lag. Padded with zeros or cut at the end.
    """
    import numpy as np

    if rate != to_rate:
        import soxr

        sound = np.ascontiguousarray(soxr.resample(sound.T, rate, to_rate, quality="HQ").T)
    missing = samples - sound.shape[1]
    return np.pad(sound, ((0, 0), (0, missing))) if missing > 0 else sound[:, :samples]


def waveform_peaks(sound: np.ndarray, buckets: int) -> list[float]:
    """The outline of a waveform: lowest and highest sample of each of `buckets` parts, in turn.

    240 s in 1000 parts take about 40 ms. No samples give zeros.
    """
    import numpy as np

    if not sound.shape[1]:
        return [0.0] * (2 * buckets)
    edges = np.arange(buckets) * sound.shape[1] // buckets
    low = np.minimum.reduceat(sound.min(0), edges)
    high = np.maximum.reduceat(sound.max(0), edges)
    return np.round(np.stack([low, high], 1).astype(np.float64), 4).ravel().tolist()
