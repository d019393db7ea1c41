"""Sound as arrays and files: level, sample rate, splices and their seams, pictures, writing.

Arrays are float32 [channels, samples], full scale at 1.0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


PEAK_DBFS = -1.0
"""Where the highest sample of a finished take stands."""


SILENCE_DBFS = -60.0
"""Below this peak a take is left as quiet as it is: raising it would only raise the noise."""


def normalize_peak(sound: np.ndarray) -> tuple[np.ndarray, float | None]:
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
    # Reciprocal first, as torch divides a number by a tensor: the stock pipeline's very bits.
    return sound * (np.float32(1) / peak * np.float32(10 ** (PEAK_DBFS / 20))), PEAK_DBFS


def resample(sound: np.ndarray, rate: int, to_rate: int, samples: int) -> np.ndarray:
    """`sound` at `to_rate` Hz with exactly `samples` samples, by soxr HQ (no lag)."""
    import numpy as np

    if rate != to_rate:
        import soxr

        sound = np.ascontiguousarray(soxr.resample(sound.T, rate, to_rate, quality="HQ").T)
    missing = samples - sound.shape[1]
    return np.pad(sound, ((0, 0), (0, missing))) if missing > 0 else sound[:, :samples]


def waveform_peaks(sound: np.ndarray, buckets: int) -> list[float]:
    """For a picture: lowest and highest sample of each of `buckets` stretches, in turn.

    `sound` is [channels, samples]; 240 s into 1000 take about 40 ms. No sound gives zeros.
    """
    import numpy as np

    if not sound.shape[1]:
        return [0.0] * (2 * buckets)
    edges = np.arange(buckets) * sound.shape[1] // buckets
    low = np.minimum.reduceat(sound.min(0), edges)
    high = np.maximum.reduceat(sound.max(0), edges)
    return np.round(np.stack([low, high], 1).astype(np.float64), 4).ravel().tolist()
