"""Decides the tags of a file that is made from another: a recording keeps its own.

A file that the studio made names its model and says that it is AI-generated; its settings are the
proof. Any other file is a person's own recording: title, artist, album, dates, cover art and the
rest of `tags.FIELDS` are carried over, no model is named, and AI is claimed only where the person
asks for it or the file's own tags already do.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audio import decode
from audio.tags import AI_GENERATED, COVER_BYTES, FIELDS, STUDIO, Tags, picture_type
from core.errors import StudioError
from core.results import LyricLine

log = logging.getLogger(__name__)

TITLE_CHARACTERS = 60
"""How much of a style becomes a title."""

ALIASES = {
    "year": "date",
    "tyer": "date",
    "tsrc": "isrc",
    "tory": "original_date",
    "tdor": "original_date",
    "originaldate": "original_date",
    "originalyear": "original_date",
    "albumartist": "album_artist",
    "tracknumber": "track",
    "discnumber": "disc",
    "label": "publisher",
    "description": "comment",
}
"""Spellings of formats and programs, and FFmpeg's name of the same field."""


def tags_for(
    source: Path,
    settings: Mapping[str, Any] | None,
    folder: Path,
    ai_generated: bool | None = None,
) -> tuple[Tags, tuple[str, ...]]:
    """The tags of a file made from `source`, and notes on what could not be carried over.

    Args:
        settings: those inside `source` (`settings.usable_settings`), None where there are none.
        folder: private, for the result of the child process that reads the tags.
        ai_generated: what the person asked for, None where they said nothing. Of a request:
            `request.ai_generated if "ai_generated" in request.model_fields_set else None`.
    """
    found, notes = _carried_over(source, folder)
    fields, cover = found.fields, found.cover
    comment = fields.get("comment", "")
    recording = {name: fields[name] for name in FIELDS if name in fields}
    title = fields.get("title", "")
    if settings is not None:
        model = settings["model"]
        title = title or title_of(settings["request"].get("prompt", "")) or source.stem
        return Tags(
            title,
            model["name"],
            model["licence"],
            ai_generated is not False,
            recording,
            _own_comment(comment),
            cover,
            lyrics_in(settings),
        ), notes
    claimed = fields.get("ai_generated", "").lower() in ("yes", "true", "1")
    claimed = claimed or comment.startswith(AI_GENERATED)
    generated = claimed if ai_generated is None else ai_generated
    # A file of the studio that lost its settings still says who made it.
    named = re.search(rf"Made with {STUDIO} and (.+) \(licence: (.+?)\)\.$", comment)
    model, licence = named.groups() if named else ("", "")
    comment = _own_comment(comment).removeprefix(AI_GENERATED).strip()
    tags = Tags(title or source.stem, model, licence, generated, recording, comment, cover)
    return tags, notes


def lyrics_in(settings: Mapping[str, Any]) -> tuple[LyricLine, ...]:
    """The lines of a song with their times, from its settings."""
    return tuple(map(LyricLine.model_validate, settings.get("lyric_times", ())))


def _own_comment(comment: str) -> str:
    """What is left of a comment without the studio's own line."""
    before, found, _ = comment.partition(f"Made with {STUDIO}")
    return (before if found else comment).strip().removesuffix(AI_GENERATED).strip()


def title_of(style: str) -> str:
    """The first words of a style, as a title."""
    words = " ".join(style.split())
    if len(words) <= TITLE_CHARACTERS:
        return words
    return words[:TITLE_CHARACTERS].rpartition(" ")[0] or words[:TITLE_CHARACTERS]


def _carried_over(source: Path, folder: Path) -> tuple[decode.FileMetadata, tuple[str, ...]]:
    """The tags of `source` by FFmpeg's names; none, and a note, where they cannot be read."""
    try:
        found = decode.read_metadata(source, folder)
    except StudioError as error:
        log.warning("The tags of a file could not be read: %s", error)
        return decode.FileMetadata(), ("The tags of the file could not be read and were left out.",)
    fields = {}
    for name, text in found.fields.items():
        fields.setdefault(ALIASES.get(name, name), text)
    cover, notes = found.cover, ()
    if cover and not picture_type(cover):
        cover, notes = b"", ("The cover art was left out: it is neither a JPEG nor a PNG.",)
    elif len(cover) > COVER_BYTES:
        largest = COVER_BYTES >> 20
        cover, notes = b"", (f"The cover art was left out: it is larger than {largest} MB.",)
    return decode.FileMetadata(fields, cover), notes
