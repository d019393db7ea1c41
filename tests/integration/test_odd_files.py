"""Odd files and names through decoding, settings, tags and encoding: none ends in `internal`.

Good sound comes through whatever stands around it; anything else is refused by name.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import drain

from audio import decode, encode, metadata
from audio.settings import usable_settings
from core.errors import StudioError

RATE = 48_000
TONE = (0.3 * np.sin(np.arange(RATE // 2) * 0.0576)).astype(np.float32)


def file(format: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    """Half a second of a tone."""
    held = io.BytesIO()
    soundfile.write(held, np.stack([TONE, TONE], 1), rate, subtype, format=format)
    return held.getvalue()


WAV, FLAC, MP3, OGG = file(), file("FLAC"), file("MP3"), file("OGG", "VORBIS")
AIFF = file("AIFF")


def sevens(number: int) -> bytes:
    return bytes(number >> shift & 127 for shift in (21, 14, 7, 0))


def id3(*frames: bytes, version: int = 3, flags: int = 0, claims: int | None = None) -> bytes:
    body = b"".join(frames)
    size = sevens(len(body) if claims is None else claims)
    return b"ID3" + bytes([version, 0, flags]) + size + body


def frame(name: bytes, body: bytes, claims: int | None = None) -> bytes:
    size = len(body) if claims is None else claims
    return name + size.to_bytes(4, "big") + b"\0\0" + body


def chunk(name: bytes, body: bytes, claims: int | None = None) -> bytes:
    size = len(body) if claims is None else claims
    return name + size.to_bytes(4, "little") + body + b"\0" * (len(body) % 2)


def flac_with(comments: bytes) -> bytes:
    """FLAC whose comment block holds `comments`."""
    blocks, at, last = b"", 4, False
    while not last:
        size = int.from_bytes(FLAC[at + 1 : at + 4], "big")
        last, kind = FLAC[at] > 127, FLAC[at] & 127
        if kind != 4:
            blocks += bytes([kind]) + FLAC[at + 1 : at + 4 + size]
        at += 4 + size
    return b"fLaC" + blocks + b"\x84" + len(comments).to_bytes(3, "big") + comments + FLAC[at:]


def counted(text: bytes) -> bytes:
    return len(text).to_bytes(4, "little") + text


PICTURE = b"\0image/jpeg\0\3\0\xff\xd8\xff\xe0" + b"x" * 200_000
LATIN = "Überall Größe".encode("latin-1")

GOOD: dict[str, Callable[[], bytes]] = {
    "plain.wav": lambda: WAV,
    "गीत मेरा गाना.wav": lambda: WAV,
    "क्‍ष ज्ञ.flac": lambda: FLAC,
    "สวัสดี อำลา.mp3": lambda: MP3,
    "שיר חדש.ogg": lambda: OGG,
    "أغنية جديدة.wav": lambda: WAV,
    "\u202eevil\u202c.wav": lambda: WAV,
    "👩‍🎤👨‍👩‍👧‍👦🎸.wav": lambda: WAV,
    "🎵" * 61 + ".wav": lambda: WAV,
    "क" * 82 + ".wav": lambda: WAV,
    "e\u0301" * 80 + ".mp3": lambda: MP3,
    "a" * 250: lambda: FLAC,
    ".hidden": lambda: WAV,
    " ": lambda: WAV,
    "...": lambda: WAV,
    "-rf --help.wav": lambda: WAV,
    "%s%n{0}{name}.wav": lambda: WAV,
    "quo\"te's <b>&amp;.wav": lambda: WAV,
    "new\nline\ttab\r.wav": lambda: WAV,
    "CON": lambda: WAV,
    os.fsdecode(b"latin-1 \xe9\xff.wav"): lambda: WAV,
    "id3 in front of a flac.flac": lambda: id3(frame(b"TIT2", b"\0x")) + FLAC,
    "two id3 tags.mp3": lambda: id3(frame(b"TIT2", b"\0x")) * 2 + MP3,
    "id3 of version 2.mp3": lambda: id3(b"TT2\0\0\2\0x", version=2) + MP3,
    "id3 of version 9.mp3": lambda: id3(frame(b"TIT2", b"\0x"), version=9) + MP3,
    "latin-1 tag.mp3": lambda: id3(frame(b"TIT2", b"\3" + LATIN)) + MP3,
    "odd utf-16.mp3": lambda: id3(frame(b"TIT2", b"\1\xff\xfea")) + MP3,
    "lone surrogate.mp3": lambda: id3(frame(b"TPE1", b"\1\xff\xfe\x00\xd8a\0")) + MP3,
    "overlong frame.mp3": lambda: id3(frame(b"TXXX", b"\0ACE_SETTINGS\0{", 0x7FFFFFFF)) + MP3,
    "empty frames.mp3": lambda: id3(*[frame(b"TIT2", b"")] * 50) + MP3,
    "cover.mp3": lambda: id3(frame(b"APIC", PICTURE)) + MP3,
    "cover of no kind.mp3": lambda: id3(frame(b"APIC", b"\0-->\0\3\0file:///etc/passwd")) + MP3,
    "no comments.flac": lambda: flac_with(counted(b"") + bytes(4)),
    "too many comments.flac": lambda: flac_with(counted(b"") + b"\x63\0\0\0" + counted(b"A=b")),
    "endless comments.flac": lambda: flac_with(counted(b"") + b"\xff" * 4),
    "comment without a name.flac": lambda: flac_with(counted(b"") + b"\1\0\0\0" + counted(b"=x")),
    "comment not utf-8.flac": lambda: flac_with(
        counted(b"") + b"\1\0\0\0" + counted(b"TITLE=" + LATIN)
    ),
    "long vendor.flac": lambda: flac_with(counted(b"v" * 100_000) + bytes(4)),
    "list without info.wav": lambda: WAV + chunk(b"LIST", b""),
    "info not ascii.wav": lambda: WAV + chunk(b"LIST", b"INFO" + chunk(b"INAM", LATIN + b"\0")),
    "settings of nobody.wav": lambda: WAV + chunk(b"aces", b"{}"),
    "settings cut off.wav": lambda: WAV + chunk(b"aces", b'{"ace-music-studio": 1', 900),
    "settings of tomorrow.wav": lambda: WAV + chunk(b"aces", b'{"ace-music-studio": 99}'),
    "settings twice.wav": lambda: WAV + chunk(b"aces", b"{}") * 2,
    "bad id3 chunk.wav": lambda: WAV + chunk(b"id3 ", id3(claims=99_999)),
    "size of a stream.wav": lambda: WAV[:4] + b"\xff" * 4 + WAV[8:],
    "odd chunk.aiff": lambda: AIFF + b"ODDS\0\0\0\3abc",
    "silence behind.mp3": lambda: MP3 + bytes(10_000),
    "id3v1.mp3": lambda: MP3 + b"TAG" + LATIN.ljust(125, b"\0"),
    "apetag.mp3": lambda: MP3 + b"APETAGEX" + b"\xff" * 24,
}

ANY: dict[str, Callable[[], bytes]] = {
    "empty.wav": lambda: b"",
    "one byte": lambda: b"R",
    "head of a wav.wav": lambda: WAV[:44],
    "head of a flac.flac": lambda: FLAC[:60],
    "half.mp3": lambda: MP3[: len(MP3) // 2],
    "half.ogg": lambda: OGG[: len(OGG) // 2],
    "tag alone.mp3": lambda: id3(frame(b"TIT2", b"\0x")),
    "tag longer than the file.mp3": lambda: id3(claims=(1 << 28) - 1) + MP3,
    "no rate.wav": lambda: WAV[:24] + bytes(4) + WAV[28:],
    "no bits.wav": lambda: WAV[:34] + bytes(2) + WAV[36:],
    "no channels.wav": lambda: WAV[:22] + bytes(2) + WAV[24:],
    "codec of no kind.wav": lambda: WAV[:20] + b"\xfe\x7f" + WAV[22:],
    "block of zero.wav": lambda: WAV[:32] + bytes(2) + WAV[34:],
    "settings alone.json": lambda: b'{"ace-music-studio": 1}',
    "text.txt": lambda: b"la la la\n" * 99,
    "noise.mp3": lambda: random.Random(1).randbytes(20_000),
    "scratched.flac": lambda: bytes(
        byte ^ (0x55 if at > 200 and at % 97 == 0 else 0) for at, byte in enumerate(FLAC)
    ),
    "scratched head.ogg": lambda: OGG[:40] + b"\xff" * 40 + OGG[80:],
    "no codec.mka": lambda: b"\x1a\x45\xdf\xa3" + b"\xff" * 400,
    "box without end.m4a": lambda: b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42" + b"\xff" * 400,
}


def through(path: Path, folder: Path) -> str:
    """The code of the refusal, or how many samples came out at the other end."""
    try:
        settings, _ = usable_settings(path)
        decoded = decode.decode(path, 20, folder)
        tags, _ = metadata.tags_for(path, settings, folder)
        made = folder / f"{abs(hash(path.name))}.flac"
        drain(encode.save(decoded.sound, made, "flac", settings, tags))
        samples = soundfile.info(made).frames
        made.unlink()
    except StudioError as error:
        return error.code
    return str(samples)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """Every file of both tables, two at a time."""
    uploads, private = (tmp_path_factory.mktemp(name) for name in ("uploads", "private"))
    (uploads / "secret").write_text("not to be read")

    def run(name: str, make: Callable[[], bytes]) -> str:
        path = uploads / name
        path.write_bytes(make())
        return through(path, private)

    makers = {**GOOD, **ANY}
    with ThreadPoolExecutor(2) as workers:
        found = dict(zip(makers, workers.map(run, makers, makers.values()), strict=True))
    assert not list(private.iterdir())
    return found


@pytest.mark.parametrize("name", GOOD, ids=ascii)
def test_good_sound_comes_through_whatever_its_name_and_tags_are(results, name):
    assert results[name].isdigit(), results[name]
    assert abs(int(results[name]) - len(TONE)) < 2500


@pytest.mark.parametrize("name", ANY, ids=ascii)
def test_an_odd_file_is_read_or_refused_by_name(results, name):
    allowed = ("source-unreadable", "source-too-short")
    assert results[name].isdigit() or results[name] in allowed, results[name]
