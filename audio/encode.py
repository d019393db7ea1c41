"""Encodes sound as WAV, FLAC and MP3 files, with tags and the settings that make them again."""

from __future__ import annotations

import io
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio.settings import to_json
from audio.tags import WRITERS, Kind, Tags, cleaned
from core import files
from core.errors import StudioError
from core.requests import SAMPLE_RATE
from core.results import Progress

if TYPE_CHECKING:
    import numpy as np

BLOCK_S = {"wav": 60, "flac": 60, "mp3": 2}
"""Seconds of sound between two progress events. A processor takes about a fifth of a second for
them: 2 ms a second of WAV, 6 of FLAC, 50 to 100 of MP3."""

MP3_BITRATE = 320_000
"""Bits a second, constant: the highest that MP3 has."""

MP3_COMPRESSION_LEVEL = (320_000 - MP3_BITRATE) / 288_000
"""`MP3_BITRATE` as libsndfile takes it: 0 to 1 for 320 to 32 kbit/s."""

ENCODINGS: dict[str, dict[str, Any]] = {
    "wav": {"format": "WAV", "subtype": "PCM_24"},
    "flac": {"format": "FLAC", "subtype": "PCM_24"},
    "mp3": {
        "format": "MP3",
        "subtype": "MPEG_LAYER_III",
        "bitrate_mode": "CONSTANT",
        "compression_level": MP3_COMPRESSION_LEVEL,
    },
}
"""24 bits without dither: their steps lie at -138 dBFS, below the rounding of the model's own
arithmetic, and the same song must give the same file. For MP3, LAME gets the floats and notes its
delay in the first frame, so that decoders return exactly as many samples as were encoded."""


def save(
    sound: np.ndarray, path: Path, kind: Kind, settings: dict[str, Any] | None, tags: Tags
) -> Generator[Progress, None, None]:
    """Write `sound` to `path`, complete or not at all. Closing the generator leaves no file.

    Args:
        sound: float32 [2, samples] at `SAMPLE_RATE`; clipped at full scale.
        kind: 24-bit `wav`, 24-bit `flac`, or `mp3` of 320 kbit/s.
        settings: what `settings_of` makes of a take; None leaves them out.

    Raises:
        StudioError: `sound-not-finite`, `disk-full` or `not-writable`.
        ValueError: the settings are not JSON, or longer than `SETTINGS_LIMIT`.
    """
    import numpy as np
    import soundfile

    embedded = to_json(settings) if settings is not None else b""
    # LAME aborts the whole process at the first NaN.
    if not np.isfinite(sound).all():
        raise StudioError("sound-not-finite", model=tags.model or "The file")
    tags = cleaned(tags)
    encoded = io.BytesIO()
    length = BLOCK_S[kind] * SAMPLE_RATE
    steps = max(1, -(-sound.shape[1] // length))
    with soundfile.SoundFile(
        encoded, "w", SAMPLE_RATE, sound.shape[0], **ENCODINGS[kind]
    ) as encoder:
        for step in range(steps):
            yield Progress(stage="Writing", step=step, steps=steps)
            block = sound[:, step * length : (step + 1) * length]
            encoder.write((np.clip(block, -1.0, 1.0) if kind == "mp3" else _to_int32(block)).T)
    data = encoded.getbuffer()
    size = len(data) + len(embedded) + len(tags.cover)
    files.atomic_write(path, WRITERS[kind](data, embedded, tags), size)


def convert(
    source: Path, path: Path, kind: Kind, settings: dict[str, Any] | None, tags: Tags
) -> Generator[Progress, None, None]:
    """Write a take's WAV to `path` as a file of another kind; WAV and FLAC sample for sample.

    Raises:
        StudioError: `take-gone`, or as `save`.
    """
    import soundfile

    try:
        sound, _ = soundfile.read(source, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise StudioError("take-gone") from error
    yield from save(sound.T, path, kind, settings, tags)


def wav_16_bit(source: Path, tags: Tags) -> bytes:
    """A take's WAV as the bytes of a WAV of 16 bits, each sample rounded from its 24.

    Without dither and without settings: the same song gives the same bytes.

    Raises:
        StudioError: `take-gone`.
    """
    import numpy as np
    import soundfile

    try:
        sound, rate = soundfile.read(source, dtype="int32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise StudioError("take-gone") from error
    rounded = np.minimum(sound, 0x7FFF7FFF) + 0x8000 >> 16
    encoded = io.BytesIO()
    soundfile.write(encoded, rounded.astype(np.int16), rate, format="WAV", subtype="PCM_16")
    return b"".join(WRITERS["wav"](encoded.getbuffer(), b"", cleaned(tags)))


def _to_int32(sound: np.ndarray) -> np.ndarray:
    """Sound as int32, of which 24-bit files keep the upper three bytes.

    This is what libsndfile does for a WAV; for a FLAC it rounds instead, and the two would differ
    by one step.
    """
    import numpy as np

    scaled = np.rint(sound * np.float64(2**31))
    return np.clip(scaled, -(2**31), 2**31 - 1).astype(np.int32)
