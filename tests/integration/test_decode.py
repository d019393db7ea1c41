"""Decoding uploaded files: good, damaged and hostile ones, and a failing decoder."""

from __future__ import annotations

import io
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
from conftest import ROOT

from audio import decode as decoder
from audio.decode import DecodedAudio, decode, read_metadata
from core.errors import StudioError
from core.requests import SAMPLE_RATE

SECONDS, HZ, LIMIT_S = 3.0, 440.0, 20.0


def tone(rate: int = 48_000, channels: int = 2, seconds: float = SECONDS, level: float = 0.3):
    """A sine of 440 Hz, float32 [samples, channels]."""
    wave = level * np.sin(2 * np.pi * HZ * np.arange(round(rate * seconds)) / rate)
    return np.repeat(wave[:, None], channels, 1).astype(np.float32)


def wav(sound=None, rate: int = 48_000, subtype: str = "PCM_16", format: str = "WAV") -> bytes:
    held = io.BytesIO()
    soundfile.write(held, tone(rate) if sound is None else sound, rate, subtype, format=format)
    return held.getvalue()


def encoded(
    codec: str,
    format: str,
    rate: int = 48_000,
    layout: str = "stereo",
    bit_rate: int | None = None,
    **options: str,
) -> bytes:
    """A tone through one of FFmpeg's encoders."""
    import av

    with (
        tempfile.NamedTemporaryFile() as held,  # faststart opens the file again by name
        av.open(held.name, "w", format=format, options=options) as container,
    ):
        stream = container.add_stream(codec, rate=rate, layout=layout)
        coder = stream.codec_context
        coder.format = coder.codec.audio_formats[0].name
        if bit_rate:
            coder.bit_rate = bit_rate
        flat = tone(rate, av.AudioLayout(layout).nb_channels).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(flat, format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        coder.open()
        fitted = av.AudioResampler(coder.format.name, layout, rate, coder.frame_size or 1024)
        for part in [*fitted.resample(frame), *fitted.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
        container.close()
        return held.read()


def film(with_sound: bool) -> bytes:
    """A small MP4 with a picture."""
    import av

    held = io.BytesIO()
    with av.open(held, "w", format="mp4") as container:
        picture = container.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 32
        sound = container.add_stream("aac", rate=48_000, layout="stereo") if with_sound else None
        for _ in range(10):
            container.mux(picture.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(picture.encode(None))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(tone().reshape(1, -1), format="flt")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
            fitted = av.AudioResampler("fltp", "stereo", 48_000, 1024)
            for part in [*fitted.resample(frame), *fitted.resample(None)]:
                container.mux(sound.encode(part))
            container.mux(sound.encode(None))
    return held.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def scratched(data: bytes, spare: int = 2000, times: int = 30) -> bytes:
    """Some bytes replaced, headers unchanged."""
    dice = random.Random(1)
    hurt = bytearray(data)
    for _ in range(times):
        hurt[dice.randrange(spare, len(hurt))] = dice.randrange(256)
    return bytes(hurt)


def with_sizes(data: bytes, size: int) -> bytes:
    """A WAV whose header claims `size` bytes, as recorders and pipes leave them."""
    at = data.index(b"data") + 4
    claim = struct.pack("<I", size)
    return data[:4] + claim + data[8:at] + claim + data[at + 4 :]


def header(rate: int = 48_000, channels: int = 2, sound: bytes = b"\0" * 40_000) -> bytes:
    """A 16-bit WAV by hand, with header values that no library writes."""
    claims = (1, channels, rate & 0xFFFFFFFF, rate * channels * 2 & 0xFFFFFFFF)
    fmt = struct.pack("<HHIIHH", *claims, channels * 2 & 0xFFFF, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", len(sound))
    return b"RIFF" + struct.pack("<I", len(body) + len(sound)) + body + sound


def spoiled(value: float) -> bytes:
    """A float WAV with ten unusable samples."""
    sound = tone()
    sound[1000:1010] = value
    return wav(sound, subtype="FLOAT")


def id3(size: int) -> bytes:
    """A tag of `size` bytes, as cover pictures make them."""
    sevens = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x04\x00\x00" + sevens + b"\0" * size


def mp3(**options: str) -> bytes:
    return encoded("libmp3lame", "mp3", **options)


def jpeg() -> bytes:
    return b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + bytes(5000)


GOOD: dict[str, Callable[[], bytes]] = {
    "8 bit.wav": lambda: wav(subtype="PCM_U8"),
    "16 bit.wav": wav,
    "24 bit.wav": lambda: wav(subtype="PCM_24"),
    "32 bit.wav": lambda: wav(subtype="PCM_32"),
    "float.wav": lambda: wav(subtype="FLOAT"),
    "mono.wav": lambda: wav(tone(channels=1)),
    "4000 Hz.wav": lambda: wav(rate=4_000),
    "8000 Hz.wav": lambda: wav(rate=8_000),
    "44100 Hz.wav": lambda: wav(rate=44_100),
    "44101 Hz.wav": lambda: wav(rate=44_101),
    "96000 Hz.wav": lambda: wav(rate=96_000),
    "384000 Hz.wav": lambda: wav(rate=384_000),
    "seven channels.wav": lambda: wav(tone(channels=7)),
    "eight channels.wav": lambda: wav(tone(channels=8)),
    "5.1.wav": lambda: encoded("pcm_s16le", "wav", layout="5.1"),
    "7.1 float.wav": lambda: encoded("pcm_f32le", "wav", layout="7.1"),
    "big.w64": lambda: wav(format="W64"),
    "apple.aiff": lambda: wav(format="AIFF"),
    "with tag.mp3": mp3,
    "without index.mp3": lambda: mp3(write_xing="0"),
    "mono 44100.mp3": lambda: mp3(rate=44_100, layout="mono"),
    "large cover.mp3": lambda: id3(300_000) + mp3(),
    "24 bit 96000.flac": lambda: wav(rate=96_000, subtype="PCM_24", format="FLAC"),
    "7.1.flac": lambda: encoded("flac", "flac", layout="7.1"),
    "vorbis.ogg": lambda: wav(subtype="VORBIS", format="OGG"),
    "vorbis 7.1.ogg": lambda: wav(tone(channels=8), subtype="VORBIS", format="OGG"),
    "opus.opus": lambda: encoded("libopus", "ogg"),
    "aac.m4a": lambda: encoded("aac", "ipod"),
    "aac for the web.m4a": lambda: encoded("aac", "ipod", movflags="faststart"),
    "aac 5.1.m4a": lambda: encoded("aac", "ipod", layout="5.1"),
    "aac 7.1.m4a": lambda: encoded("aac", "ipod", layout="7.1"),
    "alac.m4a": lambda: encoded("alac", "ipod"),
    "bare.aac": lambda: encoded("aac", "adts"),
    "opus.webm": lambda: encoded("libopus", "webm"),
    "pcm.mka": lambda: encoded("pcm_s16le", "matroska"),
    "film.mp4": lambda: film(with_sound=True),
    "really a wav.mp3": wav,
    "really an mp3.wav": mp3,
    "really a flac.m3u8": lambda: wav(format="FLAC"),
    "no ending": mp3,
    "size unknown.wav": lambda: with_sizes(wav(), 0xFFFFFFFF),
    "size zero.wav": lambda: with_sizes(wav(), 0),
    "rubbish behind.wav": lambda: wav() + bytes(5000),
    "Mötley 日本語 🎸.wav": wav,
    "-i.wav": wav,
    "concat:a.wav|b.wav": wav,
    "pipe:0": wav,
    "{name} {0} %s %n.wav": wav,
    "two\nlines\x1b[31m.wav": wav,
    "n" * 240 + ".wav": wav,
    os.fsdecode(b"not utf-8 \xff\xfe.wav"): wav,
}
MENDED: dict[str, tuple[Callable[[], bytes], float, str]] = {
    "half.mp3": (lambda: half(mp3()), 1.5, "cut off"),
    "half.wav": (lambda: half(wav()), 1.5, "cut off"),
    "claims two hours.wav": (
        lambda: with_sizes(wav(), 2 * 3600 * 192_000),
        SECONDS,
        "3.0 of 7",
    ),
    "half.flac": (lambda: half(wav(format="FLAC")), 1.3, "cut off"),
    "most.ogg": (lambda: wav(subtype="VORBIS", format="OGG")[:-2000], 1.0, ""),
    "half.opus": (lambda: half(encoded("libopus", "ogg")), 1.0, ""),
    "half.aac": (lambda: half(encoded("aac", "adts")), 1.5, ""),
    "half.m4a": (lambda: half(encoded("aac", "ipod", movflags="faststart")), 1.4, "cut off"),
    "scratched.mp3": (lambda: scratched(mp3()), 2.5, ""),
    "scratched.flac": (lambda: scratched(wav(format="FLAC"), 9000, 5), 1.0, "Damaged"),
    "scratched.ogg": (lambda: scratched(wav(subtype="VORBIS", format="OGG"), 9000, 5), 0.5, ""),
    "scratched.m4a": (lambda: scratched(encoded("aac", "ipod", movflags="faststart")), 2.0, ""),
    "scratched.wav": (lambda: scratched(wav()), SECONDS, ""),
    "nan.wav": (lambda: spoiled(np.nan), SECONDS, "not sound"),
    "infinite.wav": (lambda: spoiled(np.inf), SECONDS, "not sound"),
    "astronomic.wav": (lambda: spoiled(1e38), SECONDS, "not sound"),
    "hot.wav": (lambda: wav(tone(level=1.5), subtype="FLOAT"), SECONDS, "scaled down by 3.5 dB"),
    "integers.wav": (lambda: wav(tone(level=2e4), subtype="FLOAT"), SECONDS, "scaled down"),
    "offset.wav": (lambda: wav(tone() + 0.4), SECONDS, "offset"),
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.wav": (lambda: b"", "it is empty"),
    "zeros.wav": (lambda: bytes(100_000), "not a kind"),
    "text.wav": (lambda: b"la la la\n" * 500, "not a kind"),
    "page.mp3": (lambda: b"<!doctype html><html><body>404</body></html>", "not a kind"),
    "random.mp3": (lambda: random.Random(3).randbytes(50_000), ""),
    "mostly damaged.mp3": (lambda: scratched(mp3(), 2000, 8000), "it is damaged"),
    "picture.mp3": (jpeg, ""),
    "archive.mp3": (lambda: b"PK\x03\x04" + bytes(3000), ""),
    "song.mid": (lambda: b"MThd\0\0\0\x06\0\0\0\x01\0\x60MTrk\0\0\0\x04\0\xff\x2f\0", "not a kind"),
    "tag only.mp3": (lambda: id3(2000), ""),
    "header only.wav": (lambda: header(sound=b""), "no sound"),
    "first bytes.wav": (lambda: wav()[:20], ""),
    "first bytes.flac": (lambda: wav(format="FLAC")[:40], ""),
    "first bytes.ogg": (lambda: wav(subtype="VORBIS", format="OGG")[:100], ""),
    "index lost.m4a": (lambda: half(encoded("aac", "ipod")), "not a kind"),
    "2 GHz.wav": (lambda: header(rate=2_000_000_000), "2000000000 Hz"),
    "500 kHz.wav": (lambda: header(rate=500_000), "500000 Hz"),
    "100 Hz.wav": (lambda: header(rate=100), "100 Hz"),
    "no rate.wav": (lambda: header(rate=0), ""),
    "no channels.wav": (lambda: header(channels=0), ""),
    "nine channels.wav": (lambda: wav(tone(channels=9)), "9 channels"),
    "sixty channels.wav": (lambda: header(channels=60), "60 channels"),
    "65535 channels.wav": (lambda: header(channels=65535), ""),
    "silent film.mp4": (lambda: film(with_sound=False), "no sound"),
    "ffconcat.mp3": (lambda: b"ffconcat version 1.0\nfile secret.wav\n", "not a kind"),
    "ffconcat.wav": (lambda: b"ffconcat version 1.0\nfile '@/secret.wav'\n", "not a kind"),
    "list.m3u": (lambda: b"#EXTM3U\nsecret.wav\n", "not a kind"),
    "stream.m3u8": (
        lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://@/secret.wav\n",
        "not a kind",
    ),
    "stream.mp3": (
        lambda: (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://@/secret.wav\n#EXT-X-ENDLIST\n"
        ),
        "not a kind",
    ),
    "manifest.mpd": (
        lambda: b'<?xml version="1.0"?><MPD><BaseURL>file://@/secret.wav</BaseURL></MPD>',
        "not a kind",
    ),
    "session.sdp": (lambda: b"v=0\nm=audio 5004 RTP/AVP 0\nc=IN IP4 127.0.0.1\n", "not a kind"),
}
"""Maker and part of the reported problem; empty where it depends on FFmpeg's guess."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def private(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def decoded(place, private) -> dict[str, DecodedAudio | StudioError]:
    """Every file of the tables, decoded once, two at a time."""
    (place / "secret.wav").write_bytes(wav())

    def hear(name: str, make: Callable[[], bytes]) -> DecodedAudio | StudioError:
        data = make()
        playlist = b"secret.wav" in data
        (place / name).write_bytes(data.replace(b"@", bytes(place)) if playlist else data)
        try:
            return decode(place / name, LIMIT_S, private)
        except StudioError as error:
            return error

    makers = {**GOOD, **{name: row[0] for name, row in (MENDED | BAD).items()}}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as hands:
        patch.chdir(place)  # where a playlist would find its files
        return dict(zip(makers, hands.map(hear, makers, makers.values()), strict=True))


def loudest_hz(sound: np.ndarray) -> float:
    middle = sound[0, len(sound[0]) // 4 : -len(sound[0]) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    return float(np.argmax(spectrum) * SAMPLE_RATE / len(middle))


def check_sound(source: DecodedAudio, seconds: float, slack_s: float) -> None:
    sound = source.sound
    assert sound.dtype == np.float32
    assert sound.flags.c_contiguous
    assert sound.shape == (2, round(source.seconds * SAMPLE_RATE))
    assert abs(source.seconds - seconds) <= slack_s
    assert np.isfinite(sound).all()
    assert 0.1 < np.abs(sound).max() <= 1.0
    assert abs(loudest_hz(sound) - HZ) < 5


@pytest.mark.parametrize("name", GOOD, ids=ascii)
def test_good_files_decode_completely(decoded, name):
    source = decoded[name]
    assert isinstance(source, DecodedAudio), source
    coarse = name in ("bare.aac", "without index.mp3")  # which do not record their padding
    check_sound(source, SECONDS, 0.06 if coarse else 0.0)
    if not coarse:
        assert source.sound.shape[1] == SECONDS * SAMPLE_RATE
    mixed_down = any(word in name for word in ("7.1", "5.1", "channels"))
    assert source.notes == () or (mixed_down and "scaled down" in source.notes[0])


@pytest.mark.parametrize("name", MENDED)
def test_damaged_files_give_what_is_left_with_a_note(decoded, name):
    _, least_s, note = MENDED[name]
    source = decoded[name]
    assert isinstance(source, DecodedAudio), source
    check_sound(source, (least_s + SECONDS) / 2, (SECONDS - least_s) / 2 + 0.06)
    assert note in " ".join(source.notes)
    assert bool(source.notes) >= bool(note)


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused_in_one_sentence(decoded, place, name):
    error = decoded[name]
    assert isinstance(error, StudioError), error
    assert error.code in ("source-unreadable", "source-too-short")
    assert BAD[name][1] in error.message
    assert name in error.message
    assert str(place) not in str(error)


@pytest.fixture(autouse=True)
def no_process_is_left():
    """No child process is left, those of other tests aside."""
    before = {child.pid for child in psutil.Process().children()}
    yield
    assert not {child.pid for child in psutil.Process().children()} - before


def test_no_file_is_left_behind(decoded, private):
    assert not list(private.iterdir())


def test_the_rate_and_channels_of_the_file_are_reported(decoded):
    assert (decoded["44100 Hz.wav"].rate, decoded["44100 Hz.wav"].channels) == (44_100, 2)
    assert (decoded["mono.wav"].rate, decoded["mono.wav"].channels) == (48_000, 1)
    assert decoded["aac 7.1.m4a"].channels == 8


def test_48_khz_stereo_keeps_every_bit(decoded):
    assert np.array_equal(decoded["float.wav"].sound, tone().T)


def test_mono_keeps_its_level(decoded):
    sound = decoded["mono.wav"].sound
    assert np.array_equal(sound[0], sound[1])
    assert np.abs(sound).max() == pytest.approx(0.3, abs=1e-3)


def test_resampling_keeps_the_samples_in_place(decoded):
    for name in ("44100 Hz.wav", "96000 Hz.wav", "44101 Hz.wav"):
        inner = slice(4800, -4800)
        assert np.abs(decoded[name].sound[:, inner] - tone().T[:, inner]).max() < 2e-4


def test_nan_and_infinity_become_silence_and_leave_the_rest(decoded):
    for name in ("nan.wav", "infinite.wav", "astronomic.wav"):
        sound = decoded[name].sound
        assert not sound[:, 1000:1010].any()
        assert np.array_equal(
            np.delete(sound, range(1000, 1010), 1)[0], np.delete(tone().T[0], range(1000, 1010))
        )


def refusal(path: Path, folder: Path, longest_s: float = LIMIT_S) -> StudioError:
    with pytest.raises(StudioError) as caught:
        decode(path, longest_s, folder)
    assert not list(folder.iterdir()) if folder.is_dir() else True
    return caught.value


def test_a_symbolic_link_is_followed_and_a_broken_one_is_missing(tmp_path, private):
    (tmp_path / "real.wav").write_bytes(wav())
    (tmp_path / "link.mp3").symlink_to(tmp_path / "real.wav")
    check_sound(decode(tmp_path / "link.mp3", LIMIT_S, private), SECONDS, 0)
    (tmp_path / "lost.wav").symlink_to(tmp_path / "nowhere.wav")
    assert refusal(tmp_path / "lost.wav", private).code == "source-missing"
    assert refusal(tmp_path / "never was.wav", private).code == "source-missing"


@pytest.mark.timeout(30)
def test_folders_pipes_and_devices_are_refused_without_waiting(tmp_path, private):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path, tmp_path / "pipe.wav", Path("/dev/zero")):
        assert "not a file" in refusal(path, private).message
    assert refusal(Path("a\0b.wav"), private).code == "source-unreadable"


def test_a_file_without_read_permission_is_unreadable(tmp_path, private, monkeypatch):
    def refused(*args):
        raise PermissionError(13, "no")

    (tmp_path / "a.wav").write_bytes(wav())
    monkeypatch.setattr(os, "open", refused)
    assert "cannot be opened" in refusal(tmp_path / "a.wav", private).message


def test_an_error_shows_a_printable_name(tmp_path, private):
    path = tmp_path / ("x" * 150 + "\n\x1b[31m\u202e{fact}.wav")
    path.write_bytes(b"la la la")
    message = str(refusal(path, private))
    assert message.isprintable()
    assert "???" not in message
    assert "x?[31m?{fact}.wav cannot be read" in message.replace("??", "?")
    assert len(message) < 300


def test_length_limits_are_exact_to_the_sample(tmp_path, private):
    for samples, code in (
        (4799, "source-too-short"),
        (4800, ""),
        (9600, ""),
        (9601, "source-too-long"),
    ):
        path = tmp_path / f"{samples}.wav"
        path.write_bytes(wav(tone()[:samples]))
        if code:
            assert refusal(path, private, 0.2).code == code
        else:
            assert decode(path, 0.2, private).sound.shape == (2, samples)


def two_hours(kind: str) -> bytes:
    if kind == "wav":
        return header(rate=8_000, channels=1, sound=bytes(2 * 8_000 * 7200))
    if kind == "flac":
        return wav(np.zeros((8_000 * 7200, 1), np.int16), rate=8_000, format="FLAC")
    one = encoded("libmp3lame", "mp3", 16_000, "mono", write_xing="0", id3v2_version="0")
    return one * 2400


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_two_hours_are_refused_in_under_a_second_of_computing(tmp_path, private, kind):
    (tmp_path / f"long.{kind}").write_bytes(two_hours(kind))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    error = refusal(tmp_path / f"long.{kind}", private, 240)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert error.code == "source-too-long"
    assert "240 s or less" in error.action
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7
    (tmp_path / f"long.{kind}").unlink()


@pytest.mark.parametrize("broken", ["_chunks = None", "_packets_s = lambda *a: 0.0"])
def test_length_is_checked_before_decoding_and_again_while_decoding(
    tmp_path, private, monkeypatch, broken
):
    """Each check alone refuses two hours without that much memory."""
    (tmp_path / "long.wav").write_bytes(two_hours("wav"))
    run_as_worker(
        monkeypatch,
        f"worker.ADDRESS_SPACE = 1 << 30; worker.{broken}; worker.main(['audio', 48000, 20])",
    )
    assert refusal(tmp_path / "long.wav", private).code == "source-too-long"
    (tmp_path / "long.wav").unlink()


def test_a_length_guessed_from_the_bit_rate_gives_no_note(tmp_path, private):
    """Without an index FFmpeg takes the first frame's bit rate for all of them."""
    bare = {"write_xing": "0", "id3v2_version": "0"}
    low, high = (encoded("libmp3lame", "mp3", bit_rate=b, **bare) for b in (32_000, 320_000))
    (tmp_path / "varying.mp3").write_bytes(low + high)
    source = decode(tmp_path / "varying.mp3", LIMIT_S, private)
    assert abs(source.seconds - 2 * SECONDS) < 0.1
    assert "cut off" not in " ".join(source.notes)


def run_as_worker(monkeypatch, program: str) -> None:
    """Run `program` instead of the decoder's child process."""
    start = "import os, sys, time; from audio import decode_worker as worker\n"
    monkeypatch.setattr(decoder, "WORKER", (sys.executable, "-c", start + program))


def worker_that_raises(exception: str) -> str:
    return (
        f"def fail(*a): raise {exception}\n"
        "worker._chunks = fail\nworker.main(['audio', '48000', '20'])"
    )


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("os.kill(os.getpid(), 11)", "it is damaged"),
        ("os.abort()", "it is damaged"),
        (worker_that_raises("ValueError('bad number')"), "it is damaged"),
        (worker_that_raises("ZeroDivisionError"), "it is damaged"),
        (worker_that_raises("MemoryError"), "too much memory"),
        (worker_that_raises("__import__('av').error.BugError(1, 'bug')"), "it is damaged"),
        ("worker._chunks = lambda *a: bytearray(1 << 36); worker.main(['audio', 1, 9])", "memory"),
        ("time.sleep(60)", "takes too long"),
        ("\nwhile True: pass", "takes too long"),
        ("os.kill(os.getpid(), 24)", "takes too long"),
    ],
)
def test_a_file_that_crashes_or_stalls_the_decoder_is_unreadable(
    tmp_path, private, monkeypatch, program, problem
):
    (tmp_path / "a.wav").write_bytes(wav())
    run_as_worker(monkeypatch, program)
    if "too long" in problem:
        monkeypatch.setattr(decoder, "PATIENCE_S", 1.0)
    start = time.monotonic()
    error = refusal(tmp_path / "a.wav", private)
    assert error.code == "source-unreadable"
    assert problem in error.message
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("program", "kind", "reason"),
    [
        (worker_that_raises("TypeError('an unexpected keyword')"), "TypeError", "unexpected key"),
        (worker_that_raises("AttributeError('no codec')"), "AttributeError", "no codec"),
        ("import no_such_module", "ModuleNotFoundError", "no_such_module"),
        ("os.kill(os.getpid(), 9)", "SIGKILL", "status -9"),
        ("os.kill(os.getpid(), 15)", "SIGTERM", "status -15"),
        ("sys.exit(3)", "status 3", "status 3"),
        ("print('hello')", "status 0", "status 0"),
        ("print('[1, 2]')", "status 0", "status 0"),
        ('print(\'{"code": "no-such", "facts": {}}\')', "status 0", "status 0"),
    ],
)
def test_a_broken_decoder_is_internal_with_its_reason_in_the_log(
    tmp_path, private, monkeypatch, caplog, program, kind, reason
):
    (tmp_path / "a.wav").write_bytes(wav())
    run_as_worker(monkeypatch, program)
    error = refusal(tmp_path / "a.wav", private)
    assert error.code == "internal"
    assert kind in error.message
    assert reason in caplog.text


def test_an_unknown_argument_of_the_decoding_library_is_internal(
    tmp_path, private, monkeypatch, caplog
):
    """PyAV 19 removed an argument of `av.open`, and every upload was reported as damaged."""
    (tmp_path / "a.wav").write_bytes(wav())
    run_as_worker(
        monkeypatch,
        "import av\nreal = av.open\n"
        "av.open = lambda *a, **k: real(*a, **k, no_such_argument=1)\n"
        "worker.main(['audio', '48000', '20'])",
    )
    assert refusal(tmp_path / "a.wav", private).code == "internal"
    assert "no_such_argument" in caplog.text


def test_the_reason_for_damaged_is_in_the_log(tmp_path, private, monkeypatch, caplog):
    (tmp_path / "a.wav").write_bytes(wav())
    run_as_worker(monkeypatch, worker_that_raises("ValueError('bad number')"))
    assert refusal(tmp_path / "a.wav", private).code == "source-unreadable"
    assert "bad number" in caplog.text


def test_the_decoder_may_not_take_all_memory(tmp_path, private, monkeypatch):
    (tmp_path / "a.wav").write_bytes(wav())
    (tmp_path / "tried").touch()
    grab = f"""
def grab(*a):
    try:
        len(bytearray(8 << 30))
    except MemoryError:
        os.remove({str(tmp_path / "tried")!r})
        raise
worker.read_audio = grab
worker.main(["audio", "48000", "1"])
"""
    run_as_worker(monkeypatch, grab)
    assert refusal(tmp_path / "a.wav", private).code == "source-unreadable"
    assert not (tmp_path / "tried").exists()


def test_a_full_disk_and_a_lost_folder_have_their_own_names(tmp_path, private, monkeypatch):
    (tmp_path / "a.wav").write_bytes(wav())
    assert refusal(tmp_path / "a.wav", tmp_path / "gone").code == "not-writable"
    full = Path("/dev/full").open("r+b")  # noqa: SIM115 - decode closes it
    monkeypatch.setattr(decoder, "_temporary_file", lambda folder: full)
    assert refusal(tmp_path / "a.wav", private).code == "disk-full"


@pytest.mark.parametrize(
    ("number", "code"), [(28, "disk-full"), (122, "disk-full"), (30, "not-writable")]
)
def test_no_room_for_the_temporary_file_is_named_by_its_error_number(
    tmp_path, private, monkeypatch, number, code
):
    def refuse(dir):
        raise OSError(number, "no")

    (tmp_path / "a.wav").write_bytes(wav())
    monkeypatch.setattr(decoder.tempfile, "TemporaryFile", refuse)
    assert refusal(tmp_path / "a.wav", private).code == code


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_is_only_half_written_is_a_full_disk(
    tmp_path, private, monkeypatch, unbuffered
):
    """A full disk writes what fits first; only the next write fails."""
    (tmp_path / "a.wav").write_bytes(wav())
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    run_as_worker(
        monkeypatch,
        """
real, space = os.write, 100_000
def write(number, data):
    global space
    if not space:
        raise OSError(28, "no room")
    written = real(number, data[:space])
    space -= written
    return written
os.write = write
worker.main(["audio", "48000", "20"])
""",
    )
    assert refusal(tmp_path / "a.wav", private).code == "disk-full"


def test_a_result_shorter_than_its_header_says_is_a_full_disk(tmp_path, private, monkeypatch):
    (tmp_path / "a.wav").write_bytes(wav())
    reply = '{"samples": 9, "rate": 1, "channels": 1, "seconds": 1, "notes": []}'
    run_as_worker(monkeypatch, f"print({reply!r})")
    assert refusal(tmp_path / "a.wav", private).code == "disk-full"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_above_the_largest_file_allowed_is_a_full_disk(
    tmp_path, private, monkeypatch, unbuffered
):
    (tmp_path / "a.wav").write_bytes(wav())
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    run_as_worker(
        monkeypatch,
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
        "worker.main(['audio', '48000', '20'])",
    )
    assert refusal(tmp_path / "a.wav", private).code == "disk-full"


def test_the_decoder_imports_little_until_it_runs():
    heavy = "import sys, audio.decode; sys.exit(bool({'av', 'numpy', 'soxr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_the_child_starts_from_any_folder_and_with_a_safe_path(
    tmp_path, private, monkeypatch, safe_path
):
    """Another package called `audio` in the working folder is not run instead."""
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "__init__.py").write_text("raise SystemExit(9)")
    (tmp_path / "a.wav").write_bytes(wav())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", safe_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check_sound(decode(tmp_path / "a.wav", LIMIT_S, private), SECONDS, 0)


def test_the_child_runs_from_a_copy_of_the_packages_alone(tmp_path):
    """As from site-packages, which contains nothing else of the project."""
    for package in ("audio", "core"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.wav").write_bytes(wav())
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pathlib import Path;"
        "from audio import decode; p = Path('../a.wav');"
        "print(decode.__file__, decode.decode(p, 20, Path('.')).sound.shape)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path / "elsewhere",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith(str(tmp_path)), done.stderr
    assert "(2, 144000)" in done.stdout


# Tracks, padding and tags


def with_tracks(*levels: float, default: int | None = None) -> bytes:
    """A Matroska file with one audio track for each level."""
    import av

    held = io.BytesIO()
    with av.open(held, "w", format="matroska") as container:
        streams = [container.add_stream("pcm_s16le", rate=48_000, layout="stereo") for _ in levels]
        for number, stream in enumerate(streams):
            mark = av.stream.Disposition.default if number == default else 0
            stream.disposition = av.stream.Disposition(mark)
        for stream, level in zip(streams, levels, strict=True):
            pcm = (tone(level=level) * 32767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(pcm, format="s16")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return held.getvalue()


@pytest.mark.parametrize(("default", "used"), [(None, 1), (0, 1), (1, 2), (2, 3)])
def test_of_several_audio_tracks_the_default_or_first_is_used_and_named(
    tmp_path, private, default, used
):
    (tmp_path / "tracks.mka").write_bytes(with_tracks(0.1, 0.2, 0.4, default=default))
    source = decode(tmp_path / "tracks.mka", LIMIT_S, private)
    assert source.notes == (f"The file has 3 audio tracks, and track {used} was used.",)
    assert np.abs(source.sound).max() == pytest.approx(0.05 * 2**used, abs=1e-3)


BARE = {"write_xing": "0", "id3v2_version": "0"}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("bare.aac", lambda: encoded("aac", "adts")),
        ("bare 44100.aac", lambda: encoded("aac", "adts", 44_100)),
        ("bare.mp3", lambda: mp3(**BARE)),
        ("bare 44100.mp3", lambda: mp3(rate=44_100, **BARE)),
    ],
)
def test_a_file_that_hides_its_padding_may_be_a_frame_longer_than_the_limit(
    tmp_path, private, name, make
):
    (tmp_path / name).write_bytes(make())
    assert decode(tmp_path / name, LIMIT_S, private).seconds > SECONDS
    source = decode(tmp_path / name, SECONDS, private)
    assert source.seconds == SECONDS
    assert source.sound.shape[1] == SECONDS * SAMPLE_RATE
    assert refusal(tmp_path / name, private, SECONDS - 0.1).code == "source-too-long"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("गीत.wav", "गीत.wav"),
        ("क्‍ष.wav", "क्‍ष.wav"),
        ("👩‍🎤.wav", "👩‍🎤.wav"),
        ("อำลา.wav", "อำลา.wav"),
        ("q̇" * 60 + ".wav", ("q̇" * 38) + ".wav"),
        ("́" * 30 + ".wav", ".wav"),
        ("a[31m‮.wav", "a?[31m?.wav"),
    ],
    ids=ascii,
)
def test_names_of_combining_scripts_are_shown_whole(name, shown):
    assert decoder.display_name(Path(name)) == shown


def tagged(codec: str, format: str, tags: dict[str, str], cover: bytes = b"") -> bytes:
    """A tone with tags, and a cover where the format takes one, as another program writes them."""
    import av

    with tempfile.NamedTemporaryFile() as held:
        with av.open(held.name, "w", format=format) as container:
            container.metadata.update(tags)
            stream = container.add_stream(codec, rate=48_000, layout="stereo")
            coder = stream.codec_context
            coder.format = coder.codec.audio_formats[0].name
            picture = None
            if cover:
                picture = container.add_stream("png")
                picture.width = picture.height = 1
                picture.pix_fmt = "rgb24"
                picture.disposition = av.stream.Disposition.attached_pic
            coder.open()
            flat = tone().reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(flat, format="flt", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
            fitted = av.AudioResampler(
                coder.format.name, "stereo", 48_000, coder.frame_size or 1024
            )
            if picture is not None:
                packet = av.Packet(cover)
                packet.stream = picture
                packet.pts = packet.dts = 0
                container.mux(packet)
            for part in [*fitted.resample(frame), *fitted.resample(None)]:
                container.mux(stream.encode(part))
            container.mux(stream.encode(None))
        return held.read()


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
)
TAGS = {"title": "Мой вальс", "artist": "Zoë", "album": "Früh", "date": "2019-05-17"}


@pytest.mark.parametrize(
    ("codec", "format", "pictured"),
    [
        ("libmp3lame", "mp3", True),
        ("flac", "flac", True),
        ("pcm_s16le", "wav", False),
        ("aac", "ipod", False),
        ("libopus", "ogg", False),
        ("libopus", "webm", False),
        ("pcm_s16be", "aiff", False),
    ],
)
def test_tags_and_cover_art_of_any_format_are_read(tmp_path, private, codec, format, pictured):
    path = tmp_path / "a.bin"
    path.write_bytes(tagged(codec, format, TAGS, PNG if pictured else b""))
    found = read_metadata(path, private)
    expected = dict(TAGS)
    if format == "aiff":
        expected = {"title": TAGS["title"]}  # all that FFmpeg writes there without ID3
    assert {name: found.fields.get(name) for name in expected} == expected
    assert found.cover == (PNG if pictured else b"")
    assert not list(private.iterdir())


def test_tags_that_are_not_utf_8_do_not_stop_anything(tmp_path, private):
    data = wav(format="FLAC")
    kind = data[4 + 38 :]
    assert kind[0] & 127 == 4, "soundfile puts the comments second"
    size = int.from_bytes(kind[1:4], "big")
    comment = b"\0\0\0\0" + struct.pack("<I", 1) + struct.pack("<I", 9) + b"TITLE=\xff\xfeX"
    assert len(comment) == 21
    body = kind[:1] + len(comment).to_bytes(3, "big") + comment + kind[4 + size :]
    (tmp_path / "latin.flac").write_bytes(data[: 4 + 38] + body)
    check_sound(decode(tmp_path / "latin.flac", LIMIT_S, private), SECONDS, 0)
    assert read_metadata(tmp_path / "latin.flac", private).fields["title"].endswith("X")
