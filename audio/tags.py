"""TODO"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal, get_args

if TYPE_CHECKING:
    pass


Kind = Literal["wav", "flac", "mp3"]


STUDIO = "ACE Music Studio"


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


def _plain(tags: Tags) -> Tags:
    """`tags` as a file can hold them."""
    return Tags(
        _line(tags.title) or "Untitled", _line(tags.model), _line(tags.licence), tags.ai_generated
    )


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


SONGWRITERS = dict(zip(get_args(Kind), (_wav, _flac, _mp3), strict=True))


SCHEMA, VERSION = "ace-music-studio", 1
"""The first key of all settings, and its value. A new field of `Take` has a default, or this grows:
version 1 stays readable."""


KEY, CHUNK = "ACE_SETTINGS", b"aces"
"""Under what name settings stand: of a Vorbis comment or a TXXX frame, and of a RIFF chunk."""


COMMENTS = 4
"""The type of a FLAC block that holds Vorbis comments."""


SETTINGS_LIMIT = 1 << 20
"""Bytes of JSON. The longest lyrics with 1200 codes of a planner make a tenth of it."""


READ_LIMIT, PARTS_LIMIT = 8 << 20, 20_000
"""How many bytes and how many parts of a file are looked at before it is refused."""


class _Refused(ValueError):
    """What is wrong with settings that are there, as the clause of a sentence."""


class _Reader:
    """An open file that gives out no more than the limits, and never looks at a sound."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes_left, self.parts_left = file, READ_LIMIT, PARTS_LIMIT

    def head(self, size: int) -> bytes:
        """The beginning of a part; empty where the file has no more of them."""
        self.parts_left -= 1
        if self.parts_left < 0:
            raise _Refused("the file has too many parts")
        self.bytes_left -= size
        head = self.file.read(size)
        return head if len(head) == size else b""

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > self.bytes_left:
            raise _Refused("the file is too big to look through")
        self.bytes_left -= size
        taken = self.file.read(size)
        if len(taken) < size:
            raise _Refused("the file is cut off")
        return taken

    def skip(self, size: int) -> None:
        self.file.seek(size, os.SEEK_CUR)


def _found(file: BinaryIO) -> bytes | None:
    """The raw settings of a file of any kind; None where there are none."""
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
        raise _Refused("the file holds them more than once")
    if found and len(found[0]) > SETTINGS_LIMIT:
        raise _Refused("they are too long")
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
    """Vorbis comments: the encoder's name, how many, and each with its length in front."""
    ours = f"{KEY}=".encode()

    def length() -> int:
        nonlocal size
        told = int.from_bytes(reader.head(4), "little")
        size -= 4 + told
        if size < 0:
            raise _Refused("the tags of the file are damaged")
        return told

    reader.skip(length())
    size -= 4
    for _ in range(int.from_bytes(reader.head(4), "little")):
        told = length()
        # Only what can be a name is looked at before it is known to be ours.
        name = reader.take(min(told, len(ours)))
        told -= len(name)
        if name.upper() == ours:
            yield reader.take(told)
        else:
            reader.skip(told)
    reader.skip(size)


def _in_id3(reader: _Reader) -> Iterator[bytes]:
    """ID3v2.3 and 2.4, as ours or as another program wrote it anew; leaves the reader behind it."""
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
    """28 bits in four bytes, as ID3 counts."""
    size = 0
    for byte in raw:
        size = size << 7 | byte & 127
    return size


def _text(body: bytes, flags: int, version: int) -> str:
    """A text frame's text; empty if it is packed or locked, as no settings of ours are."""
    if flags & (0x4C if version == 4 else 0xE0) or not body:
        return ""
    if version == 4:
        body = body[4:] if flags & 1 else body
        body = body.replace(b"\xff\0", b"\xff") if flags & 2 else body
    encoding = dict(enumerate(("latin-1", "utf-16", "utf-16-be", "utf-8"))).get(body[0])
    return body[1:].decode(encoding, "replace").lstrip("\ufeff") if encoding else ""
