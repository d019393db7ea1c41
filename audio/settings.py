"""The settings inside a file: the request that makes its song again, as JSON, written and checked.

A file may come from anywhere and claim anything: what is read is validated field by field, and no
path in it is used.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

from audio import decode
from audio.tags import SCHEMA, SETTINGS_LIMIT, VERSION, UnusableSettings, read_embedded
from core.errors import StudioError
from core.params import AdapterRef
from core.requests import SONGS, Master, Request
from core.results import AdapterUsed, Take
from core.text import printable

MOST_MASTERS = 8
"""How many masterings of a file's sound are kept."""

DEEPEST = 16
"""Deepest nesting that is accepted. The studio's own settings reach 4."""


def settings_of(take: Take) -> dict[str, Any]:
    """Everything that makes `take` again, with no path of this computer in it.

    Input files are recorded by name, under "names"; their hashes are in the take's "files". The
    adapters that were applied are under "adapters"; "mastered" lists what was done to the take's
    sound before it was written.
    """
    recorded = take.model_dump(mode="json", exclude={"path"})
    for field in _fields(take.mode, AdapterRef):
        recorded["request"].pop(field, None)
    names = {}
    for field in _fields(take.mode, Path):
        if path := recorded["request"].pop(field, None):
            names[field] = _file_name(path)
    recorded["model"]["source"] = _hub_id_or_name(take.model.source)
    return {SCHEMA: VERSION, **recorded, "names": names, "mastered": []}


def with_mastering(settings: dict[str, Any], request: Master) -> dict[str, Any]:
    """`settings` with the mastering that `request` does recorded at the end."""
    done = {"target_lufs": request.target_lufs, "ceiling_dbtp": request.ceiling_dbtp}
    return {**settings, "mastered": [*settings["mastered"], done][-MOST_MASTERS:]}


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a WAV, FLAC or MP3, or in a JSON file that lay beside one.

    Returns:
        What `settings_of` made, validated: every field has the type that `Take` gives it and the
        request is one that its mode accepts. None where a file holds no settings. Nothing proves
        what `plan`, `codes` and the hashes say.

    Raises:
        StudioError: `settings-unreadable`, or `source-missing` and `source-unreadable` where there
            is no regular file.
    """
    path = Path(path)
    name = decode.display_name(path)
    with decode.open_regular_file(path, name) as file:
        try:
            found = read_embedded(file)
            return None if found is None else _checked(_parsed(found))
        except ValueError as error:
            problem = str(error) if isinstance(error, UnusableSettings) else "they are damaged"
            raise StudioError("settings-unreadable", name=name, problem=problem) from error


def usable_settings(path: Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The settings in a file, or None and a note where they cannot be used.

    For work that needs only the sound: unusable settings never stop it.

    Raises:
        StudioError: `source-missing` or `source-unreadable`, where there is no regular file.
    """
    try:
        return read_settings(path), ()
    except StudioError as error:
        if error.code != "settings-unreadable":
            raise
        problem = error.facts["problem"]
        return None, (f"The settings in the file cannot be used and were left out: {problem}.",)


def request_of(settings: dict[str, Any], **given: Any) -> Request:
    """The request that is recorded in `settings`, with the fields `given` replaced.

    Raises:
        StudioError: `settings-need-file` where a file went in and is not given,
            `settings-need-adapter` where adapters were applied and none are given; or what the
            request's mode says of the values given.
    """
    mode = SONGS[settings["mode"]]
    if settings["adapters"] and "adapters" not in given:
        names = ", ".join(adapter["name"] for adapter in settings["adapters"])
        raise StudioError("settings-need-adapter", names=names)
    for param in mode.params():
        if param.name in settings["names"] and param.name not in given:
            name = settings["names"][param.name]
            raise StudioError("settings-need-file", name=name, label=param.label)
    return mode.stored({**settings["request"], **given})


def to_json(settings: dict[str, Any]) -> bytes:
    """`settings` as ASCII, whatever language the lyrics are in: every format and tool keeps that.

    Raises:
        ValueError: they are not JSON, or too long.
    """
    text = json.dumps(settings, allow_nan=False, separators=(",", ":")).encode("ascii")
    if len(text) > SETTINGS_LIMIT:
        raise ValueError(f"settings of {len(text)} bytes, and {SETTINGS_LIMIT} fit")
    return text


def _file_name(path: str) -> str:
    """The last part of a path of any operating system."""
    return printable(re.split(r"[/\\]", path)[-1])


def _hub_id_or_name(source: str) -> str:
    """A hub id as it is; of a folder on somebody's disk only its name."""
    return source if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) else _file_name(source)


def _fields(mode: str, kind: type) -> list[str]:
    return [param.name for param in SONGS[mode].params() if param.type is kind]


def _parsed(raw: bytes) -> dict[str, Any]:
    text = raw.decode("utf-8-sig")
    plain = re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)
    levels = accumulate((c in "[{") - (c in "]}") for c in plain)
    if max(levels, default=0) > DEEPEST:
        raise UnusableSettings("they are nested too deep")
    parsed = json.loads(text, object_pairs_hook=_once)
    # Infinities, and halves of characters, which no song of ours has.
    json.dumps(parsed, allow_nan=False, ensure_ascii=False).encode()
    if not isinstance(parsed, dict):
        raise UnusableSettings("they are no settings of this studio")
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        raise UnusableSettings("they say something twice")
    return parsed


def _checked(parsed: dict[str, Any]) -> dict[str, Any]:
    """`parsed` if it is what `settings_of` makes, rebuilt without anything that could be a path."""
    version = parsed.get(SCHEMA)
    if type(version) is not int or version < 1:
        raise UnusableSettings("they are no settings of this studio")
    if version > VERSION:
        raise UnusableSettings("a newer studio wrote them")
    mode = parsed.get("mode")
    if not isinstance(mode, str) or mode not in SONGS:
        raise UnusableSettings(f"the studio has no mode called {printable(str(mode))!r}")
    try:
        take = Take.model_validate({**parsed, "path": ""})
        adapters = tuple(_checked_adapter(adapter) for adapter in take.adapters)
    except ValueError as error:
        raise UnusableSettings("they are not complete, or not of this studio") from error
    names = parsed.get("names", {})
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UnusableSettings("they are no settings of this studio")
    fields = _fields(mode, Path)
    names = {field: _file_name(names[field]) for field in fields if field in names}
    given = {
        k: v for k, v in take.request.items() if k not in (*fields, *_fields(mode, AdapterRef))
    }
    try:
        request = SONGS[mode].stored({**given, **dict.fromkeys(names, "a file")})
    except StudioError as error:
        raise UnusableSettings(error.message.removesuffix(".")) from error
    changes = {"request": request.model_dump(), "adapters": adapters}
    checked = {**settings_of(take.model_copy(update=changes)), "names": names}
    for done in _checked_masters(parsed.get("mastered", [])):
        checked = with_mastering(checked, done)
    return checked


def _checked_masters(parsed: Any) -> list[Master]:
    if not isinstance(parsed, list) or len(parsed) > MOST_MASTERS:
        raise UnusableSettings("they are no settings of this studio")
    try:
        return [Master.of({**done, "source": "a file"}) for done in parsed]
    except (StudioError, TypeError) as error:
        raise UnusableSettings("they tell of a loudness that cannot be") from error


def _checked_adapter(parsed: dict[str, Any]) -> dict[str, Any]:
    used = AdapterUsed.model_validate(parsed)
    return used.model_copy(update={"name": _file_name(used.name)}).model_dump()
