"""Files that people bring, good, odd and hostile; splices, their seams, and pictures of sound."""

from __future__ import annotations

import io
import os
import random
import resource
import struct
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
from hypothesis import given, settings
from hypothesis import strategies as st

from audio import decode as decoder
from audio import levels, splice
from audio.decode import Source, decode
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
        tempfile.NamedTemporaryFile() as held,  # faststart opens it a second time, by name
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
    """With some bytes replaced by others, headers left alone."""
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
    """A 16-bit WAV by hand, with claims that no library would write."""
    claims = (1, channels, rate & 0xFFFFFFFF, rate * channels * 2 & 0xFFFFFFFF)
    fmt = struct.pack("<HHIIHH", *claims, channels * 2 & 0xFFFF, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", len(sound))
    return b"RIFF" + struct.pack("<I", len(body) + len(sound)) + body + sound


def spoiled(value: float) -> bytes:
    """A float WAV with ten samples that are not sound."""
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
"""Maker and part of the problem that is told; empty where FFmpeg's guess decides which."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("brought")


@pytest.fixture(scope="module")
def private(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def heard(place, private) -> dict[str, Source | StudioError]:
    """Every file of the tables, decoded once, two at a time."""
    (place / "secret.wav").write_bytes(wav())

    def hear(name: str, make: Callable[[], bytes]) -> Source | StudioError:
        data = make()
        playlist = b"secret.wav" in data
        (place / name).write_bytes(data.replace(b"@", bytes(place)) if playlist else data)
        try:
            return decode(place / name, LIMIT_S, private)
        except StudioError as error:
            return error

    makers = {**GOOD, **{name: row[0] for name, row in (MENDED | BAD).items()}}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as hands:
        patch.chdir(place)  # where a playlist would find what it names
        return dict(zip(makers, hands.map(hear, makers, makers.values()), strict=True))


def loudest_hz(sound: np.ndarray) -> float:
    middle = sound[0, len(sound[0]) // 4 : -len(sound[0]) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    return float(np.argmax(spectrum) * SAMPLE_RATE / len(middle))


def check_sound(source: Source, seconds: float, slack_s: float) -> None:
    sound = source.sound
    assert sound.dtype == np.float32
    assert sound.flags.c_contiguous
    assert sound.shape == (2, round(source.seconds * SAMPLE_RATE))
    assert abs(source.seconds - seconds) <= slack_s
    assert np.isfinite(sound).all()
    assert 0.1 < np.abs(sound).max() <= 1.0
    assert abs(loudest_hz(sound) - HZ) < 5


@pytest.mark.parametrize("name", GOOD, ids=ascii)
def test_a_sound_file_comes_in_whole(heard, name):
    source = heard[name]
    assert isinstance(source, Source), source
    coarse = name in ("bare.aac", "without index.mp3")  # which tell of no padding
    check_sound(source, SECONDS, 0.06 if coarse else 0.0)
    if not coarse:
        assert source.sound.shape[1] == SECONDS * SAMPLE_RATE
    mixed_down = any(word in name for word in ("7.1", "5.1", "channels"))
    assert source.notes == () or (mixed_down and "scaled down" in source.notes[0])


@pytest.mark.parametrize("name", MENDED)
def test_a_damaged_file_gives_what_is_left_and_says_so(heard, name):
    _, least_s, note = MENDED[name]
    source = heard[name]
    assert isinstance(source, Source), source
    check_sound(source, (least_s + SECONDS) / 2, (SECONDS - least_s) / 2 + 0.06)
    assert note in " ".join(source.notes)
    assert bool(source.notes) >= bool(note)


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_music_is_refused_in_one_sentence(heard, place, name):
    error = heard[name]
    assert isinstance(error, StudioError), error
    assert error.code in ("source-unreadable", "source-too-short")
    assert BAD[name][1] in error.message
    assert name in error.message
    assert str(place) not in str(error)


@pytest.fixture(autouse=True)
def no_process_stays():
    """Whoever decodes is gone afterwards. Other tests may have left children of their own."""
    before = {child.pid for child in psutil.Process().children()}
    yield
    assert not {child.pid for child in psutil.Process().children()} - before


def test_nothing_stays_behind(heard, private):
    assert not list(private.iterdir())


def test_the_original_shape_is_told(heard):
    assert (heard["44100 Hz.wav"].rate, heard["44100 Hz.wav"].channels) == (44_100, 2)
    assert (heard["mono.wav"].rate, heard["mono.wav"].channels) == (48_000, 1)
    assert heard["aac 7.1.m4a"].channels == 8


def test_48_khz_stereo_keeps_every_bit(heard):
    assert np.array_equal(heard["float.wav"].sound, tone().T)


def test_mono_is_as_loud_as_it_was(heard):
    sound = heard["mono.wav"].sound
    assert np.array_equal(sound[0], sound[1])
    assert np.abs(sound).max() == pytest.approx(0.3, abs=1e-3)


def test_resampling_keeps_the_samples_in_place(heard):
    for name in ("44100 Hz.wav", "96000 Hz.wav", "44101 Hz.wav"):
        inner = slice(4800, -4800)
        assert np.abs(heard[name].sound[:, inner] - tone().T[:, inner]).max() < 2e-4


def test_what_is_not_sound_becomes_silence_and_leaves_the_rest(heard):
    for name in ("nan.wav", "infinite.wav", "astronomic.wav"):
        sound = heard[name].sound
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


def test_a_file_that_may_not_be_read(tmp_path, private, monkeypatch):
    def refused(*args):
        raise PermissionError(13, "no")

    (tmp_path / "a.wav").write_bytes(wav())
    monkeypatch.setattr(os, "open", refused)
    assert "cannot be opened" in refusal(tmp_path / "a.wav", private).message


def test_an_error_tells_the_name_and_nothing_that_a_page_could_trip_over(tmp_path, private):
    path = tmp_path / ("x" * 150 + "\n\x1b[31m\u202e{fact}.wav")
    path.write_bytes(b"la la la")
    message = str(refusal(path, private))
    assert message.isprintable()
    assert "???" not in message
    assert "x?[31m?{fact}.wav cannot be read" in message.replace("??", "?")
    assert len(message) < 300


def test_lengths_are_held_to_the_sample(tmp_path, private):
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


@pytest.mark.parametrize("broken", ["_chunks = None", "_counted_s = lambda *a: 0.0"])
def test_length_is_judged_before_decoding_and_again_while_decoding(
    tmp_path, private, monkeypatch, broken
):
    """Either alone refuses two hours, without room for them in memory."""
    (tmp_path / "long.wav").write_bytes(two_hours("wav"))
    program = (
        f"decoding.ADDRESSES = 1 << 30; decoding.{broken}; decoding._be_the_decoder(48000, 20)"
    )
    pretend(monkeypatch, program)
    assert refusal(tmp_path / "long.wav", private).code == "source-too-long"
    (tmp_path / "long.wav").unlink()


def test_a_length_guessed_from_the_bit_rate_is_no_reason_for_a_note(tmp_path, private):
    """Without an index FFmpeg takes the first frame's bit rate for all of them."""
    bare = {"write_xing": "0", "id3v2_version": "0"}
    low, high = (encoded("libmp3lame", "mp3", bit_rate=b, **bare) for b in (32_000, 320_000))
    (tmp_path / "varying.mp3").write_bytes(low + high)
    source = decode(tmp_path / "varying.mp3", LIMIT_S, private)
    assert abs(source.seconds - 2 * SECONDS) < 0.1
    assert "cut off" not in " ".join(source.notes)


def pretend(monkeypatch, program: str) -> None:
    """Let `program` be the decoder."""
    start = f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); from audio import decode as decoding\n"
    monkeypatch.setattr(decoder, "DECODER", (sys.executable, "-c", start + program))


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("os.kill(os.getpid(), 11)", "it is damaged"),
        ("os.kill(os.getpid(), 9)", "it is damaged"),
        ("os.abort()", "it is damaged"),
        ("sys.exit(3)", "it is damaged"),
        ("raise MemoryError", "it is damaged"),
        ("print('hello')", "it is damaged"),
        ("print('[1, 2]')", "it is damaged"),
        ('print(\'{"code": "no-such", "facts": {}}\')', "it is damaged"),
        ('print(\'{"samples": 9, "rate": 1, "channels": 1, "seconds": 1, "notes": []}\')', "it is"),
        ("decoding._read = lambda *a: bytearray(1 << 36); decoding._be_the_decoder(1, 1)", "it is"),
        ("time.sleep(60)", "takes too long"),
        ("\nwhile True: pass", "takes too long"),
    ],
)
def test_a_decoder_that_dies_or_hangs_is_an_error_and_nothing_more(
    tmp_path, private, monkeypatch, program, problem
):
    (tmp_path / "a.wav").write_bytes(wav())
    pretend(monkeypatch, program)
    if "too long" in problem:
        monkeypatch.setattr(decoder, "PATIENCE_S", 1.0)
    start = time.monotonic()
    error = refusal(tmp_path / "a.wav", private)
    assert error.code == "source-unreadable"
    assert problem in error.message
    assert time.monotonic() - start < 20


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
decoding._read = grab
decoding._be_the_decoder(48000, 1)
"""
    pretend(monkeypatch, grab)
    assert refusal(tmp_path / "a.wav", private).code == "source-unreadable"
    assert not (tmp_path / "tried").exists()


def test_a_full_disk_and_a_lost_folder_have_their_own_names(tmp_path, private, monkeypatch):
    (tmp_path / "a.wav").write_bytes(wav())
    assert refusal(tmp_path / "a.wav", tmp_path / "gone").code == "not-writable"
    full = Path("/dev/full").open("r+b")  # noqa: SIM115 - decode closes it
    monkeypatch.setattr(decoder.tempfile, "TemporaryFile", lambda dir: full)
    assert refusal(tmp_path / "a.wav", private).code == "disk-full"


def test_the_decoder_is_a_light_program():
    heavy = "import sys, audio, decoding; sys.exit(bool({'av','numpy','soxr'} & set(sys.modules)))"
    assert (
        os.spawnl(
            os.P_WAIT,
            sys.executable,
            "python",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); {heavy}",
        )
        == 0
    )


# Splices and seams. Everything below is at 48 kHz.

S = SAMPLE_RATE


def noise(seconds: float = 4.0, seed: int = 0, level: float = 0.1) -> np.ndarray:
    dice = np.random.default_rng(seed)
    return (level * dice.standard_normal((2, round(seconds * S)))).astype(np.float32)


def chord(seed: int, seconds: float = 4.0) -> np.ndarray:
    """Sustained tones: nowhere for a click to hide."""
    dice = np.random.default_rng(seed)
    t = np.arange(round(seconds * S)) / S
    hz, phase = dice.uniform(80, 1200, 5), dice.uniform(0, 2 * np.pi, (2, 5))
    return (0.1 * np.sin(2 * np.pi * hz[:, None] * t + phase[:, :, None]).sum(1)).astype(np.float32)


def rms_db(sound: np.ndarray) -> float:
    return float(10 * np.log10(np.square(sound, dtype=np.float64).mean()))


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(2, 3000),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    fade=st.integers(0, 800),
    inside=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outside_the_region_and_its_fades_every_bit_is_the_source(total, ends, fade, inside, seed):
    start, end = sorted(round(e * total) for e in ends)
    if start == end:
        start, end = (start - 1, end) if start else (0, 1)
    source = np.clip(noise(total / S, seed, 0.4), -1, 1)
    made = noise(total / S, seed + 100, 0.5)
    kept, given_ = source.copy(), made.copy()
    result = splice.splice(source, made, start, end, fade, inside=inside)
    first, last = (start, end) if inside else (max(0, start - fade), min(total, end + fade))
    first, last = (first if start else 0), (last if end < total else total)
    assert result.shape == source.shape
    assert result.dtype == np.float32
    assert np.array_equal(result[:, :first].view(np.int32), source[:, :first].view(np.int32))
    assert np.array_equal(result[:, last:].view(np.int32), source[:, last:].view(np.int32))
    assert np.abs(result).max() <= 1.0
    assert np.array_equal(source, kept)
    assert np.array_equal(made, given_)
    low, high = (start + fade, end - fade) if inside else (start, end)
    low, high = (low if start else 0), (high if end < total else total)
    if high > low:  # between the fades it is what was made, at one level
        ratio = result[:, low:high] / made[:, low:high]
        assert np.ptp(ratio) < 1e-4 * np.abs(ratio).max()


@pytest.mark.parametrize("inside", [False, True])
def test_a_fade_dips_not_between_strangers_and_bulges_not_between_copies(inside):
    fade, at = S // 10, 2 * S
    middle = at + fade // 2 if inside else at - fade // 2
    near = slice(middle - S // 100, middle + S // 100)

    def rise(source, made):
        return rms_db(splice.splice(source, made, at, 4 * S, fade, inside=inside)[:, near]) + 20

    strangers = np.mean([rise(noise(seed=i), noise(seed=i + 50)) for i in range(20)])
    copies = np.mean(
        [rise(noise(seed=i), noise(seed=i) + noise(seed=i + 50) / 20) for i in range(9)]
    )
    assert abs(strangers) < 0.3
    assert abs(copies) < 0.1


def test_a_copy_changes_nothing_that_can_be_heard():
    sound = chord(1)
    spliced = splice.splice(sound, sound, S, 3 * S, S // 20)
    assert np.abs(spliced - sound).max() < 1e-6


@pytest.mark.parametrize(("start", "end"), [(0, 2 * S), (2 * S, 4 * S), (S, 3 * S), (0, 4 * S)])
def test_there_is_no_fade_at_an_end_of_the_timeline(start, end):
    source, made = noise(seed=1), noise(seed=2)
    spliced = splice.splice(source, made, start, end, S // 10)
    gain = spliced[0, (start + end) // 2] / made[0, (start + end) // 2]
    if start == 0:
        assert np.allclose(spliced[:, :100], gain * made[:, :100], rtol=1e-5)
    if end == 4 * S:
        assert np.allclose(spliced[:, -100:], gain * made[:, -100:], rtol=1e-5)
    if start == 0 and end == 4 * S:
        assert gain == 1.0


def test_both_seams_are_the_same_seen_from_either_side():
    source, made = noise(seed=1), noise(seed=2)
    there = splice.splice(source, made, S, 3 * S, 2000)
    back = splice.splice(source[:, ::-1], made[:, ::-1], S, 3 * S, 2000)[:, ::-1]
    assert np.abs(there - back).max() < 1e-6


@pytest.mark.parametrize(
    ("quieter", "left_db"), [(1.0, 0.0), (0.6, 0.0), (1.9, 0.0), (0.1, -14.0), (6.0, 9.6)]
)
def test_the_part_takes_the_level_of_the_sound_beside_it_within_bounds(quieter, left_db):
    source = noise(seed=1, level=0.02)
    spliced = splice.splice(source, source * np.float32(quieter), 2 * S, 4 * S, 2000)
    assert rms_db(spliced[:, 3 * S :]) - rms_db(source) == pytest.approx(left_db, abs=0.1)


def test_the_level_is_taken_where_both_say_the_same_not_from_other_music():
    """A loud chorus behind a quiet verse stays loud."""
    source, made = noise(seed=1, level=0.02), noise(seed=1, level=0.02)
    made[:, 2 * S :] *= 8
    spliced = splice.splice(source, made, 2 * S, 4 * S, 2000)
    assert rms_db(spliced[:, 3 * S :]) - rms_db(source[:, 3 * S :]) == pytest.approx(18, abs=0.3)


@pytest.mark.parametrize("level", [0.0, 1e-4])
def test_silence_beside_the_seam_changes_no_level(level):
    made = noise(seed=2)
    spliced = splice.splice(noise(level=level), made, 2 * S, 4 * S, 2000)
    assert np.array_equal(spliced[:, 2 * S :], made[:, 2 * S :])
    assert np.isfinite(spliced).all()


def test_no_sample_passes_full_scale():
    for seed in range(10):
        loud = [np.clip(chord(seed + i) * 9, -1, 1) for i in (0, 50)]
        spliced = splice.splice(loud[0], loud[1] * 3, S, 3 * S, S // 10)
        assert np.abs(spliced).max() <= 1.0
        assert (np.abs(spliced[:, S + 1 : 3 * S - 1]) < 1.0).mean() > 0.5, "scaled, not clipped"


def test_a_source_above_full_scale_is_held_to_it_within_the_fade():
    source = noise(1, 3) * 40
    spliced = splice.splice(source, noise(1, 4), S // 2, S, 4000)
    assert np.abs(spliced[:, S // 2 - 4000 :]).max() <= 1.0
    assert np.abs(spliced).max() > 1.0


def test_a_fade_next_to_full_scale_is_scaled_not_clipped():
    source, made = (np.sign(noise(1, seed)).astype(np.float32) * 0.99 for seed in (1, 2))
    spliced = splice.splice(source, made, S // 2, S, 4000)
    assert np.abs(spliced).max() <= 1.0
    assert (np.abs(spliced) >= 0.9999).mean() < 4e-3


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 5), (6, 5), (0, 4 * S + 1)])
def test_impossible_regions_are_refused(start, end):
    with pytest.raises(ValueError, match="cannot put"):
        splice.splice(noise(), noise(), start, end, 10)
    with pytest.raises(ValueError, match="cannot put"):
        splice.splice(noise(), noise(3), 0, 10, 10)


AT = 2 * S


def seam_of(sound: np.ndarray, half_ms: float = 0) -> splice.Seam:
    return splice.seam(sound, AT, round(half_ms * S / 1000), S)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fade_ms", [20, 50, 100])
def test_a_splice_in_sustained_tones_is_good(seed, fade_ms):
    fade = fade_ms * S // 1000
    spliced = splice.splice(chord(seed), chord(seed + 99), AT + fade // 2, 4 * S, fade)
    found = seam_of(spliced, fade_ms / 2)
    assert found.good, found


@pytest.mark.parametrize("make", [chord, lambda seed: noise(seed=seed)])
def test_untouched_sound_has_no_seam(make):
    for seed in range(20):
        found = seam_of(make(seed), 50)
        assert found.good, found
        assert found.click <= 1.6


@pytest.mark.parametrize("seed", range(12))
def test_a_hard_cut_in_sustained_tones_is_found(seed):
    cut = np.concatenate([chord(seed)[:, :AT], chord(seed + 99)[:, AT:]], 1)
    found = seam_of(cut)
    assert not found.good
    assert found.click > splice.CLICK_RATIO


def test_a_cut_anywhere_within_the_fade_is_found():
    for offset in (-2000, -777, 1234, 2300):
        place = AT + offset
        cut = np.concatenate([chord(1)[:, :place], chord(99)[:, place:]], 1)
        assert seam_of(cut, 50).click > splice.CLICK_RATIO
        assert seam_of(cut, 5).click < splice.CLICK_RATIO


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("make", [chord, lambda seed: noise(seed=seed)])
def test_twenty_ms_of_nothing_are_found(seed, make):
    holed = make(seed)
    holed[:, AT - S // 100 : AT + S // 100] = 0
    found = seam_of(holed)
    assert not found.good
    assert found.gap_db < -40


@pytest.mark.parametrize("make", [chord, lambda seed: noise(seed=seed)])
def test_a_bulge_is_found(make):
    bulging = make(1)
    hump = 1 + 2 * np.hanning(S // 5).astype(np.float32)
    bulging[:, AT - S // 10 : AT + S // 10] *= hump
    found = seam_of(bulging, 50)
    assert not found.good
    assert found.bump_db > splice.BUMP_DB


def test_a_seam_can_be_measured_anywhere():
    for sound in (chord(1), np.zeros((2, S), np.float32), chord(1, 0.05), chord(1, 0.001)):
        for at in (0, 1, sound.shape[1] // 2, sound.shape[1] - 1, sound.shape[1]):
            found = splice.seam(sound, at, 500, S)
            assert all(np.isfinite(found[:3]))
            assert type(found.good) is bool


def test_a_picture_holds_the_lowest_and_highest_sample_of_each_stretch():
    sound = noise(1.0, 4)
    picture = np.array(levels.peaks(sound, 100)).reshape(100, 2)
    stretches = sound.reshape(2, 100, -1)
    assert np.allclose(picture[:, 0], stretches.min((0, 2)), atol=1e-4)
    assert np.allclose(picture[:, 1], stretches.max((0, 2)), atol=1e-4)


@pytest.mark.parametrize("samples", [0, 1, 3, 99, 100, 101, 4801])
def test_a_picture_has_the_width_asked_for_and_misses_nothing(samples):
    sound = noise(1.0, 5)[:, :samples]
    picture = levels.peaks(sound, 100)
    assert len(picture) == 200
    assert all(type(value) is float for value in picture)
    assert max(picture) == pytest.approx(sound.max(initial=-9) if samples else 0, abs=1e-4)
