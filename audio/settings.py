"""Settings: all that makes a song again, as JSON, and found in files that came from anywhere.

Files are read byte by byte and no further than the bounds say: they may claim anything, and no
library with opinions of its own gets to see them.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

from audio import decode
from audio.tags import SCHEMA, SETTINGS_LIMIT, VERSION, _found, _Refused
from core.errors import StudioError
from core.params import AdapterRef
from core.requests import SONGS, Master, Request
from core.results import AdapterUsed, Take

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
    for field in _fields(take.mode, AdapterRef):
        told["request"].pop(field, None)
    names = {}
    for field in _fields(take.mode, Path):
        if brought := told["request"].pop(field, None):
            names[field] = _file_name(brought)
    told["model"]["source"] = _place_on_the_hub(take.model.source)
    return {SCHEMA: VERSION, **told, "names": names, "mastered": []}


def with_mastering(settings: dict[str, Any], request: Master) -> dict[str, Any]:
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
            is no regular file.
    """
    path = Path(path)
    name = _shown(path.name)
    with decode.open_regular_file(path, name) as file:
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
    for param in mode.params():
        if param.name in settings["names"] and param.name not in given:
            name = settings["names"][param.name]
            raise StudioError("settings-need-file", name=name, label=param.label)
    return mode.stored({**settings["request"], **given})


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
    return [param.name for param in SONGS[mode].params() if param.type is kind]


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
    given = {
        k: v for k, v in take.request.items() if k not in (*fields, *_fields(mode, AdapterRef))
    }
    try:
        request = SONGS[mode].stored({**given, **dict.fromkeys(names, "a file")})
    except StudioError as error:
        raise _Refused(error.message.removesuffix(".")) from error
    changes = {"request": request.model_dump(), "adapters": adapters}
    checked = {**settings_of(take.model_copy(update=changes)), "names": names}
    for done in _checked_masters(told.get("mastered", [])):
        checked = with_mastering(checked, done)
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
