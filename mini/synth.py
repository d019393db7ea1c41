"""Renderer: composed notes become stereo sound, with an own synthesiser in numpy.

Every note of one voice, pitch, length and level is the same waveform: oscillators start at phase
zero on the onset and noise comes from a fixed table. Nothing is normalised per piece.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mini.compose import FRAMES_PER_SECOND, Piece

SAMPLE_RATE = 24_000
HOP = SAMPLE_RATE // FRAMES_PER_SECOND  # samples in a latent frame
LOWEST, HIGHEST = 36, 88  # MIDI pitches of the piano roll
MASTER = 0.55  # leaves headroom: nothing is normalised, so a note keeps its level in every piece


@dataclass(frozen=True)
class Voice:
    """A tuned voice: harmonic amplitudes, decay of the first harmonic (1/s; the n-th decays n
    times as fast to the power `damp`), attack and release in seconds, gain, pan (-1..1)."""

    harmonics: tuple[float, ...]
    decay: float
    attack: float
    release: float
    gain: float
    pan: float = 0.0
    damp: float = 0.5


VOICES = {
    "keys": Voice((1, 0.35, 0.12, 0.05), 1.2, 0.006, 0.08, 0.085, -0.2),
    "round_bass": Voice((1, 0.3, 0.08), 0.9, 0.006, 0.06, 0.26),
    "vibes": Voice((1, 0, 0, 0.25), 2.0, 0.004, 0.16, 0.14, 0.25),
    "stab": Voice((1, 0.6, 0.4, 0.25, 0.16, 0.1), 3.5, 0.004, 0.06, 0.075, -0.2),
    "synth_bass": Voice((1, 0.5, 0.35, 0.2), 1.5, 0.004, 0.04, 0.22),
    "pluck": Voice((1, 0.5, 0.3, 0.15), 5.0, 0.003, 0.08, 0.15, 0.25),
    "pad": Voice((1, 0.3, 0.15), 0.0, 0.24, 0.32, 0.075, -0.15, 0.0),
    "sub": Voice((1, 0.12), 0.2, 0.04, 0.12, 0.2),
    "bell": Voice((1, 0, 0.3, 0, 0.1), 1.6, 0.003, 0.24, 0.12, 0.25),
    "harp": Voice((1, 0.4, 0.2, 0.1), 3.0, 0.003, 0.2, 0.14, 0.1),
    "square": Voice((1, 0, 0.333, 0, 0.2), 0.5, 0.002, 0.03, 0.08, -0.2, 0.0),
    "triangle": Voice((1, 0, 0.111, 0, 0.04), 0.2, 0.003, 0.03, 0.28, 0.0, 0.0),
    "pulse_lead": Voice((1, 0.7, 0.33, 0.12), 0.6, 0.002, 0.04, 0.11, 0.2, 0.0),
}


def _noise(samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(samples)


def _drum(voice: str) -> tuple[np.ndarray, float]:
    """Waveform of a drum and its pan."""
    time = np.arange(int(0.36 * SAMPLE_RATE)) / SAMPLE_RATE
    match voice:
        case "kick":
            sweep = 48 * time + 2.6 * (1 - np.exp(-time * 34))
            return 0.55 * np.sin(2 * np.pi * sweep) * np.exp(-time * 13), 0.0
        case "snare":
            tone = 0.6 * np.sin(2 * np.pi * 190 * time) * np.exp(-time * 26)
            return 0.22 * (_noise(len(time), 1) * np.exp(-time * 22) + tone), 0.0
        case "clap":
            bursts = (
                sum(np.exp(-np.maximum(time - d, 0) * 28) * (time >= d) for d in (0, 0.011, 0.023))
                / 3
            )
            return 0.3 * np.diff(_noise(len(time) + 1, 2)) * bursts, 0.05
        case "hat":
            return 0.08 * np.diff(_noise(len(time) + 1, 3)) * np.exp(-time * 65), 0.15
        case "open_hat":
            return 0.09 * np.diff(_noise(len(time) + 1, 4)) * np.exp(-time * 18), 0.15
        case "chip_kick":
            sweep = 55 * time + 4 * (1 - np.exp(-time * 26))
            return 0.38 * np.sign(np.sin(2 * np.pi * sweep)) * np.exp(-time * 20), 0.0
        case "chip_snare":
            held = np.repeat(np.sign(_noise(len(time) // 3 + 1, 5)), 3)[: len(time)]
            return 0.16 * held * np.exp(-time * 20), 0.0
    raise KeyError(voice)


@lru_cache(maxsize=8192)
def waveform(voice: str, pitch: int, length: int) -> np.ndarray:
    """Stereo samples (2, n), float32, of one note of `length` latent frames at full level."""
    if voice not in VOICES:
        mono, pan = _drum(voice)
    else:
        tone = VOICES[voice]
        held, samples = length / FRAMES_PER_SECOND, length * HOP + int(tone.release * SAMPLE_RATE)
        time = np.arange(samples) / SAMPLE_RATE
        pitch_hz = 440.0 * 2 ** ((pitch - 69) / 12)
        mono = np.zeros(samples)
        for number, amplitude in enumerate(tone.harmonics, start=1):
            if amplitude and number * pitch_hz < 0.45 * SAMPLE_RATE:
                decay = np.exp(-time * tone.decay * number**tone.damp)
                mono += amplitude * decay * np.sin(2 * np.pi * number * pitch_hz * time)
        mono *= np.minimum(1, time / tone.attack) * np.clip(
            (held + tone.release - time) / tone.release, 0, 1
        )
        mono, pan = mono * tone.gain, tone.pan
    left, right = np.sqrt(1 - pan), np.sqrt(1 + pan)
    return (MASTER * np.stack([mono * left, mono * right])).astype(np.float32)


def render(piece: Piece, start: int = 0, frames: int | None = None) -> np.ndarray:
    """Stereo samples (2, frames * HOP), float32, of a piece from latent frame `start` on."""
    frames = piece.frames - start if frames is None else frames
    sound = np.zeros((2, frames * HOP), np.float32)
    for note in piece.notes:
        if note.frame >= start + frames or (note.frame + note.length + 12) < start:
            continue
        wave = waveform(note.voice, note.pitch, note.length)
        begin = (note.frame - start) * HOP
        skip = max(0, -begin)
        take = wave[:, skip : sound.shape[1] - begin]
        if take.shape[1]:
            begin = max(0, begin)
            sound[:, begin : begin + take.shape[1]] += note.level * take
    return sound


def piano_roll(piece: Piece, start: int, frames: int) -> np.ndarray:
    """Sounding pitches (HIGHEST - LOWEST + 1, frames), 0 or 1, from latent frame `start` on."""
    roll = np.zeros((HIGHEST - LOWEST + 1, frames), np.float32)
    for note in piece.notes:
        if LOWEST <= note.pitch <= HIGHEST:
            begin, end = note.frame - start, note.frame - start + note.length
            if end > 0 and begin < frames:
                roll[note.pitch - LOWEST, max(0, begin) : end] = 1
    return roll
