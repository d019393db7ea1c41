"""Measures a piece of sound: tempo, key, holes and clipping, and compares them with its request.

Sound is float32 [2, samples] at 48 kHz, full scale at 1.0, finite. Tempo and key are estimated from
the signal alone; where the evidence is weak, or there is only silence, there is no number.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from audio.levels import is_silent
from audio.loudness import loudness, true_peak
from core.requests import SAMPLE_RATE, SongRequest

if TYPE_CHECKING:
    import numpy as np

HOLE_DBFS, HOLE_S = -60.0, 1.0
"""A hole is longer than this and all below this level, with music before and after it."""

FLAT_TOP = 3
"""So many neighbouring samples at the very peak are a clipped wave, not music."""

TEMPI = (40.0, 240.0)
"""The range of tempos searched, in bpm."""

SHORTEST_FOR_TEMPO_S = 6.0
"""How long a piece must last for its tempo to be reported."""

FAINT_ONSET = 4.0
"""Below this, onsets are ripples of held tones, which repeat more regularly than any drummer."""

BEAT_CLARITY, KEY_FIT, KEY_LEAD, KEY_CONTRAST = 0.2, 0.6, 0.08, 0.3
"""When an estimate is reported: how much of the onsets' energy repeats with the beat; how well the
pitch classes correlate with the key's profile, by how much better than with any other but its
relative, and how unequal they are (deviation over mean; drums and noise stay below 0.16).

On 60 composed pieces in four styles the tempo was right 55 times, half 4 and double 1; the key was
right 43 times, its relative 6, not sure 9 and wrong 2.
"""

TEMPO_TOLERANCE = 0.04
"""Share by which a measured tempo may differ from the requested one and still match it."""

KEY_NAMES = {
    "major": ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"),
    "minor": ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B"),
}

PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
"""How well each pitch class above the tonic fits a key: Krumhansl and Kessler, 1982."""


Verdict = Literal[
    "as asked", "double", "half", "relative", "other", "not sure", "not asked", "silence"
]


class Tempo(BaseModel):
    """Requested and measured tempo in bpm. "double" and "half": the pulse of another metrical level."""

    model_config = ConfigDict(frozen=True)
    asked: float | None
    measured: float | None
    verdict: Verdict


class Key(BaseModel):
    """Requested and measured key. "relative": it shares all tones with the requested one."""

    model_config = ConfigDict(frozen=True)
    asked: str | None
    measured: str | None
    verdict: Verdict


class Hole(BaseModel):
    """Silence where music should be, in seconds."""

    model_config = ConfigDict(frozen=True)
    start_s: float
    length_s: float


class Check(BaseModel):
    """Measurements of a finished take, compared with its request.

    `loudness_lufs` and `true_peak_dbtp` are None for silence. `clipped` counts samples in flat
    tops, over both channels.
    """

    model_config = ConfigDict(frozen=True)
    tempo: Tempo
    key: Key
    loudness_lufs: float | None
    true_peak_dbtp: float | None
    holes: tuple[Hole, ...]
    clipped: int


def check(sound: np.ndarray, request: SongRequest) -> Check:
    """Measure `sound` and compare it with the request that made it: its `bpm` and `keyscale`."""
    lufs, peak = loudness(sound), true_peak(sound)
    return Check(
        tempo=compare_tempo(request.bpm, sound),
        key=compare_key(request.keyscale or None, sound),
        loudness_lufs=None if lufs is None else round(lufs, 2),
        true_peak_dbtp=None if peak is None else round(peak, 2),
        holes=holes(sound),
        clipped=clipped(sound),
    )


def holes(sound: np.ndarray) -> tuple[Hole, ...]:
    """Silences longer than `HOLE_S` with music on both sides, in order."""
    import numpy as np

    frame = SAMPLE_RATE // 100
    whole = sound.shape[1] // frame * frame
    power = np.square(sound[:, :whole]).mean(0).reshape(-1, frame).mean(1)
    sounding = np.flatnonzero(power > 10 ** (HOLE_DBFS / 10))
    gaps = np.diff(sounding) - 1
    return tuple(
        Hole(start_s=round((sounding[i] + 1) / 100, 2), length_s=round(gaps[i] / 100, 2))
        for i in np.flatnonzero(gaps > HOLE_S * 100)
    )


def clipped(sound: np.ndarray) -> int:
    """Count samples in flat tops: `FLAT_TOP` or more neighbours of one sign at the sound's peak."""
    import numpy as np

    peak = np.abs(sound).max(initial=0.0)
    if peak == 0.0:
        return 0
    count = 0
    for channel, sign in itertools.product(sound, (1, -1)):
        at = np.flatnonzero(sign * channel >= peak * (1 - 1e-6))
        runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
        count += sum(len(run) for run in runs if len(run) >= FLAT_TOP)
    return count


def tempo(sound: np.ndarray) -> tuple[float | None, bool]:
    """Estimate the tempo in bpm, and whether it is reliable. (None, False) without any onset.

    The onsets' autocorrelation is read at one, two and four beats of each tempo, with a slight
    preference for those around 110 bpm, where people tap.
    """
    import numpy as np

    onsets, rate = _onsets(sound)
    size = 1 << (2 * len(onsets) - 1).bit_length() if len(onsets) else 1
    power = np.abs(np.fft.rfft(onsets, size)) ** 2
    lags = min(len(onsets), round(4 * 60 / TEMPI[0] * rate) + 2)
    repeats = np.fft.irfft(power, size)[:lags]
    if lags < 60 / TEMPI[0] * rate or repeats[0] <= 0:
        return None, False
    repeats = repeats / repeats[0] * len(onsets) / np.arange(len(onsets), len(onsets) - lags, -1)
    tempi = np.arange(TEMPI[0], TEMPI[1] + 0.1, 0.1)
    beats = 60 * rate / tempi
    # A short piece has no long lags: it is read at fewer beats.
    readings = [np.interp(k * beats, np.arange(lags), repeats, right=np.nan) for k in (1, 2, 4)]
    comb = np.nanmean(readings, axis=0)
    preference = np.exp(-0.5 * (np.log2(tempi / 110) / 2.0) ** 2)
    best = int(np.argmax(np.maximum(comb, 0) * preference))
    long_enough = sound.shape[1] >= SHORTEST_FOR_TEMPO_S * SAMPLE_RATE
    return float(round(tempi[best], 1)), bool(comb[best] >= BEAT_CLARITY and long_enough)


def _onsets(sound: np.ndarray) -> tuple[np.ndarray, float]:
    """Onset strength, the rise of each 10 ms above the one before summed over 24 bands; and its rate."""
    import numpy as np

    size, hop = 2048, SAMPLE_RATE // 100
    spectrum = _spectra(sound, size, hop)
    bins = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    edges = np.geomspace(40, 12_000, 25)
    bands = np.stack([(bins >= a) & (bins < max(b, a + 30)) for a, b in itertools.pairwise(edges)])
    energy = spectrum @ bands.T.astype(np.float32)
    if not energy.size or energy.max() == 0:
        return np.zeros(0), SAMPLE_RATE / hop
    height = np.log1p(1000 * energy / energy.max())
    rise = np.maximum(np.diff(height, axis=0), 0).sum(1, dtype=np.float64)
    if np.percentile(rise, 99) < FAINT_ONSET:
        return np.zeros(0), SAMPLE_RATE / hop
    # Nobody plays on a grid of 10 ms: smoothing over 70 ms lets late hits count.
    rise = np.convolve(rise, np.hanning(9) / np.hanning(9).sum(), mode="same")
    return rise - rise.mean(), SAMPLE_RATE / hop


def _spectra(sound: np.ndarray, size: int, hop: int) -> np.ndarray:
    """Magnitude spectra of the mono sum, Hann window: float32 [frames, size // 2 + 1]."""
    import numpy as np
    from numpy.lib.stride_tricks import sliding_window_view
    from scipy.fft import rfft

    mono = sound.mean(0, dtype=np.float32)
    if len(mono) < size:
        return np.zeros((0, size // 2 + 1), np.float32)
    frames = sliding_window_view(mono, size)[::hop]
    window = np.hanning(size).astype(np.float32)
    return np.concatenate(
        [np.abs(np.asarray(rfft(frames[i : i + 256] * window))) for i in range(0, len(frames), 256)]
    )


def key(sound: np.ndarray) -> tuple[str | None, bool]:
    """Estimate the key, such as "F# minor", and whether it is reliable. (None, False) without any tone.

    Spectral peaks from 100 to 2000 Hz are summed by pitch class; the key is the one whose profile
    correlates best with them (Krumhansl and Schmuckler).
    """
    import numpy as np

    classes = _pitch_classes(sound)
    if classes.max() == classes.min():
        return None, False
    fits = {
        (tonic, mode): float(np.corrcoef(np.roll(profile, tonic), classes)[0, 1])
        for mode, profile in PROFILES.items()
        for tonic in range(12)
    }
    best = max(fits, key=lambda name: fits[name])
    others = [fit for name, fit in fits.items() if name not in (best, _relative(*best))]
    lead = fits[best] - max(others)
    unequal = classes.std() >= KEY_CONTRAST * classes.mean()
    sure = unequal and fits[best] >= KEY_FIT and lead >= KEY_LEAD
    return f"{KEY_NAMES[best[1]][best[0]]} {best[1]}", bool(sure)


def _pitch_classes(sound: np.ndarray) -> np.ndarray:
    """The share of each pitch class, C first: float64 [12], all zero without any tone.

    Every 0.17 s counts the same, however loud; those 40 dB below the loudest do not count.
    """
    import numpy as np

    size = 16_384
    spectrum = _spectra(sound, size, size // 2)
    bins = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    kept = np.flatnonzero((bins > 100) & (bins < 2000))
    here = spectrum[:, kept]
    top = (here > spectrum[:, kept - 1]) & (here >= spectrum[:, kept + 1])
    classes = np.round(12 * np.log2(bins[kept] / 261.6256)).astype(int) % 12
    energy = np.zeros((12, len(here)))
    np.add.at(energy, classes, np.where(top, here, 0).astype(np.float64).T ** 2)
    levels = np.sqrt(energy)
    audible = levels.sum(0) > max(1e-9, 0.01 * levels.sum(0).max(initial=0.0))
    shares = levels[:, audible] / levels[:, audible].sum(0)
    return shares.mean(1) if shares.size else np.zeros(12)


def _relative(tonic: int, mode: str) -> tuple[int, str]:
    """The key with the same tones: (tonic 0 to 11, mode)."""
    return ((tonic + 9) % 12, "minor") if mode == "major" else ((tonic + 3) % 12, "major")


def _pitch(name: str) -> tuple[int, str]:
    """Parse a key's name, such as "Db major" or "B# minor": (tonic 0 to 11, mode)."""
    note, mode = name.split()
    sharps = note.count("#") - note.count("b")
    return ({"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[note[0]] + sharps) % 12, mode


def compare_tempo(requested: float | None, sound: np.ndarray) -> Tempo:
    """Measure the tempo of `sound` beside the requested one; None where it is not reliable."""
    measured, reliable = tempo(sound)
    verdict: Verdict = "other"
    if is_silent(sound):
        reliable, verdict = False, "silence"
    elif measured is None or not reliable:
        verdict = "not sure"
    elif requested is None:
        verdict = "not asked"
    else:
        levels: dict[Verdict, float] = {"as asked": 1.0, "double": 2.0, "half": 0.5}
        for name, ratio in levels.items():
            if abs(measured / (requested * ratio) - 1) <= TEMPO_TOLERANCE:
                verdict = name
    return Tempo(asked=requested, measured=measured if reliable else None, verdict=verdict)


def compare_key(requested: str | None, sound: np.ndarray) -> Key:
    """Measure the key of `sound` beside the requested one; None where it is not reliable."""
    measured, reliable = key(sound)
    verdict: Verdict = "other"
    if is_silent(sound):
        reliable, verdict = False, "silence"
    elif measured is None or not reliable:
        verdict = "not sure"
    elif requested is None:
        verdict = "not asked"
    elif _pitch(requested) == _pitch(measured):
        verdict, measured = "as asked", requested
    elif _relative(*_pitch(requested)) == _pitch(measured):
        verdict = "relative"
    return Key(asked=requested, measured=measured if reliable else None, verdict=verdict)
