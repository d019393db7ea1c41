"""Odd files and names through the five commands and the API: none ends in `internal`.

Good sound comes through whatever stands around it; anything else is refused by name. All of the
studio takes part but the model, in whose place the source itself is played.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

import backend
from audio import decode
from core import files
from core.errors import StudioError
from core.requests import EXPORTS, SONGS, Cover
from core.results import ExportedFiles, Failed, ModelUsed, Progress, Take
from models import catalog
from models.acestep import RenderedAudio
from runtime import device, song_task, uploads
from runtime.job import Job
from runtime.model_cache import ModelCache
from web.api import ApiError, endpoint

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


COMMANDS: dict[str, dict[str, float | str]] = {
    "cover": {"prompt": "x"},
    "extend": {"after_s": 1},
    "edit": {"start_s": 0.1, "end_s": 0.3},
    "export": {"format": "mp3"},
    "master": {"format": "flac"},
}


def no_steps(value: object) -> Iterator[Progress]:
    """A generator that returns `value` at once."""
    return value
    yield


def once(read: Callable[..., object]) -> Callable[..., object]:
    """`read`, called once for files of the same name and content."""
    found: dict[tuple[str, bytes], tuple[object, StudioError | None]] = {}

    def read_once(path: Path, *args: object, **named: object) -> object:
        key = path.name, path.read_bytes()
        if key not in found:
            try:
                found[key] = read(path, *args, **named), None
            except StudioError as error:
                found[key] = None, error
        value, error = found[key]
        if error:
            raise error
        return value

    return read_once


def play_source(self, job: Job, *_: object) -> Iterator[Progress]:
    """In place of `render`: the source as it was decoded."""
    yield Progress(stage="Generating audio")
    return RenderedAudio(np.array(job.sound("source")), -1.0, job.request.seed)


def result_of(events: Iterator[object]) -> str:
    """The code of a failure, or the kind of the result."""
    *_, ending = events
    if not isinstance(ending, Failed):
        assert isinstance(ending, Take | ExportedFiles)
        sound = ending.path if isinstance(ending, Take) else ending.paths[0]
        assert soundfile.info(sound).frames > 0
    return getattr(ending, "code", "made")


def result_of_api(answers: Iterator[object]) -> str:
    """The code of an `ApiError`, or "made" where a file was sent."""
    try:
        *_, (sent, _) = answers
    except ApiError as error:
        return json.loads(error.title)["code"]
    return "made" if Path(sent["path"]).name else "nothing"


def through(studio: backend.Studio, path: Path) -> dict[str, str]:
    """What each command, and the API, makes of the file at `path`."""
    found = {}
    for mode, given in COMMANDS.items():
        request = {**SONGS, **EXPORTS}[mode].of({**given, "source": path})
        found[mode] = result_of(studio.run(request, path.name))
        studio.leave(path.name)
    sent = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    values = {param.name: param.default for param in Cover.params()}
    found["api"] = result_of_api(endpoint(studio, Cover)(*{**values, "source": sent}.values()))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory, own_cache) -> dict[str, dict[str, str]]:
    """Every file of both tables, two at a time."""
    folder = tmp_path_factory.mktemp("uploads")
    (folder / "secret").write_text("not to be read")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        for task in (song_task.CoverTask, song_task.ExtendTask, song_task.EditTask):
            patch.setattr(task, "render", play_source)
        for name, value in {"engine": None, "apply_adapters": ()}.items():
            patch.setattr(ModelCache, name, lambda *_, value=value: no_steps(value))
        used = dict.fromkeys(("source", "revision", "sha256", "licence"), "")
        patch.setattr(ModelCache, "used", lambda *_: ModelUsed(name="x", may_sell=None, **used))
        patch.setattr(device, "free", lambda *_, **__: None)  # takes longer than the rest of a job
        # Each starts a process. All commands and the API read the same file.
        patch.setattr(uploads, "_decode", once(uploads._decode))
        patch.setattr(decode, "read_metadata", once(decode.read_metadata))
        studio = backend.Studio(catalog.choose("mini"), device.find_device("cpu"), "none")

        def run(name: str, make: Callable[[], bytes]) -> dict[str, str]:
            path = folder / name
            path.write_bytes(make())
            return through(studio, path)

        makers = {**GOOD, **ANY}
        with ThreadPoolExecutor(2) as workers:
            found = dict(zip(makers, workers.map(run, makers, makers.values()), strict=True))
    assert not list(files.private_folder().glob("*/")), "every job's folder is gone"
    return found


@pytest.mark.parametrize("name", GOOD, ids=ascii)
def test_good_sound_comes_through_whatever_its_name_and_tags_are(results, name):
    assert results[name] == dict.fromkeys((*COMMANDS, "api"), "made")


@pytest.mark.parametrize("name", ANY, ids=ascii)
def test_an_odd_file_is_read_or_refused_by_name(results, name):
    (result,) = set(results[name].values())
    assert result in ("made", "source-unreadable", "source-too-short")
