"""Songs as files: WAV, FLAC and MP3, with their tags and the settings that make them again."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import audio
from errors import StudioError
from settings import CHUNK, COMMENTS, KEY, as_text
from song import SAMPLE_RATE, Progress

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["wav", "flac", "mp3"]

STUDIO = "ACE Music Studio"

BLOCK_S = {"wav": 60, "flac": 60, "mp3": 2}
"""Seconds of sound between two signs of life. A processor takes about a fifth of a second for them:
2 ms a second of WAV, 6 of FLAC, 50 to 100 of MP3."""

ENCODINGS: dict[str, dict[str, Any]] = {
    "wav": {"format": "WAV", "subtype": "PCM_24"},
    "flac": {"format": "FLAC", "subtype": "PCM_24"},
    "mp3": {
        "format": "MP3",
        "subtype": "MPEG_LAYER_III",
        "bitrate_mode": "CONSTANT",
        "compression_level": 0.0,
    },
}
"""24 bits without dither: their steps lie at -138 dBFS, below what the model's own arithmetic
leaves, and the same song must give the same file. For MP3, LAME gets the floats; level 0 is its
320 kbit/s, and it notes its delay in the first frame, so that decoders return just the samples that
went in."""


@dataclass(frozen=True)
class Tags:
    """What players show. `model` is a model's title, `licence` that of its weights."""

    title: str
    model: str
    licence: str
    ai_generated: bool = True

    def line(self) -> str:
        """All of it in one sentence or two."""
        made = f"Made with {STUDIO} and {self.model} (licence: {self.licence})."
        return f"AI-generated. {made}" if self.ai_generated else made

    def fields(self) -> dict[str, str]:
        """What has no place of its own among a format's fields."""
        fields = {"MODEL": self.model, "MODEL_LICENCE": self.licence}
        return fields | ({"AI_GENERATED": "yes"} if self.ai_generated else {})


def save(
    sound: np.ndarray, path: Path, kind: Kind, settings: dict[str, Any] | None, tags: Tags
) -> Iterator[Progress]:
    """Write `sound` to `path`, complete or not at all. Closing the generator leaves no file.

    Args:
        sound: float32 [2, samples] at `song.SAMPLE_RATE`; clipped at full scale.
        kind: 24-bit `wav`, 24-bit `flac`, or `mp3` of 320 kbit/s.
        settings: what `settings_of` makes of a take; None keeps them out of the file.

    Raises:
        StudioError: `sound-not-finite`, `disk-full` or `not-writable`.
        ValueError: the settings are no JSON, or longer than `SETTINGS_LIMIT`.
    """
    import numpy as np
    import soundfile

    told = as_text(settings) if settings is not None else b""
    # An encoder for MP3 ends the whole process at the first NaN.
    if not np.isfinite(sound).all():
        raise StudioError("sound-not-finite", model=tags.model)
    tags = _plain(tags)
    encoded = io.BytesIO()
    length = BLOCK_S[kind] * SAMPLE_RATE
    steps = max(1, -(-sound.shape[1] // length))
    with soundfile.SoundFile(
        encoded, "w", SAMPLE_RATE, sound.shape[0], **ENCODINGS[kind]
    ) as encoder:
        for step in range(steps):
            yield Progress(stage="Writing", step=step, steps=steps)
            block = sound[:, step * length : (step + 1) * length]
            encoder.write((np.clip(block, -1.0, 1.0) if kind == "mp3" else _whole(block)).T)
    _put(path, WRITERS[kind](encoded.getbuffer(), told, tags), len(encoded.getbuffer()) + len(told))


def convert(
    source: Path, path: Path, kind: Kind, settings: dict[str, Any] | None, tags: Tags
) -> Iterator[Progress]:
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


def short(source: Path, tags: Tags) -> bytes:
    """A take's WAV with 16 bits a sample, each rounded from its 24, as the bytes of a file.

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
    return b"".join(_wav(encoded.getbuffer(), b"", _plain(tags)))


def _plain(tags: Tags) -> Tags:
    """`tags` as a file can hold them."""
    return Tags(
        _line(tags.title) or "Untitled", _line(tags.model), _line(tags.licence), tags.ai_generated
    )


def _whole(sound: np.ndarray) -> np.ndarray:
    """As int32, of which 24-bit files keep the upper three bytes.

    This is what libsndfile does for a WAV; for a FLAC it rounds instead, and the two would differ
    by one step.
    """
    import numpy as np

    scaled = np.rint(sound * np.float64(2**31))
    return np.clip(scaled, -(2**31), 2**31 - 1).astype(np.int32)


def _put(path: Path, pieces: Iterable[bytes | memoryview], size: int) -> None:
    half = path.with_name(f".{path.name}.part")
    try:
        with half.open("wb") as file:
            file.writelines(pieces)
        os.replace(half, path)
    except OSError as error:
        raise audio.no_room(path, error, size) from error
    finally:
        half.unlink(missing_ok=True)


def _line(text: str) -> str:
    """What may stand in a tag: one line of printable characters, 200 at most."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    return " ".join(words)[:200].strip()


def _wav(encoded: memoryview, told: bytes, tags: Tags) -> Iterator[bytes | memoryview]:
    """RIFF (Microsoft and IBM, 1991): chunks of even length, INFO and settings after the sound.

    INFO alone cannot hold settings: libsndfile gives up on a field above 4 kB.
    """
    info = {b"INAM": tags.title, b"ICMT": tags.line(), b"ISFT": STUDIO}
    fields = b"".join(_chunk(name, text.encode() + b"\0") for name, text in info.items())
    added = _chunk(b"LIST", b"INFO" + fields) + (_chunk(CHUNK, told) if told else b"")
    yield b"RIFF" + (len(encoded) - 8 + len(added)).to_bytes(4, "little")
    yield encoded[8:]
    yield added


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)


def _flac(encoded: memoryview, told: bytes, tags: Tags) -> Iterator[bytes | memoryview]:
    """RFC 9639, section 8: our comments in place of the encoder's, which only name itself."""
    comments = {"TITLE": tags.title, "COMMENT": tags.line(), "ENCODER": STUDIO, **tags.fields()}
    entries = [f"{name}={text}".encode() for name, text in comments.items()]
    entries += [KEY.encode() + b"=" + told] if told else []
    body = _counted(STUDIO.encode()) + len(entries).to_bytes(4, "little")
    body += b"".join(map(_counted, entries))
    kept, at, last = [], 4, False
    while not last:
        head = int.from_bytes(encoded[at : at + 4], "big")
        last, kind, size = bool(head >> 31), head >> 24 & 127, head & 0xFFFFFF
        if kind != COMMENTS:
            kept.append((kind, encoded[at + 4 : at + 4 + size]))
        at += 4 + size
    yield b"fLaC"
    for kind, block in kept:
        yield bytes([kind]) + len(block).to_bytes(3, "big")
        yield block
    yield bytes([COMMENTS | 128]) + len(body).to_bytes(3, "big") + body
    yield encoded[at:]


def _counted(entry: bytes) -> bytes:
    return len(entry).to_bytes(4, "little") + entry


def _mp3(encoded: memoryview, told: bytes, tags: Tags) -> Iterator[bytes | memoryview]:
    """ID3v2.3.0, which more players read than 2.4, in front of the first frame."""
    frames = [
        _frame(b"TIT2", _wide(tags.title)),
        _frame(b"TSSE", _wide(STUDIO)),
        _frame(b"COMM", b"\1eng" + _wide("")[1:] + b"\0\0" + _wide(tags.line())[1:]),
    ]
    for name, text in tags.fields().items():
        frames.append(_frame(b"TXXX", _wide(name) + b"\0\0" + _wide(text)[1:]))
    if told:
        frames.append(_frame(b"TXXX", b"\0" + KEY.encode() + b"\0" + told))
    body = b"".join(frames)
    yield b"ID3\3\0\0" + bytes(len(body) >> shift & 127 for shift in (21, 14, 7, 0)) + body
    yield encoded


def _wide(text: str) -> bytes:
    """Encoding 1: UTF-16 with its mark."""
    return b"\1\xff\xfe" + text.encode("utf-16-le")


def _frame(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "big") + b"\0\0" + body


WRITERS = dict(zip(get_args(Kind), (_wav, _flac, _mp3), strict=True))
