"""The child process of `audio.decode`: an audio file on stdin, its sound or its tags on stdout.

Run as `python -m audio.decode_worker audio RATE LONGEST_S` or `... metadata`. The reply is one
line of JSON, then float32 samples, one channel after the other, or the bytes of the cover art. An
exception that is not about the file ends the process with a traceback: the decoder is broken then,
not the file.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from audio.decode import DISK_FULL, FRAME_SLACK_S, PATIENCE_S, WRITE_FAILED
from core.errors import StudioError

if TYPE_CHECKING:
    import numpy as np
    from av.audio.stream import AudioStream
    from av.container import InputContainer

CHANNELS = range(1, 9)

RATES = range(4_000, 384_001)
"""Hz. Headers may claim anything; resampling from 2 GHz would only cost time."""

LARGEST_SAMPLE = 2.0**31
"""A larger value is not sound. Up to here it may be an integer that was written as a float."""

LARGEST_OFFSET = 0.02
"""A constant offset above this share of the peak is removed; music has far less."""

PADDING_S = 0.25
"""What an encoder may add at the ends and the decoder take away again."""

ADDRESS_SPACE = 2 << 30
"""Bytes this process may map, on systems that enforce it."""

UNKNOWN_SIZE = (1 << 31) - 1
"""A WAV claiming this much or more was written to a pipe, by a program that could not know."""

WITHOUT_LENGTH = ("mp3", "aac")
"""Containers that may hold the encoder's padding without saying so."""

BARE_WAV, MOST_CHUNKS = 1 << 29, 10_000
"""The largest WAV that is opened without its metadata, in bytes, and its most chunks."""

COVER_BYTES, FIELDS, FIELD_CHARACTERS = 64 << 20, 200, 20_000
"""What is handed on of a file's metadata at most."""

OPTIONS = {
    "format_whitelist": "mp3,wav,w64,flac,ogg,mov,aac,aiff,matroska",
    "protocol_whitelist": "file",
}
"""Formats that hold their own sound. A playlist in an `.mp3` would make FFmpeg read other files."""


def main(arguments: list[str]) -> None:
    """Answer one request: ["audio", rate, longest_s] or ["metadata"]."""
    _limit_resources()
    file, payload = sys.stdin.buffer, b""
    try:
        if arguments[0] == "metadata":
            reply, payload = read_metadata(file)
        else:
            reply, payload = read_audio(file, int(arguments[1]), float(arguments[2]))
    except StudioError as error:
        reply = {"code": error.code, "facts": error.facts}
    except Exception as error:
        if not _about_the_file(error):
            raise
        memory = isinstance(error, MemoryError)
        reply = _damaged("reading it takes too much memory" if memory else "it is damaged")
    try:
        _write_all(json.dumps(reply).encode() + b"\n")
        _write_all(payload)
    except OSError as error:
        sys.exit(
            DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else WRITE_FAILED
        )


def _write_all(data: Any) -> None:
    """Write a buffer to stdout, whole.

    Not by `sys.stdout.buffer`: with PYTHONUNBUFFERED it stops at a full disk without an error.
    """
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(1, left) :]


def _about_the_file(error: Exception) -> bool:
    """Whether an exception comes from what is in the file rather than from a broken program."""
    try:
        from av.error import FFmpegError
    except ImportError:
        return False
    return isinstance(error, FFmpegError | OSError | ValueError | ArithmeticError | MemoryError)


def _damaged(problem: str) -> dict[str, Any]:
    return {
        "code": "source-unreadable",
        "facts": {"name": "", "problem": problem},
        "cause": traceback.format_exc(),
    }


def _limit_resources() -> None:
    with suppress(ImportError, OSError, ValueError):  # Windows has none; macOS refuses the last
        import resource

        patience = math.ceil(PATIENCE_S)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # The soft limit sends SIGXCPU, which the parent tells from a kill by the system.
        resource.setrlimit(resource.RLIMIT_CPU, (patience, patience + 5))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


@dataclass
class _Findings:
    """What is learned while frames are decoded."""

    rate: int = 0
    channels: int = 0
    frames: int = 0
    damaged: int = 0
    not_finite: bool = False
    end_s: float = 0.0
    notes: list[str] = field(default_factory=list)


def read_audio(file: BinaryIO, rate: int, longest_s: float) -> tuple[dict[str, Any], np.ndarray]:
    """Decode an open file to float32 [2, samples] at `rate` Hz, with what to say of it.

    Raises:
        StudioError: `source-unreadable`, `source-too-long`.
    """
    import av
    import numpy as np
    import soxr

    av.logging.set_level(None)
    too_long = StudioError("source-too-long", name="", limit=longest_s)
    with _open_container(file) as container:
        if _packets_s(_stream(container), longest_s + PADDING_S) > longest_s + PADDING_S:
            raise too_long
    findings, native, parts, resampler = _Findings(), 0, [], None
    with _open_container(file) as container:
        stream = _stream(container)
        _note_other_tracks(container, stream, findings)
        for chunk in _chunks(stream, findings):
            if resampler is None:
                resampler = soxr.ResampleStream(
                    findings.rate, rate, chunk.shape[1], "float32", "HQ"
                )
            native += len(chunk)
            if native > (longest_s + PADDING_S) * findings.rate:
                raise too_long
            parts.append(resampler.resample_chunk(chunk))
        native = _without_padding(stream, native, findings.rate, longest_s)
        _note_missing_end(stream, file, findings)
    if not native or resampler is None:
        raise _unreadable("there is no sound in it")
    if findings.damaged > findings.frames:
        raise _unreadable("it is damaged")
    if native > longest_s * findings.rate:
        raise too_long
    parts.append(resampler.resample_chunk(np.zeros_like(parts[0][:0]), last=True))
    samples = max(1, round(native * rate / findings.rate))
    sound = np.concatenate(parts)[:samples].T
    sound = np.pad(sound, ((0, 0), (0, samples - sound.shape[1])))
    sound = _repaired(sound, findings)
    reply = {
        "samples": samples,
        "rate": findings.rate,
        "channels": findings.channels,
        "seconds": native / findings.rate,
        "notes": findings.notes,
    }
    return reply, np.ascontiguousarray(np.repeat(sound, 3 - len(sound), 0)[:2])


def read_metadata(file: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """The tags of an open file by lower-case name, and the first attached picture.

    Raises:
        StudioError: `source-unreadable`.
    """
    import av

    av.logging.set_level(None)
    with _open_container(file) as container:
        stream = _stream(container)
        found = {**stream.metadata, **container.metadata}  # Ogg keeps them in the stream
        fields = {
            name.lower(): text[:FIELD_CHARACTERS] for name, text in list(found.items())[:FIELDS]
        }
        cover = _cover(container)
    return {"fields": fields, "cover": len(cover)}, cover


def _cover(container: InputContainer) -> bytes:
    import av.error
    import av.stream

    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            continue
        with suppress(av.error.FFmpegError):
            for packet in container.demux(stream):
                picture = bytes(packet)
                return picture if len(picture) <= COVER_BYTES else b""
    return b""


def _open_container(file: BinaryIO) -> InputContainer:
    """Open `file` from its beginning and make sure that it holds sound of a usable shape."""
    import av.error

    # Without this PyAV 18 refuses tags that are not UTF-8; PyAV 19 replaces them by itself.
    old: dict[str, Any] = (
        {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    )
    format = _format_after_id3(file)
    file.seek(0)
    try:
        container = av.open(file, format=format, options=OPTIONS, **old)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        container = _open_without_metadata(file, old)
        if container is None:
            raise _unreadable("it is not a kind of sound file that the studio knows") from error
    stream = _stream(container)
    _check_shape(stream.codec_context.channels, stream.rate or 0)
    return container


def _open_without_metadata(file: BinaryIO, options: dict[str, Any]) -> InputContainer | None:
    """Open only the sound of a WAV: FFmpeg refuses the whole file where a LIST chunk is empty."""
    import av.error

    file.seek(0)
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE" or os.fstat(file.fileno()).st_size > BARE_WAV:
        return None
    kept = b"WAVE"
    for _ in range(MOST_CHUNKS):
        if len(head := file.read(8)) < 8:
            break
        size = int.from_bytes(head[4:], "little")
        if head[:4] in (b"fmt ", b"fact", b"data"):
            kept += head + file.read(size) + b"\0" * (size % 2)
        else:
            file.seek(size, os.SEEK_CUR)
        file.seek(size % 2, os.SEEK_CUR)
    bare = io.BytesIO(b"RIFF" + len(kept).to_bytes(4, "little") + kept)
    with suppress(av.error.FFmpegError, OSError, ValueError):
        return av.open(bare, options=OPTIONS, **options)
    return None


def _format_after_id3(file: BinaryIO) -> str | None:
    """The format of a FLAC with an ID3 tag in front: FFmpeg does not look behind a large cover."""
    file.seek(0)
    head = file.read(10)
    if len(head) < 10 or head[:3] != b"ID3":
        return None
    size = 0
    for byte in head[6:]:
        size = size << 7 | byte & 127
    file.seek(10 + size)
    return "flac" if file.read(4) == b"fLaC" else None


def _stream(container: InputContainer) -> AudioStream:
    """The audio track that is marked as the default, else the first that can be decoded."""
    import av.stream

    tracks = container.streams.audio
    if not tracks:
        raise _unreadable("there is no sound in it")
    # PyAV has no codec for a track that this build of FFmpeg cannot decode.
    known = [track for track in tracks if track.codec_context is not None]
    if not known:
        raise _unreadable("its codec is not known")
    marked = [track for track in known if track.disposition & av.stream.Disposition.default]
    return (marked or known)[0]


def _container(stream: AudioStream) -> InputContainer:
    return cast("InputContainer", stream.container)


def _note_other_tracks(container: InputContainer, stream: AudioStream, findings: _Findings) -> None:
    tracks = list(container.streams.audio)
    if len(tracks) > 1:
        number = tracks.index(stream) + 1
        findings.notes.append(
            f"The file has {len(tracks)} audio tracks, and track {number} was used."
        )


def _check_shape(channels: int, rate: int) -> None:
    if channels not in CHANNELS:
        raise _unreadable(f"it has {channels} channels")
    if rate not in RATES:
        raise _unreadable(f"its sample rate is {rate} Hz")


def _unreadable(problem: str) -> StudioError:
    return StudioError("source-unreadable", name="", problem=problem)


def _packets_s(stream: AudioStream, enough_s: float) -> float:
    """Seconds in the packets that are really there, counted without decoding, up to `enough_s`."""
    import av.error

    total = 0.0
    with suppress(av.error.FFmpegError):
        for packet in _container(stream).demux(stream):
            total += float((packet.duration or 0) * (packet.time_base or 0))
            if total > enough_s:
                break
    return total


def _frames(stream: AudioStream, findings: _Findings) -> Iterator[Any]:
    """Every frame that can be decoded; packets that cannot are counted."""
    import av.error

    packets = _container(stream).demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except StopIteration:
            return
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            findings.damaged += 1
            continue
        yield from frames


def _chunks(stream: AudioStream, findings: _Findings) -> Iterator[np.ndarray]:
    """Float32 [samples, 1 or 2] at the first frame's rate, finite.

    A frame is packed before it becomes an array: `to_ndarray` of a planar one with 8 channels
    ends the process (PyAV 18.1). Mono stays mono, for FFmpeg would make it 3 dB quieter.
    """
    import av
    import numpy as np

    start_s = float((stream.start_time or 0) * (stream.time_base or 0))
    shape, packer = None, None
    for frame in _frames(stream, findings):
        if not findings.frames:
            _check_shape(frame.layout.nb_channels, frame.sample_rate)
            findings.rate, findings.channels = frame.sample_rate, frame.layout.nb_channels
        if packer is None or shape != (frame.format.name, frame.layout.name, frame.sample_rate):
            shape = (frame.format.name, frame.layout.name, frame.sample_rate)
            layout = "mono" if findings.channels == 1 else "stereo"
            packer = av.AudioResampler(format="flt", layout=layout, rate=findings.rate)
        findings.frames += 1
        if frame.time is not None:
            findings.end_s = frame.time - start_s + frame.samples / frame.sample_rate
        for packed in packer.resample(frame):
            chunk = packed.to_ndarray().reshape(packed.samples, -1)
            usable = np.abs(chunk) <= LARGEST_SAMPLE  # False for NaN, too
            if not usable.all():
                findings.not_finite = True
                chunk = np.where(usable, chunk, np.float32(0))
            yield chunk


def _declared_s(stream: AudioStream) -> float:
    """How long the header says it lasts; 0 if it does not say."""
    declared = float((stream.duration or 0) * (stream.time_base or 0))
    return declared or (_container(stream).duration or 0) / 1e6


def _without_padding(stream: AudioStream, native: int, rate: int, longest_s: float) -> int:
    """How many of `native` samples are the recording.

    MP4 says where the last frame's sound ends, and FFmpeg does not cut it there. Raw AAC, and MP3
    without a header, do not say it: those may be longer than the limit by what encoders add.
    """
    name = stream.container.format.name
    declared = round(_declared_s(stream) * rate)
    if "mp4" in name and 0 < native - declared < PADDING_S * rate:
        return declared
    longest = round(longest_s * rate)
    if name in WITHOUT_LENGTH and 0 < native - longest <= FRAME_SLACK_S * rate:
        return longest
    return native


def _note_missing_end(stream: AudioStream, file: BinaryIO, findings: _Findings) -> None:
    """Compare with the header, unless its "duration" is FFmpeg's own guess from the size."""
    if findings.damaged:
        findings.notes.append("Damaged parts of the file were left out.")
    name, size = stream.container.format.name, os.fstat(file.fileno()).st_size
    declared = _declared_s(stream)
    if name == "wav":  # FFmpeg believes the file's size; its header knew better
        file.seek(4)
        claimed = int.from_bytes(file.read(4), "little") + 8
        declared *= claimed / size if claimed < UNKNOWN_SIZE else 1
    bit_rate = stream.codec_context.bit_rate or 0
    guess = 8 * size / bit_rate if bit_rate else 0.0
    guessed = name in WITHOUT_LENGTH and abs(guess - declared) < 0.02 * declared
    if declared - findings.end_s > PADDING_S and not guessed:
        findings.notes.append(
            f"The file was cut off: {findings.end_s:.1f} of {declared:.1f} s are there."
        )


def _repaired(sound: np.ndarray, findings: _Findings) -> np.ndarray:
    """Without a constant offset and within full scale. Damage is clipped, music is scaled."""
    import numpy as np

    if findings.not_finite:
        findings.notes.append("Numbers that are not sound were replaced by silence.")
    peak = np.abs(sound).max()
    offset = sound.mean(1, keepdims=True, dtype=np.float64).astype(np.float32)
    if np.abs(offset).max() > LARGEST_OFFSET * peak:
        findings.notes.append("A constant offset was removed.")
        sound = sound - offset
        peak = np.abs(sound).max()
    if peak <= 1.0:
        return sound
    if findings.damaged:
        return np.clip(sound, -1.0, 1.0)
    findings.notes.append(
        f"Peaks above full scale were scaled down by {20 * math.log10(peak):.1f} dB."
    )
    return np.clip(sound / peak, -1.0, 1.0)


if __name__ == "__main__":
    main(sys.argv[1:])
