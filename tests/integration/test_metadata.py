"""Tags of derived files: recordings keep their own, studio files name their model."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from conftest import drain

from audio import decode, encode, metadata
from audio.tags import Kind, Tags
from core.errors import StudioError

SOUND = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 4801)).astype(np.float32)
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + bytes(500)
RECORDING = {"artist": "Zoë", "album": "Früh", "date": "2019-05-17", "track": "3/12"}
MINE = Tags("Мой вальс", ai_generated=False, recording=RECORDING, comment="Live.", cover=JPEG)
SETTINGS = {"model": {"name": "mini", "licence": "MIT"}, "request": {"prompt": "warm piano"}}


def written(path: Path, kind: str, tags: Tags, settings=None) -> Path:
    drain(encode.save(SOUND, path, kind, settings, tags))
    return path


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_recording_keeps_its_tags_and_gets_no_model_or_ai_label(kind, tmp_path):
    source = written(tmp_path / f"song.{kind}", kind, MINE)
    tags, notes = metadata.tags_for(source, None, tmp_path)
    assert (tags, notes) == (MINE, ())


def test_a_recording_gets_the_ai_label_only_on_request(tmp_path):
    source = written(tmp_path / "song.flac", "flac", MINE)
    for requested, labelled in ((None, False), (False, False), (True, True)):
        tags, _ = metadata.tags_for(source, None, tmp_path, requested)
        assert tags.ai_generated is labelled
        assert tags.model == ""
    assert metadata.tags_for(source, None, tmp_path, True)[0].line() == "Live. AI-generated."


def test_a_studio_file_names_its_model_and_keeps_added_tags(tmp_path):
    mixed = Tags("Renamed", "mini", "MIT", recording={"artist": "Me"}, comment="Take 3.")
    source = written(tmp_path / "a.mp3", "mp3", mixed)
    tags, _ = metadata.tags_for(source, SETTINGS, tmp_path)
    assert tags == mixed
    again = written(tmp_path / "b.wav", "wav", tags)
    assert metadata.tags_for(again, SETTINGS, tmp_path)[0] == mixed
    assert not metadata.tags_for(source, SETTINGS, tmp_path, False)[0].ai_generated


def test_a_studio_file_without_a_title_gets_its_style_as_title(tmp_path):
    source = written(tmp_path / "a.wav", "wav", Tags("x"))
    source.write_bytes(source.read_bytes().replace(b"INAM", b"IXXX"))
    assert metadata.tags_for(source, SETTINGS, tmp_path)[0].title == "warm piano"
    assert metadata.tags_for(source, None, tmp_path)[0].title == "a"


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_studio_file_without_settings_keeps_its_ai_label_and_model(kind, tmp_path):
    source = written(tmp_path / f"a.{kind}", kind, Tags("Piano", "mini", "MIT"))
    tags, _ = metadata.tags_for(source, None, tmp_path)
    assert tags.ai_generated
    assert tags.line() == "AI-generated. Made with ACE Music Studio and mini (licence: MIT)."
    assert (tags.model, tags.licence) == ("mini", "MIT")


def test_unreadable_tags_give_a_note_and_no_error(tmp_path, monkeypatch):
    def fail(*_):
        raise StudioError("internal", kind="TypeError")

    source = written(tmp_path / "a.wav", "wav", MINE)
    monkeypatch.setattr(decode, "read_metadata", fail)
    tags, notes = metadata.tags_for(source, None, tmp_path)
    assert tags.title == "a"
    assert not tags.ai_generated
    assert "could not be read" in notes[0]


@pytest.mark.parametrize(
    ("cover", "word"),
    [(b"GIF89a" + bytes(100), "neither"), (JPEG + bytes(16 << 20), "larger than 15 MB")],
)
def test_unsupported_cover_art_is_omitted_with_a_note(cover, word, tmp_path, monkeypatch):
    source = written(tmp_path / "a.wav", "wav", MINE)
    found = decode.FileMetadata({"title": "A"}, cover)
    monkeypatch.setattr(decode, "read_metadata", lambda *_: found)
    tags, notes = metadata.tags_for(source, None, tmp_path)
    assert (tags.title, tags.cover) == ("A", b"")
    assert word in notes[0]


def test_a_title_is_the_first_words_of_the_style():
    assert metadata.title_of(" warm \n piano ") == "warm piano"
    assert metadata.title_of("word " * 30) == ("word " * 12).strip()
    assert metadata.title_of("x" * 99) == "x" * 60
