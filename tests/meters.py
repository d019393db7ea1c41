"""Shared by tests of finished sound: an independent meter, and synthetic pieces."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile

RATE = 48_000


def ebur128(sound: np.ndarray, folder) -> tuple[float, float]:
    """Integrated loudness (three decimals) and true peak (one) of [2, samples], by FFmpeg's meter.

    Without FFmpeg the test is skipped; with ACE_REQUIRE_FFMPEG=1 it fails.
    """
    if not shutil.which("ffmpeg"):
        reason = "no ffmpeg on this computer: loudness was not compared"
        if os.environ.get("ACE_REQUIRE_FFMPEG") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    path = folder / "measured.wav"
    soundfile.write(path, sound.T, RATE, subtype="FLOAT")
    meter = "ebur128=peak=true:metadata=1,ametadata=mode=print:key=lavfi.r128.I:file=-"
    done = subprocess.run(
        ["ffmpeg", "-nostats", "-hide_banner", "-i", path, "-af", meter, "-f", "null", "-"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    path.unlink()
    lufs = re.findall(r"lavfi\.r128\.I=(\S+)", done.stdout)[-1]
    peak = re.search(r"True peak:\s+Peak:\s+(\S+) dBFS", done.stderr)[1]
    return float(lufs), float(peak)


def noise(seconds: float, level: float = 0.1, seed: int = 1) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((2, round(seconds * RATE)))
    return (level * made).astype(np.float32)


def tone(seconds: float, hertz: float, level: float, phase: float = 0.0) -> np.ndarray:
    """The same sine on both channels; `level` is its peak."""
    time = np.arange(round(seconds * RATE)) / RATE
    wave = level * np.sin(2 * np.pi * hertz * time + phase)
    return np.stack([wave, wave]).astype(np.float32)


def band(
    seconds: float,
    bpm: float = 120.0,
    tonic: int = 9,
    mode: str = "minor",
    drums: float = 1.0,
    chords: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Drums on every beat and half-beat over tonic, subdominant and dominant, a bar each.

    `tonic` counts semitones above C; `drums` and `chords` are levels.
    """
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    beat = 60 / bpm
    since, half = time % beat, time % (beat / 2)
    accent = 1 + 0.5 * (time // beat % 4 == 0)
    kick = np.sin(2 * np.pi * (50 + 80 * np.exp(-since * 30)) * since) * np.exp(-since * 12)
    made = drums * (kick * accent + 0.3 * random.standard_normal(len(time)) * np.exp(-half * 40))
    third = 3 if mode == "minor" else 4
    for bar in range(int(seconds / (4 * beat)) + 1):
        part = slice(round(bar * 4 * beat * RATE), round((bar + 1) * 4 * beat * RATE))
        for step in (0, third, 7, 12):
            pitch = 130.81 * 2 ** ((tonic + (0, 5, 7, 0)[bar % 4] + step) / 12)
            made[part] += chords * 0.15 * np.sin(2 * np.pi * pitch * time[part])
    return (0.3 * np.stack([made, np.roll(made, 30)])).astype(np.float32)
