"""Measures of sound: tempo, regularity of the beat, key, and descriptors of style.

Own numpy code, no labels and no learning. Sound is (2, n) or (n,) float at any sampling rate.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import signal

from mini.compose import PITCH_NAMES

ONSET_HZ = 100  # frames a second of the onset envelope
TEMPI = np.arange(60.0, 180.5, 0.5)  # bpm searched
TEMPO_CENTRE, TEMPO_WIDTH = 105.0, 0.9  # prior: log-normal, width in octaves

# How well each pitch class above the tonic fits a key (Krumhansl and Kessler, 1982).
PROFILES = {
    "major": np.array([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88]),
    "minor": np.array([6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17]),
}


def mono(sound: np.ndarray) -> np.ndarray:
    return sound if sound.ndim == 1 else sound.mean(axis=0)


def spectrogram(sound: np.ndarray, rate: int, size: int, hop: int) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes (bins, frames) of the mono sum and the bins' frequencies in Hz."""
    _, _, spectrum = signal.stft(
        mono(sound), rate, nperseg=size, noverlap=size - hop, boundary="zeros"
    )
    return np.abs(spectrum), np.fft.rfftfreq(size, 1 / rate)


def onset_envelope(sound: np.ndarray, rate: int) -> np.ndarray:
    """Rise of log energy over 24 bands, 100 values a second."""
    magnitudes, bins = spectrogram(sound, rate, 1024, rate // ONSET_HZ)
    edges = np.geomspace(40, min(0.45 * rate, 10_000), 25)
    bands = np.stack(
        [
            magnitudes[(bins >= lo) & (bins < max(hi, lo + 30))].sum(0)
            for lo, hi in itertools.pairwise(edges)
        ]
    )
    level = np.log1p(1000 * bands / (magnitudes.sum(0).max() + 1e-9))
    rise = np.maximum(np.diff(level, axis=1, prepend=level[:, :1]), 0).sum(0)
    return rise - rise.mean()


def periodicity(sound: np.ndarray, rate: int, seconds: float = 5.0) -> np.ndarray:
    """Normalised autocorrelation of the onset envelope by lag, 100 lags a second."""
    envelope = onset_envelope(sound, rate)
    size = 2 * len(envelope)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(envelope, size)) ** 2)[: int(seconds * ONSET_HZ)]
    lags = np.arange(len(correlation))
    unbiased = correlation / np.maximum(len(envelope) - lags, 1) * len(envelope)
    return unbiased / (unbiased[0] + 1e-9)


def comb(correlation: np.ndarray, bpm: float) -> float:
    """Mean autocorrelation at one, two and four beats of a tempo (the best lag within 10 ms)."""
    beat = 60 / bpm * ONSET_HZ
    values = []
    for count in (1, 2, 4):
        lag = beat * count
        if lag + 2 < len(correlation):
            near = correlation[int(np.floor(lag)) - 1 : int(np.ceil(lag)) + 2]
            values.append(near.max())
    return float(np.mean(values))


def tempo(sound: np.ndarray, rate: int) -> float:
    """Estimated tempo in bpm, 60 to 180."""
    correlation = periodicity(sound, rate)
    prior = np.exp(-0.5 * (np.log2(TEMPI / TEMPO_CENTRE) / TEMPO_WIDTH) ** 2)
    scores = np.array([comb(correlation, bpm) for bpm in TEMPI])
    return float(TEMPI[np.argmax((scores - scores.min()) * prior)])


def tempo_right(found: float, requested: float, tolerance: float = 0.04) -> bool:
    """Within 4 % of the requested tempo, its double or its half."""
    return min(abs(found / (requested * ratio) - 1) for ratio in (0.5, 1, 2)) < tolerance


def beat_wins(sound: np.ndarray, rate: int, requested: float) -> bool:
    """The beat of the requested tempo's comb beats more than 90 % of unrelated tempi between 60 and 180 bpm."""
    correlation = periodicity(sound, rate)
    ratios = np.array([0.5, 2 / 3, 0.75, 1, 4 / 3, 1.5, 2])
    others = [bpm for bpm in TEMPI[::4] if np.abs(bpm / requested / ratios - 1).min() > 0.04]
    own = comb(correlation, requested)
    return float(np.mean([own > comb(correlation, bpm) for bpm in others])) > 0.9


def chroma_frames(sound: np.ndarray, rate: int, hop_s: float = 0.1) -> np.ndarray:
    """Spectral peaks by pitch class (12, frames), 100 to 2000 Hz, rooted, each frame summing to 1."""
    size = 1 << int(np.ceil(np.log2(rate * 0.34)))
    magnitudes, bins = spectrogram(sound, rate, size, int(rate * hop_s))
    peaks = np.zeros_like(magnitudes)
    inner = magnitudes[1:-1]
    top = (inner > magnitudes[:-2]) & (inner >= magnitudes[2:])
    peaks[1:-1] = np.where(top, inner, 0)
    magnitudes = peaks
    kept = (bins > 100) & (bins < 2000)
    classes = np.round(12 * np.log2(bins[kept] / 261.6256)).astype(int) % 12
    energy = np.zeros((12, magnitudes.shape[1]))
    np.add.at(energy, classes, magnitudes[kept] ** 2)
    energy = np.sqrt(energy)
    return energy / (energy.sum(0) + 1e-9)


@dataclass(frozen=True)
class Key:
    tonic: int
    mode: str

    def __str__(self) -> str:
        return f"{PITCH_NAMES[self.tonic]} {self.mode}"

    @property
    def relative(self) -> "Key":
        return (
            Key((self.tonic + 9) % 12, "minor")
            if self.mode == "major"
            else Key((self.tonic + 3) % 12, "major")
        )


def key(sound: np.ndarray, rate: int) -> Key:
    """The key whose profile correlates best with the mean chroma."""
    chroma = chroma_frames(sound, rate).mean(1)
    scores = {
        Key(tonic, mode): np.corrcoef(np.roll(profile, tonic), chroma)[0, 1]
        for mode, profile in PROFILES.items()
        for tonic in range(12)
    }
    return max(scores, key=scores.get)


def key_right(found: Key, requested: Key) -> bool:
    """The requested key or its relative."""
    return found in (requested, requested.relative)


def descriptors(sound: np.ndarray, rate: int) -> np.ndarray:
    """Nine plain numbers by which a classifier distinguishes styles.

    Log centroid, energy shares below 200 Hz and above 4 kHz, flatness, onset strength, share of
    percussive energy, spectral rolloff, odd-harmonic brightness around 1 to 4 kHz, level spread.
    """
    magnitudes, bins = spectrogram(sound, rate, 2048, 512)
    power = magnitudes**2 + 1e-12
    total = power.sum()
    harmonic = signal.medfilt2d(magnitudes, (1, 17))
    percussive = signal.medfilt2d(magnitudes, (17, 1))
    envelope = onset_envelope(sound, rate)
    cumulative = np.cumsum(power.sum(1)) / total
    level = 10 * np.log10(power.sum(0) + 1e-9)
    return np.array(
        [
            np.log((bins[:, None] * magnitudes).sum() / (magnitudes.sum() + 1e-9) + 1),
            power[bins < 200].sum() / total,
            np.log(power[bins > 4000].sum() / total + 1e-5),
            np.log(np.median(np.exp(np.log(power).mean(0)) / power.mean(0)) + 1e-6),
            np.log(envelope.std() + 1e-3),
            (percussive**2).sum() / ((percussive**2).sum() + (harmonic**2).sum() + 1e-9),
            np.log(bins[np.searchsorted(cumulative, 0.85)] + 1),
            np.log(power[(bins > 1000) & (bins < 4000)].sum() / total + 1e-5),
            np.std(level),
        ]
    )


def wilson(successes: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson score)."""
    if not total:
        return 0.0, 1.0
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = (
        z / (1 + z * z / total) * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    )
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))
