"""The tags of a person's own recording, as every format holds them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from conftest import drain
from scipy.io import wavfile

from audio import encode
from audio.tags import FIELDS, Kind, Tags, add_tags_to_wav, cleaned
from core.requests import SAMPLE_RATE

SOUND = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 4801)).astype(np.float32)
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
)
RECORDING = {
    "artist": "Zoë & 友達",
    "album": "Früh",
    "album_artist": "Various",
    "composer": "Y. Z.",
    "genre": "Waltz",
    "date": "2019-05-17",
    "track": "3/12",
    "disc": "1",
    "publisher": "My Label",
    "copyright": "2019 Zoë",
}
MINE = Tags("Мой вальс", ai_generated=False, recording=RECORDING, comment="Live.", cover=PNG)


def read_by_ffmpeg(path: Path) -> tuple[dict[str, str], bytes]:
    """All tags by lower-case name, and the attached picture."""
    import av

    with av.open(str(path)) as container:
        found = {name.lower(): text for name, text in container.metadata.items()}
        picture = b""
        for stream in container.streams.video:
            picture = next(bytes(packet) for packet in container.demux(stream))
    return found, picture


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_recordings_tags_dates_and_cover_art_are_written(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    drain(encode.save(SOUND, path, kind, None, MINE))
    found, picture = read_by_ffmpeg(path)
    assert {name: found.get(name) for name in RECORDING} == RECORDING
    assert found["title"] == MINE.title
    assert found["comment"] == "Live."
    assert picture == PNG
    assert not found.keys() & {"model", "model_licence", "ai_generated"}
    assert b"AI-generated" not in path.read_bytes()


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_recording_without_tags_names_no_model_and_has_no_empty_comment(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    drain(encode.save(SOUND, path, kind, None, Tags("a", ai_generated=False)))
    found, _ = read_by_ffmpeg(path)
    assert found.keys() <= {"title", "encoder"}


def test_a_claim_of_ai_follows_the_persons_own_comment():
    assert Tags("a", comment="Live.").line() == "Live. AI-generated."
    assert Tags("a", "m", "MIT", comment="Mine.").line() == (
        "Mine. AI-generated. Made with ACE Music Studio and m (licence: MIT)."
    )


@pytest.mark.filterwarnings("ignore:Chunk")
def test_the_same_tags_stand_in_a_wav_that_was_written_by_another_library(tmp_path):
    """Stems are WAVs of 32-bit floats."""
    path = tmp_path / "stem.wav"
    wavfile.write(path, SAMPLE_RATE, np.ascontiguousarray(SOUND.T))
    add_tags_to_wav(path, MINE)
    found, picture = read_by_ffmpeg(path)
    assert {name: found.get(name) for name in RECORDING} == RECORDING
    assert picture == PNG
    assert int.from_bytes(path.read_bytes()[4:8], "little") == path.stat().st_size - 8
    assert np.array_equal(wavfile.read(path)[1].T, SOUND)
    (tmp_path / "text").write_bytes(b"la la la la la")
    with pytest.raises(ValueError, match="WAV"):
        add_tags_to_wav(tmp_path / "text", MINE)


def test_texts_are_lines_and_covers_are_pictures():
    odd = Tags(
        "",
        recording={"artist": "a\nb\0c", "album": " \t", "unknown": "x", "genre": "क्‍ष"},
        comment="x" * 5000,
        cover=b"GIF89a",
    )
    clean = cleaned(odd)
    assert clean.title == "Untitled"
    assert clean.recording == {"artist": "a b c", "genre": "क्‍ष"}
    assert len(clean.comment) == 2000
    assert clean.cover == b""


@pytest.mark.parametrize("date", ["2019", "2019-05", "May 2019", "2019-05-17"])
def test_dates_of_any_kind_survive_as_far_as_mp3_can_hold_them(date, tmp_path):
    tags = Tags("a", ai_generated=False, recording={"date": date})
    for kind in get_args(Kind):
        path = tmp_path / f"a.{kind}"
        drain(encode.save(SOUND, path, kind, None, tags))
        found, _ = read_by_ffmpeg(path)
        expected = "2019" if (kind, date) == ("mp3", "2019-05") else date
        assert found["date"] == expected


def test_every_field_has_a_name_in_flac_and_mp3():
    for names in FIELDS.values():
        assert names.vorbis
        assert len(names.id3) == 4
        assert len(names.info) in (0, 4)
