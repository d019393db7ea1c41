"""Reads and writes the tags of WAV (RIFF), FLAC (Vorbis comments) and MP3 (ID3v2) byte by byte.

Written: what players show, the cover art, and the settings that make a song again. Read: only the
settings, from files that may claim anything, and no further than the limits say.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, get_args

from audio.lyric_files import lrc, text_of
from core.results import LyricLine
from core.text import one_line

Kind = Literal["wav", "flac", "mp3"]

STUDIO = "ACE Music Studio"

AI_GENERATED = "AI-generated."
"""What the comment of a generated file begins with."""

TITLE_CHARACTERS, FIELD_CHARACTERS = 200, 2000
"""Longest title that the studio makes, and longest text that it carries over."""

COVER_BYTES = 15 << 20
"""Largest cover art: a FLAC block holds 16 MB."""


class Names(NamedTuple):
    """What one field is called in each format; empty where a format has no place for it."""

    vorbis: str
    id3: bytes
    info: bytes


FIELDS: dict[str, Names] = {
    "artist": Names("ARTIST", b"TPE1", b"IART"),
    "album": Names("ALBUM", b"TALB", b"IPRD"),
    "album_artist": Names("ALBUMARTIST", b"TPE2", b""),
    "composer": Names("COMPOSER", b"TCOM", b""),
    "genre": Names("GENRE", b"TCON", b"IGNR"),
    "date": Names("DATE", b"TYER", b"ICRD"),
    "original_date": Names("ORIGINALDATE", b"TORY", b""),
    "track": Names("TRACKNUMBER", b"TRCK", b"IPRT"),
    "disc": Names("DISCNUMBER", b"TPOS", b""),
    "publisher": Names("PUBLISHER", b"TPUB", b""),
    "copyright": Names("COPYRIGHT", b"TCOP", b"ICOP"),
    "isrc": Names("ISRC", b"TSRC", b""),
    "language": Names("LANGUAGE", b"TLAN", b"ILNG"),
}
"""What a recording keeps beside title, comment and cover art, under FFmpeg's names."""


@dataclass(frozen=True)
class Tags:
    """What players show of a file.

    Attributes:
        model, licence: a model's title and the licence of its weights; empty for a recording that
            no model made.
        ai_generated: whether the file says that it is.
        recording: what a person's own recording says of itself, by the names of `FIELDS`.
        comment: a person's own comment.
        cover: a JPEG or PNG.
        lyrics: the lines of the lyrics with their times. A WAV has no place for them.
    """

    title: str
    model: str = ""
    licence: str = ""
    ai_generated: bool = True
    recording: Mapping[str, str] = field(default_factory=dict)
    comment: str = ""
    cover: bytes = b""
    lyrics: tuple[LyricLine, ...] = ()

    def line(self) -> str:
        """The comment: the person's own, that a model made it, which one, under which licence."""
        parts = [self.comment] if self.comment else []
        parts += [AI_GENERATED] if self.ai_generated else []
        if self.model:
            parts.append(f"Made with {STUDIO} and {self.model} (licence: {self.licence}).")
        return " ".join(parts)

    def fields(self) -> dict[str, str]:
        """What has no place of its own among a format's fields."""
        fields = {"MODEL": self.model, "MODEL_LICENCE": self.licence} if self.model else {}
        return fields | ({"AI_GENERATED": "yes"} if self.ai_generated else {})


def cleaned(tags: Tags) -> Tags:
    """`tags` as a file can hold them: lines of printable text, and no cover of another kind."""
    recording = {name: one_line(text, FIELD_CHARACTERS) for name, text in tags.recording.items()}
    longest = FIELD_CHARACTERS if tags.recording else TITLE_CHARACTERS
    return Tags(
        title=one_line(tags.title, longest) or "Untitled",
        model=one_line(tags.model),
        licence=one_line(tags.licence),
        ai_generated=tags.ai_generated,
        recording={name: text for name, text in recording.items() if text and name in FIELDS},
        comment=one_line(tags.comment, FIELD_CHARACTERS),
        cover=tags.cover if picture_type(tags.cover) and len(tags.cover) <= COVER_BYTES else b"",
        lyrics=tags.lyrics,
    )


def picture_type(data: bytes) -> str:
    """The media type of a JPEG or PNG; empty for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "image/jpeg"
    return "image/png" if data[:8] == b"\x89PNG\r\n\x1a\n" else ""


def _write_wav(encoded: memoryview, settings: bytes, tags: Tags) -> Iterator[bytes | memoryview]:
    """RIFF (Microsoft and IBM, 1991): chunks of even length, INFO and settings after the sound.

    INFO alone cannot hold settings: libsndfile gives up on a field above 4 kB.
    """
    added = wav_chunks(tags) + (_chunk(CHUNK, settings) if settings else b"")
    yield b"RIFF" + (len(encoded) - 8 + len(added)).to_bytes(4, "little")
    yield encoded[8:]
    yield added


def wav_chunks(tags: Tags) -> bytes:
    """The chunks that hold cleaned `tags`: LIST/INFO, and ID3 for what INFO has no place for."""
    info = {b"INAM": tags.title, b"ICMT": tags.line(), b"ISFT": STUDIO}
    info |= {FIELDS[name].info: text for name, text in tags.recording.items()}
    fields = b"".join(
        _chunk(name, text.encode() + b"\0") for name, text in info.items() if name and text
    )
    chunks = _chunk(b"LIST", b"INFO" + fields)
    if tags.cover or any(not FIELDS[name].info for name in tags.recording):
        chunks += _chunk(b"id3 ", _id3(tags))
    return chunks


def add_tags_to_wav(path: Path, tags: Tags) -> None:
    """Append `tags` to a finished WAV that has none, such as a stem.

    Raises:
        OSError: the file cannot be written.
        ValueError: it is no WAV.
    """
    chunks = wav_chunks(cleaned(tags))
    with path.open("r+b") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            raise ValueError("not a WAV")
        size = file.seek(0, os.SEEK_END)
        file.write(b"\0" * (size % 2) + chunks)
        file.seek(4)
        file.write((size + size % 2 - 8 + len(chunks)).to_bytes(4, "little"))


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)


def _write_flac(encoded: memoryview, settings: bytes, tags: Tags) -> Iterator[bytes | memoryview]:
    """RFC 9639, section 8: our comments in place of the encoder's, which only name itself."""
    comments = {"TITLE": tags.title, "COMMENT": tags.line(), "ENCODER": STUDIO, **tags.fields()}
    comments |= {FIELDS[name].vorbis: text for name, text in tags.recording.items()}
    comments |= {"LYRICS": lrc(tags.lyrics)} if tags.lyrics else {}
    entries = [f"{name}={text}".encode() for name, text in comments.items() if text]
    entries += [KEY.encode() + b"=" + settings] if settings else []
    body = _counted(STUDIO.encode()) + len(entries).to_bytes(4, "little")
    body += b"".join(map(_counted, entries))
    kept, at, last = [], 4, False
    while not last:
        head = int.from_bytes(encoded[at : at + 4], "big")
        last, kind, size = bool(head >> 31), head >> 24 & 127, head & 0xFFFFFF
        if kind != COMMENTS:
            kept.append((kind, encoded[at + 4 : at + 4 + size]))
        at += 4 + size
    if tags.cover:
        kept.append((PICTURE, _flac_picture(tags.cover)))
    yield b"fLaC"
    for kind, block in kept:
        yield bytes([kind]) + len(block).to_bytes(3, "big")
        yield block
    yield bytes([COMMENTS | 128]) + len(body).to_bytes(3, "big") + body
    yield encoded[at:]


def _flac_picture(cover: bytes) -> bytes:
    """RFC 9639, section 8.8: a front cover of unknown size and depth."""
    media = picture_type(cover).encode()
    sizes = (FRONT_COVER, len(media)), (0, 0, 0, 0, 0, len(cover))
    before, after = (b"".join(n.to_bytes(4, "big") for n in numbers) for numbers in sizes)
    return before + media + after + cover


def _counted(entry: bytes) -> bytes:
    return len(entry).to_bytes(4, "little") + entry


def _write_mp3(encoded: memoryview, settings: bytes, tags: Tags) -> Iterator[bytes | memoryview]:
    """An ID3 tag in front of the first frame."""
    yield _id3(tags, settings, _id3_lyrics(tags.lyrics) if tags.lyrics else b"")
    yield encoded


def _id3_lyrics(lines: Sequence[LyricLine]) -> bytes:
    """USLT, the text alone, and SYLT, each line with its start in milliseconds (ID3v2.3.0, 4.9 and
    4.10). Their language is "XXX", unknown."""
    language, nameless, end = b"XXX", b"\xff\xfe\0\0", b"\0\0"
    text = "\n".join(map(text_of, lines))
    timed = b"".join(
        _wide(text_of(line))[1:] + end + round(line.start_s * 1000).to_bytes(4, "big")
        for line in lines
    )
    milliseconds, as_lyrics = b"\2", b"\1"
    return _frame(b"USLT", b"\1" + language + nameless + _wide(text)[1:]) + _frame(
        b"SYLT", b"\1" + language + milliseconds + as_lyrics + nameless + timed
    )


def _id3(tags: Tags, settings: bytes = b"", lyrics: bytes = b"") -> bytes:
    """ID3v2.3.0, which more players read than 2.4.

    Args:
        lyrics: whole frames.
    """
    line = tags.line()
    frames = [_frame(b"TIT2", _wide(tags.title)), _frame(b"TSSE", _wide(STUDIO))]
    if line:
        frames.append(_frame(b"COMM", b"\1eng" + _wide("")[1:] + b"\0\0" + _wide(line)[1:]))
    for name, text in tags.recording.items():
        frames += _id3_field(name, text)
    for name, text in tags.fields().items():
        frames.append(_frame(b"TXXX", _wide(name) + b"\0\0" + _wide(text)[1:]))
    if tags.cover:
        media = picture_type(tags.cover).encode()
        head = b"\0" + media + b"\0" + bytes([FRONT_COVER]) + b"\0"
        frames.append(_frame(b"APIC", head + tags.cover))
    if settings:
        frames.append(_frame(b"TXXX", b"\0" + KEY.encode() + b"\0" + settings))
    body = b"".join(frames) + lyrics
    return b"ID3\3\0\0" + bytes(len(body) >> shift & 127 for shift in (21, 14, 7, 0)) + body


def _id3_field(name: str, text: str) -> Iterator[bytes]:
    """The frames of one field. Version 2.3 splits a date into its year and its day and month."""
    if not name.endswith("date"):
        yield _frame(FIELDS[name].id3, _wide(text))
        return
    date = re.match(r"(\d{4})(?:-(\d\d)-(\d\d))?", text)
    if not date:
        yield _frame(b"TXXX", _wide(name.upper()) + b"\0\0" + _wide(text)[1:])
        return
    yield _frame(FIELDS[name].id3, _wide(date[1]))
    if date[2] and name == "date":
        yield _frame(b"TDAT", _wide(date[3] + date[2]))


def _wide(text: str) -> bytes:
    """Encoding 1: UTF-16 with its mark."""
    return b"\1\xff\xfe" + text.encode("utf-16-le", "replace")


def _frame(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "big") + b"\0\0" + body


WRITERS = dict(zip(get_args(Kind), (_write_wav, _write_flac, _write_mp3), strict=True))
"""By kind: the pieces of a file, of its encoded sound, its settings (or b"") and its tags."""


SCHEMA, VERSION = "ace-music-studio", 1
"""The first key of all settings, and its value. A new field of `Take` has a default, or this grows:
version 1 stays readable."""


KEY, CHUNK = "ACE_SETTINGS", b"aces"
"""What settings are called as a Vorbis comment or TXXX frame, and as a RIFF chunk."""


COMMENTS, PICTURE = 4, 6
"""Types of FLAC blocks."""

FRONT_COVER = 3
"""The type of a picture, in FLAC and ID3 alike."""


SETTINGS_LIMIT = 1 << 20
"""Bytes of JSON. The longest lyrics with 1200 codes of a planner make a tenth of it."""


READ_LIMIT, PARTS_LIMIT = 8 << 20, 20_000
"""How many bytes and how many parts of a file are read before it is refused."""


class UnusableSettings(ValueError):
    """What is wrong with settings that are there, as the clause of a sentence."""


class _Reader:
    """An open file that is read no further than the limits allow, and whose sound is skipped."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes_left, self.parts_left = file, READ_LIMIT, PARTS_LIMIT

    def head(self, size: int) -> bytes:
        """The first `size` bytes of the next part; empty at the end of the file."""
        self.parts_left -= 1
        if self.parts_left < 0:
            raise UnusableSettings("the file has too many parts")
        self.bytes_left -= size
        head = self.file.read(size)
        return head if len(head) == size else b""

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > self.bytes_left:
            raise UnusableSettings("the file is too big to look through")
        self.bytes_left -= size
        taken = self.file.read(size)
        if len(taken) < size:
            raise UnusableSettings("the file is cut off")
        return taken

    def skip(self, size: int) -> None:
        self.file.seek(size, os.SEEK_CUR)


def read_embedded(file: BinaryIO) -> bytes | None:
    """The raw settings in a file of any kind; None where there are none.

    Raises:
        UnusableSettings: there are several, they are too long, or the tags are damaged.
    """
    reader = _Reader(file)
    found, magic = [], reader.head(4)
    if magic[:3] == b"ID3":
        file.seek(0)
        found += _in_id3(reader)  # in front of FLAC, too, if somebody's tagger put it there
        magic = reader.head(4)
    if magic == b"RIFF" and reader.head(8)[4:] == b"WAVE":
        found += _in_wav(reader)
    elif magic == b"fLaC":
        found += _in_flac(reader)
    elif magic.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and not found:
        file.seek(0)
        text = file.read(SETTINGS_LIMIT + 1)
        found = [text] if f'"{SCHEMA}"'.encode() in text else []
    if len(found) > 1:
        raise UnusableSettings("the file holds them more than once")
    if found and len(found[0]) > SETTINGS_LIMIT:
        raise UnusableSettings("they are too long")
    return found[0] if found else None


def _in_wav(reader: _Reader) -> Iterator[bytes]:
    while head := reader.head(8):
        size = int.from_bytes(head[4:], "little")
        if head[:4] == CHUNK:
            yield reader.take(size)
        else:
            reader.skip(size)
        reader.skip(size % 2)


def _in_flac(reader: _Reader) -> Iterator[bytes]:
    last = False
    while not last and (head := reader.head(4)):
        last, kind, size = head[0] > 127, head[0] & 127, int.from_bytes(head[1:], "big")
        if kind == COMMENTS:
            yield from _in_comments(reader, size)
        else:
            reader.skip(size)


def _in_comments(reader: _Reader, size: int) -> Iterator[bytes]:
    """Vorbis comments: the encoder's name, their number, and each after its length."""
    ours = f"{KEY}=".encode()

    def length() -> int:
        nonlocal size
        claimed = int.from_bytes(reader.head(4), "little")
        size -= 4 + claimed
        if size < 0:
            raise UnusableSettings("the tags of the file are damaged")
        return claimed

    reader.skip(length())
    size -= 4
    for _ in range(int.from_bytes(reader.head(4), "little")):
        left = length()
        # Only what can be the name is read before it is known to be ours.
        name = reader.take(min(left, len(ours)))
        left -= len(name)
        if name.upper() == ours:
            yield reader.take(left)
        else:
            reader.skip(left)
    reader.skip(size)


def _in_id3(reader: _Reader) -> Iterator[bytes]:
    """ID3v2.3 and 2.4, by the studio or rewritten by another program. Leaves the reader behind it."""
    head = reader.head(10)
    if not head:
        return
    version, flags, size = head[3], head[5], _syncsafe(head[6:])
    end = reader.file.tell() + size
    within = reader
    if version == 3 and flags & 0x80:
        within = _Reader(io.BytesIO(reader.take(size).replace(b"\xff\0", b"\xff")))
    if version in (3, 4):
        number = _syncsafe if version == 4 else lambda raw: int.from_bytes(raw, "big")
        if flags & 0x40:
            extended = number(within.head(4))
            within.skip(extended - 4 if version == 4 else extended)
        while within is not reader or reader.file.tell() + 10 <= end:
            frame = within.head(10)
            if not re.fullmatch(rb"[A-Z0-9]{4}", frame[:4]):
                break
            size = number(frame[4:8])
            if frame[:4] != b"TXXX":
                within.skip(size)
                continue
            text = within.take(size)
            name, _, value = _text(text, frame[9], version).partition("\0")
            if name.upper() == KEY:
                yield value.strip("\ufeff\0").encode()
    reader.file.seek(end)


def _syncsafe(raw: bytes) -> int:
    """A number of 28 bits in four bytes (ID3v2.4, section 6.2)."""
    size = 0
    for byte in raw:
        size = size << 7 | byte & 127
    return size


def _text(body: bytes, flags: int, version: int) -> str:
    """A text frame's text; empty if it is compressed or encrypted, as our settings never are."""
    if flags & (0x4C if version == 4 else 0xE0) or not body:
        return ""
    if version == 4:
        body = body[4:] if flags & 1 else body
        body = body.replace(b"\xff\0", b"\xff") if flags & 2 else body
    encoding = dict(enumerate(("latin-1", "utf-16", "utf-16-be", "utf-8"))).get(body[0])
    return body[1:].decode(encoding, "replace").lstrip("\ufeff") if encoding else ""
