"""Times of lyrics in files: LRC, SRT, and inside MP3 and FLAC."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import drain

from audio import encode, lyric_files
from audio.tags import Tags
from core.results import LyricLine, LyricWord

LINES = (
    LyricLine(
        text="Streetlights hum",
        start_s=1.2,
        end_s=3.456,
        words=(LyricWord(text="Streetlights", start_s=1.2, end_s=2.0),),
        confidence=0.9,
    ),
    LyricLine(text="夜の街を\n歩く", start_s=59.996, end_s=61.5, confidence=0.8),
    LyricLine(text="not sung", start_s=61.5, end_s=61.5, confidence=0.1, sung=False),
    LyricLine(text="𝄞 slow", start_s=3725.25, end_s=3726, confidence=0.7),
)
SOUND = np.zeros((2, 4800), np.float32)


def id3_frames(path: Path) -> dict[str, bytes]:
    """The frames of an ID3v2.3 tag by name, the last of each."""
    data = path.read_bytes()
    assert data[:4] == b"ID3\3"
    size = sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    at, frames = 10, {}
    while at < 10 + size:
        length = int.from_bytes(data[at + 4 : at + 8], "big")
        frames[data[at : at + 4].decode()] = data[at + 10 : at + 10 + length]
        at += 10 + length
    assert at == 10 + size
    return frames


def read_wide(body: bytes) -> tuple[str, bytes]:
    """The UTF-16 text at the beginning of `body`, and what follows its end."""
    assert body[:2] == b"\xff\xfe"
    end = next(i for i in range(0, len(body), 2) if body[i : i + 2] == b"\0\0")
    return body[2:end].decode("utf-16-le"), body[end + 2 :]


def saved(kind: str, folder: Path, lyrics=LINES) -> Path:
    path = folder / f"a.{kind}"
    drain(encode.save(SOUND, path, kind, None, Tags("a", "m", "MIT", lyrics=lyrics)))
    return path


def test_lrc_has_a_stamp_a_line_rounded_to_hundredths():
    assert lyric_files.lrc(LINES) == (
        "[00:01.20]Streetlights hum\n[01:00.00]夜の街を 歩く\n[01:01.50]not sung\n[62:05.25]𝄞 slow\n"
    )


def test_srt_numbers_the_lines_that_can_be_shown():
    assert lyric_files.srt(LINES) == (
        "1\n00:00:01,200 --> 00:00:03,456\nStreetlights hum\n\n"
        "2\n00:00:59,996 --> 00:01:01,500\n夜の街を 歩く\n\n"
        "3\n01:02:05,250 --> 01:02:06,000\n𝄞 slow\n\n"
    )


def test_mp3_holds_every_line_with_its_time_in_sylt_and_the_text_in_uslt(tmp_path):
    frames = id3_frames(saved("mp3", tmp_path))
    sylt = frames["SYLT"]
    assert sylt[:6] == b"\1XXX\2\1"  # UTF-16, unknown language, milliseconds, lyrics
    name, rest = read_wide(sylt[6:])
    assert name == ""
    read = []
    while rest:
        text, rest = read_wide(rest)
        read.append((text, int.from_bytes(rest[:4], "big")))
        rest = rest[4:]
    assert read == [
        ("Streetlights hum", 1200),
        ("夜の街を 歩く", 59996),
        ("not sung", 61500),
        ("𝄞 slow", 3725250),
    ]
    uslt = frames["USLT"]
    assert uslt[:4] == b"\1XXX"
    name, rest = read_wide(uslt[4:])
    assert name == ""
    assert rest.decode("utf-16") == "\n".join(text for text, _ in read)


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="no ffprobe on this computer")
def test_ffprobe_shows_the_lyrics(tmp_path):
    show = ["ffprobe", "-v", "error", "-show_entries", "format_tags", "-of", "default=nk=0:nw=1"]
    for kind, name in (("flac", "LYRICS"), ("mp3", "lyrics-XXX")):
        path = saved(kind, tmp_path)
        shown = subprocess.run([*show, path], capture_output=True, text=True, check=True).stdout
        assert f"TAG:{name}=" in shown
        assert "Streetlights hum" in shown


@pytest.mark.parametrize("kind", ["flac", "mp3", "wav"])
def test_the_sound_and_the_other_tags_stay_readable(kind, tmp_path):
    import av

    with av.open(str(saved(kind, tmp_path))) as container:
        found = {name.lower(): text for name, text in container.metadata.items()}
        assert sum(frame.samples for frame in container.decode(audio=0)) >= SOUND.shape[1]
    assert found["title"] == "a"
    expected = {"flac": "[00:01.20]Streetlights hum", "mp3": "Streetlights hum", "wav": ""}
    lyrics = next((text for name, text in found.items() if name.startswith("lyrics")), "")
    assert lyrics.split("\n")[0] == expected[kind]


@pytest.mark.parametrize("kind", ["flac", "mp3"])
def test_a_song_without_times_has_no_such_tags(kind, tmp_path):
    data = saved(kind, tmp_path, ()).read_bytes()
    assert not any(name in data for name in (b"SYLT", b"USLT", b"LYRICS"))
