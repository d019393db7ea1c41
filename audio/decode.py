"""Files that people bring, as sound: read in a process of their own, which may crash or hang.

Run as a program this room is that process: a file comes in on stdin, its sound leaves on stdout.
"""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from core.errors import StudioError

if TYPE_CHECKING:
    import numpy as np
    from av.container import InputContainer


SHORTEST_S = 0.1
"""Below this a file is a click, not music."""


CHANNELS = range(1, 9)


RATES = range(4_000, 384_001)
"""Hz. Headers may claim anything; resampling from 2 GHz is not worth an answer."""


LOUDEST = 2.0**31
"""A larger sample is not sound. Up to here it may be an integer that was written as a float."""


OFFSET = 0.02
"""A constant offset above this share of the peak is taken out; music has far less."""


PADDING_S = 0.25
"""What an encoder may add at the ends and the decoder take away again."""


PATIENCE_S = 60.0
"""How long the decoder may take, started on a busy machine. 240 s of MP3 cost it one."""


ADDRESSES = 2 << 30
"""Bytes the decoder may ask for, on systems that hold a process to that."""


UNKNOWN_SIZE = (1 << 31) - 1
"""A WAV claiming this much or more was written to a pipe, by a program that could not know."""


DISK_FULL = 74
"""Exit status of a decoder that could not hand its result over."""


DECODER = (sys.executable, "-m", "audio.decode")

ROOT = Path(__file__).resolve().parent.parent
"""Where the decoder finds this package."""


OPENED = {
    "format_whitelist": "mp3,wav,w64,flac,ogg,mov,aac,aiff,matroska",
    "protocol_whitelist": "file",
}
"""Formats that hold their own sound. A playlist in an `.mp3` would make FFmpeg read other files."""


@dataclass(frozen=True, eq=False)
class Source:
    """A file that came in.

    Attributes:
        sound: float32 [2, samples] at `song.SAMPLE_RATE`, finite, within full scale; mono twice.
        rate: Hz, in the file.
        channels: 1 to 8, in the file. More than two were mixed down by FFmpeg's matrix.
        seconds: how long it really plays, whatever its header says.
        notes: a sentence for everything that was mended.
    """

    sound: np.ndarray
    rate: int
    channels: int
    seconds: float
    notes: tuple[str, ...] = ()


def decode(
    path: Path,
    longest_s: float,
    folder: Path,
    shortest_s: float = SHORTEST_S,
    stopped: Callable[[], bool] = lambda: False,
) -> Source:
    """Read the sound of a file of any common format.

    The decoder gets an open file and an open, nameless result in `folder`, never a path: a name
    cannot mislead it, it is told of no other file, and nothing stays behind however it ends.

    Args:
        longest_s: seconds; a longer file is refused before it is decoded.
        folder: private, on a disk with room for 0.4 MB a second.
        stopped: asked ten times a second; once true the decoder is ended, and the file unreadable.

    Raises:
        StudioError: `source-missing`, `source-unreadable`, `source-too-long`, `source-too-short`,
            `disk-full` or `not-writable`.
    """
    from core.requests import SAMPLE_RATE

    path = Path(path)
    name = "".join(c if c.isprintable() else "?" for c in path.name)[-80:]
    with ordinary(path, name) as file, _nameless(Path(folder)) as result:
        status = _run_decoder(file, result, [SAMPLE_RATE, longest_s], stopped)
        if status == DISK_FULL:
            needed = f"{max(1, int(longest_s * SAMPLE_RATE * 8) >> 20)} MB"
            raise StudioError("disk-full", place=Path(folder).name, needed=needed)
        try:
            source = _received(result, name)
        except (ValueError, KeyError, TypeError) as error:
            problem = "reading it takes too long" if status is None else "it is damaged"
            raise StudioError("source-unreadable", name=name, problem=problem) from error
    if source.seconds < shortest_s:
        raise StudioError("source-too-short", name=name, seconds=source.seconds, limit=shortest_s)
    return source


def ordinary(path: Path, name: str, kind: Literal["source", "adapter"] = "source") -> BinaryIO:
    """Open once and for all what must be an ordinary file: no folder, pipe or device.

    Args:
        path: where it lies.
        name: what the person calls it.
        kind: what it is for: whose errors are raised.

    Raises:
        StudioError: `source-missing`, `source-unreadable`, or the same of an adapter.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StudioError(f"{kind}-missing", name=name) from error
    except (OSError, ValueError) as error:
        problem = "it cannot be opened"
        raise StudioError(f"{kind}-unreadable", name=name, problem=problem) from error
    found = os.fstat(handle)
    if stat.S_ISREG(found.st_mode) and found.st_size:
        return os.fdopen(handle, "rb")
    os.close(handle)
    problem = "it is empty" if stat.S_ISREG(found.st_mode) else "it is not a file"
    raise StudioError(f"{kind}-unreadable", name=name, problem=problem)


def _nameless(folder: Path) -> BinaryIO:
    """A file in `folder` that goes when it is closed, or when this process ends."""
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise StudioError("not-writable", place=folder.name) from error


def _run_decoder(
    file: BinaryIO, result: BinaryIO, wanted: list[float], stopped: Callable[[], bool]
) -> int | None:
    """Its exit status, or None if it was stopped or took longer than `PATIENCE_S`."""
    until = time.monotonic() + PATIENCE_S
    with subprocess.Popen(
        [*DECODER, *map(str, wanted)],
        stdin=file,
        stdout=result,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    ) as child:
        try:
            while time.monotonic() < until and not stopped():
                with suppress(subprocess.TimeoutExpired):
                    return child.wait(0.1)
        finally:
            child.kill()
    return None


def _received(result: BinaryIO, name: str) -> Source:
    """What `_be_the_decoder` wrote. Anything else raises ValueError, KeyError or TypeError."""
    import numpy as np

    result.seek(0)
    told = json.loads(result.readline())
    if "code" in told:
        raise StudioError(told["code"], **{**told["facts"], "name": name})
    return Source(
        sound=np.fromfile(result, np.float32).reshape(2, told["samples"]),
        rate=told["rate"],
        channels=told["channels"],
        seconds=told["seconds"],
        notes=tuple(told["notes"]),
    )


def _be_the_decoder(rate: int, longest_s: float) -> None:
    """stdin to stdout: a line of JSON, then float32 samples, one channel after the other."""
    with suppress(ImportError, OSError, ValueError):  # Windows has none; macOS refuses the last
        import resource

        patience = math.ceil(PATIENCE_S)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (patience, patience))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    sound: Any = b""
    try:
        told, sound = _read(sys.stdin.buffer, rate, longest_s)
    except StudioError as error:
        told = {"code": error.code, "facts": error.facts}
    try:
        sys.stdout.buffer.write(json.dumps(told).encode() + b"\n")
        sys.stdout.buffer.write(sound)
        sys.stdout.buffer.flush()
    except OSError:
        os._exit(DISK_FULL)


@dataclass
class _Heard:
    """What is learned while frames go by."""

    rate: int = 0
    channels: int = 0
    frames: int = 0
    damaged: int = 0
    not_sound: bool = False
    reached_s: float = 0.0
    notes: list[str] = field(default_factory=list)


def _read(file: BinaryIO, rate: int, longest_s: float) -> tuple[dict[str, Any], np.ndarray]:
    """The sound of an open file, as float32 [2, samples] at `rate` Hz, and what to say of it."""
    import av
    import numpy as np
    import soxr

    av.logging.set_level(None)
    too_long = StudioError("source-too-long", name="", limit=longest_s)
    with _container(file) as container:
        if _counted_s(container, longest_s + PADDING_S) > longest_s + PADDING_S:
            raise too_long
    heard, native, parts, stretch = _Heard(), 0, [], None
    with _container(file) as container:
        for chunk in _chunks(container, heard):
            if stretch is None:
                stretch = soxr.ResampleStream(heard.rate, rate, chunk.shape[1], "float32", "HQ")
            native += len(chunk)
            if native > (longest_s + PADDING_S) * heard.rate:
                raise too_long
            parts.append(stretch.resample_chunk(chunk))
        native = _without_padding(container, native, heard.rate)
        _note_what_is_missing(container, file, heard)
    if not native or stretch is None:
        raise _unreadable("there is no sound in it")
    if heard.damaged > heard.frames:
        raise _unreadable("it is damaged")
    if native > longest_s * heard.rate:
        raise too_long
    parts.append(stretch.resample_chunk(np.zeros_like(parts[0][:0]), last=True))
    samples = max(1, round(native * rate / heard.rate))
    sound = np.concatenate(parts)[:samples].T
    sound = np.pad(sound, ((0, 0), (0, samples - sound.shape[1])))
    told = {
        "samples": samples,
        "rate": heard.rate,
        "channels": heard.channels,
        "seconds": native / heard.rate,
        "notes": heard.notes,
    }
    sound = _mended(sound, heard)
    return told, np.ascontiguousarray(np.repeat(sound, 3 - len(sound), 0)[:2])


def _container(file: BinaryIO) -> InputContainer:
    """Open `file` from its beginning and make sure that it holds sound of a sane shape."""
    import av

    file.seek(0)
    try:
        container = av.open(file, options=OPENED, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise _unreadable("it is not a kind of sound file that the studio knows") from error
    if not container.streams.audio:
        raise _unreadable("there is no sound in it")
    stream = container.streams.audio[0]
    _check_shape(stream.codec_context.channels, stream.rate or 0)
    return container


def _check_shape(channels: int, rate: int) -> None:
    if channels not in CHANNELS:
        raise _unreadable(f"it has {channels} channels")
    if rate not in RATES:
        raise _unreadable(f"its sample rate is {rate} Hz")


def _unreadable(problem: str) -> StudioError:
    return StudioError("source-unreadable", name="", problem=problem)


def _counted_s(container: InputContainer, enough_s: float) -> float:
    """Seconds in the packets that are really there, counted without decoding, up to `enough_s`."""
    import av

    lasts = 0.0
    with suppress(av.error.FFmpegError):
        for packet in container.demux(container.streams.audio[0]):
            lasts += float((packet.duration or 0) * (packet.time_base or 0))
            if lasts > enough_s:
                break
    return lasts


def _frames(container: InputContainer, heard: _Heard) -> Iterator[Any]:
    """Every frame that can be decoded; what cannot is counted."""
    import av

    packets = container.demux(container.streams.audio[0])
    while True:
        try:
            frames = next(packets).decode()
        except StopIteration:
            return
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            heard.damaged += 1
            continue
        yield from frames


def _chunks(container: InputContainer, heard: _Heard) -> Iterator[np.ndarray]:
    """Float32 [samples, 1 or 2] at the first frame's rate, finite.

    A frame is packed before it becomes an array: `to_ndarray` of a planar one with 8 channels
    ends the process (PyAV 18.1). Mono stays mono, for FFmpeg would make it 3 dB quieter.
    """
    import av
    import numpy as np

    start_s = float((container.streams.audio[0].start_time or 0) * _tick(container))
    shape, packer = None, None
    for frame in _frames(container, heard):
        if packer is None:
            _check_shape(frame.layout.nb_channels, frame.sample_rate)
            heard.rate, heard.channels = frame.sample_rate, frame.layout.nb_channels
        if shape != (frame.format.name, frame.layout.name, frame.sample_rate):
            shape = (frame.format.name, frame.layout.name, frame.sample_rate)
            layout = "mono" if heard.channels == 1 else "stereo"
            packer = av.AudioResampler(format="flt", layout=layout, rate=heard.rate)
        heard.frames += 1
        if frame.time is not None:
            heard.reached_s = frame.time - start_s + frame.samples / frame.sample_rate
        for packed in packer.resample(frame):
            chunk = packed.to_ndarray().reshape(packed.samples, -1)
            sane = np.abs(chunk) <= LOUDEST  # False for NaN, too
            if not sane.all():
                heard.not_sound = True
                chunk = np.where(sane, chunk, np.float32(0))
            yield chunk


def _tick(container: InputContainer) -> float:
    return float(container.streams.audio[0].time_base or 0)


def _declared_s(container: InputContainer) -> float:
    """How long the header says it lasts; 0 if it does not say."""
    stream = container.streams.audio[0]
    return (stream.duration or 0) * _tick(container) or (container.duration or 0) / 1e6


def _without_padding(container: InputContainer, native: int, rate: int) -> int:
    """MP4 tells where the last frame's sound ends, and FFmpeg does not cut it there."""
    declared = round(_declared_s(container) * rate)
    if "mp4" in container.format.name and 0 < native - declared < PADDING_S * rate:
        return declared
    return native


def _note_what_is_missing(container: InputContainer, file: BinaryIO, heard: _Heard) -> None:
    """Compare with the header, unless its "duration" is FFmpeg's own guess from the size."""
    if heard.damaged:
        heard.notes.append("Damaged parts of the file were left out.")
    size = os.fstat(file.fileno()).st_size
    declared = _declared_s(container)
    if container.format.name == "wav":  # FFmpeg believes the file's size; its header knew better
        file.seek(4)
        claimed = int.from_bytes(file.read(4), "little") + 8
        declared *= claimed / size if claimed < UNKNOWN_SIZE else 1
    bit_rate = container.streams.audio[0].codec_context.bit_rate or 0
    guess = 8 * size / bit_rate if bit_rate else 0.0
    guessed = container.format.name in ("mp3", "aac") and abs(guess - declared) < 0.02 * declared
    if declared - heard.reached_s > PADDING_S and not guessed:
        heard.notes.append(
            f"The file was cut off: {heard.reached_s:.1f} of {declared:.1f} s are there."
        )


def _mended(sound: np.ndarray, heard: _Heard) -> np.ndarray:
    """Without a constant offset and within full scale. Damage is clipped, music is scaled."""
    import numpy as np

    if heard.not_sound:
        heard.notes.append("Numbers that are not sound were replaced by silence.")
    peak = np.abs(sound).max()
    offset = sound.mean(1, keepdims=True, dtype=np.float64).astype(np.float32)
    if np.abs(offset).max() > OFFSET * peak:
        heard.notes.append("A constant offset was taken out.")
        sound = sound - offset
        peak = np.abs(sound).max()
    if peak <= 1.0:
        return sound
    if heard.damaged:
        return np.clip(sound, -1.0, 1.0)
    heard.notes.append(
        f"Peaks above full scale were scaled down by {20 * math.log10(peak):.1f} dB."
    )
    return np.clip(sound / peak, -1.0, 1.0)


if __name__ == "__main__":
    _be_the_decoder(int(sys.argv[1]), float(sys.argv[2]))
