"""A person's own recording keeps its tags through export, master and stems in a real studio."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from core.requests import EXPORTS
from core.results import ExportedFiles

TAGS = {"title": "Nocturne", "artist": "Alice", "album": "Nights", "date": "1999"}


@pytest.fixture
def recording(tmp_path) -> Path:
    """A FLAC with tags that no studio of ours wrote."""
    time = np.arange(2 * 48_000) / 48_000
    tone = 0.3 * np.sin(2 * np.pi * 220 * time)
    path = tmp_path / "nocturne.flac"
    with soundfile.SoundFile(path, "w", 48_000, 2, format="FLAC") as file:
        for name, text in TAGS.items():
            setattr(file, name, text)
        file.write(np.stack([tone, tone], axis=1))
    return path


def tags_of(path: str) -> dict[str, str]:
    """The tags that FFmpeg reads, in lower case."""
    if not shutil.which("ffprobe") and os.environ.get("ACE_REQUIRE_FFMPEG") != "1":
        pytest.skip("no FFmpeg on this computer")
    command = ["ffprobe", "-v", "quiet", "-of", "json", "-show_format", path]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {name.lower(): text for name, text in found["format"].get("tags", {}).items()}


@pytest.mark.parametrize("mode", ["export", "master"])
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_a_recording_keeps_its_tags_and_is_not_called_ai(studio, recording, mode, kind):
    request = EXPORTS[mode].of({"source": recording, "format": kind})
    made = list(studio.run(request, "v"))[-1]
    assert isinstance(made, ExportedFiles), made
    found = tags_of(made.paths[0])
    kept = {"title": "Nocturne", "artist": "Alice", "album": "Nights"}
    assert {name: found.get(name) for name in kept} == kept
    assert "1999" in found.get("date", "")
    assert "ai" not in found.get("comment", "").lower().split("-")
    assert "model" not in found


def test_a_recording_is_called_ai_where_the_person_asks_for_it(studio, recording):
    request = EXPORTS["export"].of({"source": recording, "format": "mp3", "ai_generated": True})
    made = list(studio.run(request, "v"))[-1]
    assert tags_of(made.paths[0])["ai_generated"] == "yes"
