"""Settings: all that makes a song again, as JSON, and found in files that came from anywhere.

Files are read byte by byte and no further than the bounds say: they may claim anything, and no
library with opinions of its own gets to see them.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import decoding
from errors import StudioError
from finishing import Master
from knobs import Worn
from song import SONGS, Request, Take
from stack import AdapterUsed

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

MOST_MASTERS = 8
"""How often the sound of a file may have been mastered."""

DEEPEST = 16
"""Lists within lists. Settings of ours reach 4."""


def settings_of(take: Take) -> dict[str, Any]:
    """Everything that makes `take` again, and no path of this computer.

    Files that went in are told by name, under "names"; their hashes are in the take's "files".
    Of adapters those are told that played, under "adapters"; under "mastered", what was done with
    the take's sound before it came into its file.
    """
    told = take.model_dump(mode="json", exclude={"path"})
    for field in _fields(take.mode, Worn):
        told["request"].pop(field, None)
    names = {}
    for field in _fields(take.mode, Path):
        if brought := told["request"].pop(field, None):
            names[field] = _file_name(brought)
    told["model"]["source"] = _place_on_the_hub(take.model.source)
    return {SCHEMA: VERSION, **told, "names": names, "mastered": []}


def mastered(settings: dict[str, Any], request: Master) -> dict[str, Any]:
    """`settings` for the sound that `request` makes of theirs."""
    done = {"target_lufs": request.target_lufs, "ceiling_dbtp": request.ceiling_dbtp}
    return {**settings, "mastered": [*settings["mastered"], done][-MOST_MASTERS:]}


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a WAV, FLAC or MP3, or in a JSON file that lay beside one.

    Returns:
        What `settings_of` made, checked: every field has the type that `Take` gives it and the
        request is one that its mode accepts. None where a file holds no settings. What `plan`,
        `codes` and the hashes say is anybody's claim still.

    Raises:
        StudioError: `settings-unreadable`, or `source-missing` and `source-unreadable` where there
            is no ordinary file.
    """
    path = Path(path)
    name = _shown(path.name)
    with decoding.ordinary(path, name) as file:
        try:
            found = _found(file)
            return None if found is None else _checked(_parsed(found))
        except ValueError as error:
            problem = str(error) if isinstance(error, _Refused) else "they are damaged"
            raise StudioError("settings-unreadable", name=name, problem=problem) from error


def request_of(settings: dict[str, Any], **given: Any) -> Request:
    """The request that `settings` of `read_settings` tell of, with fields `given` anew.

    Raises:
        StudioError: `settings-need-file` where a file went in and is not given,
            `settings-need-adapter` where adapters played and nothing is said of them; or what the
            request's mode says of the values given.
    """
    mode = SONGS[settings["mode"]]
    if settings["adapters"] and "adapters" not in given:
        names = ", ".join(adapter["name"] for adapter in settings["adapters"])
        raise StudioError("settings-need-adapter", names=names)
    for knob in mode.knobs():
        if knob.name in settings["names"] and knob.name not in given:
            name = settings["names"][knob.name]
            raise StudioError("settings-need-file", name=name, label=knob.label)
    return mode.of({**settings["request"], **given})


def as_text(settings: dict[str, Any]) -> bytes:
    """ASCII, whatever language the lyrics are in: every format and every tool keeps that."""
    text = json.dumps(settings, allow_nan=False, separators=(",", ":")).encode("ascii")
    if len(text) > SETTINGS_LIMIT:
        raise ValueError(f"settings of {len(text)} bytes, and {SETTINGS_LIMIT} fit")
    return text


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)[-80:]


def _file_name(path: str) -> str:
    """The last part of a path of any system."""
    return _shown(re.split(r"[/\\]", path)[-1])


def _place_on_the_hub(source: str) -> str:
    """A hub id stays as it is; of a folder on somebody's disk only its name is told."""
    return source if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) else _file_name(source)


def _fields(mode: str, kind: type) -> list[str]:
    return [knob.name for knob in SONGS[mode].knobs() if knob.type is kind]


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


def _parsed(raw: bytes) -> dict[str, Any]:
    text = raw.decode("utf-8-sig")
    plain = re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)
    levels = accumulate((c in "[{") - (c in "]}") for c in plain)
    if max(levels, default=0) > DEEPEST:
        raise _Refused("they are nested too deep")
    told = json.loads(text, object_pairs_hook=_once)
    # Infinities, and halves of characters, which no song of ours has.
    json.dumps(told, allow_nan=False, ensure_ascii=False).encode()
    if not isinstance(told, dict):
        raise _Refused("they are no settings of this studio")
    return told


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) < len(pairs):
        raise _Refused("they say something twice")
    return told


def _checked(told: dict[str, Any]) -> dict[str, Any]:
    """`told` if it is what `settings_of` makes, with nothing in it that could name a file."""
    version = told.get(SCHEMA)
    if type(version) is not int or version < 1:
        raise _Refused("they are no settings of this studio")
    if version > VERSION:
        raise _Refused("a newer studio wrote them")
    mode = told.get("mode")
    if not isinstance(mode, str) or mode not in SONGS:
        raise _Refused(f"the studio has no mode called {_shown(str(mode))!r}")
    try:
        take = Take.model_validate({**told, "path": ""})
        adapters = tuple(_checked_adapter(adapter) for adapter in take.adapters)
    except ValueError as error:
        raise _Refused("they are not complete, or not of this studio") from error
    names = told.get("names", {})
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise _Refused("they are no settings of this studio")
    fields = _fields(mode, Path)
    names = {field: _file_name(names[field]) for field in fields if field in names}
    given = {k: v for k, v in take.request.items() if k not in (*fields, *_fields(mode, Worn))}
    try:
        request = SONGS[mode].of({**given, **dict.fromkeys(names, "a file")})
    except StudioError as error:
        raise _Refused(error.message.removesuffix(".")) from error
    changes = {"request": request.model_dump(), "adapters": adapters}
    checked = {**settings_of(take.model_copy(update=changes)), "names": names}
    for done in _checked_masters(told.get("mastered", [])):
        checked = mastered(checked, done)
    return checked


def _checked_masters(told: Any) -> list[Master]:
    if not isinstance(told, list) or len(told) > MOST_MASTERS:
        raise _Refused("they are no settings of this studio")
    try:
        return [Master.of({**done, "source": "a file"}) for done in told]
    except (StudioError, TypeError) as error:
        raise _Refused("they tell of a loudness that cannot be") from error


def _checked_adapter(told: dict[str, Any]) -> dict[str, Any]:
    used = AdapterUsed.model_validate(told)
    return used.model_copy(update={"name": _file_name(used.name)}).model_dump()
