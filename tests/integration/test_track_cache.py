"""Tracks on disk: names, limits, several writers, and a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from core.errors import StudioError
from lofi import track_cache
from lofi.track_cache import TrackCache, track_id

FACTS = {
    "backend": "ace_step",
    "model_version": "mini-1",
    "prompt": "lofi",
    "seed": 7,
    "duration_sec": 5.0,
    "sample_rate": 48000,
    "channels": 2,
}
MANY = 10**9


def name(number: int) -> str:
    return f"{number:016x}"


def put(kept: TrackCache, number: int, size: int = 1000, keep=()):
    track = name(number)
    return kept.publish(track, kept.stage(track, os.urandom(size)), FACTS, keep)


def here(kept: TrackCache) -> list[int]:
    return sorted(int(p.stem, 16) for p in kept.folder.glob("*.wav"))


def test_a_name_is_made_of_all_that_decides_the_sound_and_seven_is_seven():
    values = ["ace_step", "mini-1", "lofi \u00fc", 7, 30, [16, "euler", 7.0]]
    one = track_id(*values)
    text = '[1,"ace_step","mini-1","lofi \u00fc",7,30,16,"euler",7]'
    assert one == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert track_id(*values[:5], [16, "euler", 7]) == one
    others = [
        [*values[:i], other, *values[i + 1 :]]
        for i, other in enumerate(
            ["musicgen", "mini-2", "lofi", 8, 31, [16, "heun", 7.0]],
        )
    ]
    assert len({one, *(track_id(*other) for other in others)}) == 7


def test_a_track_is_found_with_its_facts_as_long_as_it_is_whole(tmp_path):
    kept = TrackCache(tmp_path / "new" / "tracks", MANY)
    assert kept.find(name(1)) is None
    assert not kept.folder.exists()
    facts = put(kept, 1)
    sound = kept.path(name(1)).read_bytes()
    assert facts["sha256"] == hashlib.sha256(sound).hexdigest()
    assert kept.find(name(1), use=False) == facts
    used = kept.find(name(1))
    assert used["last_used"] > facts["last_used"]
    assert used["created_at"] == facts["created_at"]
    assert kept.find(name(1), use=False) == used
    kept.path(name(1)).write_bytes(sound[:-1])
    assert kept.find(name(1)) is None
    assert {p.name for p in kept.folder.iterdir()} == {".lock"}


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "7", "null", '{"track_id": "x"}', "\xff", "[" * 9]
)
def test_what_is_no_sidecar_is_removed_with_its_sound(tmp_path, text):
    kept = TrackCache(tmp_path, MANY)
    put(kept, 1)
    (tmp_path / f"{name(1)}.json").write_text(text, "latin-1")
    assert kept.find(name(1)) is None
    assert here(kept) == []


def test_a_sidecar_of_another_track_or_without_its_sound_is_none(tmp_path):
    kept = TrackCache(tmp_path, MANY)
    put(kept, 1)
    (tmp_path / f"{name(2)}.json").write_bytes((tmp_path / f"{name(1)}.json").read_bytes())
    (tmp_path / f"{name(2)}.wav").write_bytes((tmp_path / f"{name(1)}.wav").read_bytes())
    assert kept.find(name(2)) is None
    (tmp_path / f"{name(1)}.wav").unlink()
    assert kept.find(name(1)) is None
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("bad", ["../x", "..", "", "x" * 16, name(1).upper() + "G", "/" + name(1)])
def test_no_name_leads_out_of_the_folder(tmp_path, bad):
    for suffix in ("wav", "json"):
        (tmp_path / f"x.{suffix}").write_text("mine")
    assert TrackCache(tmp_path / "tracks", MANY).find(bad) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_the_least_recently_used_makes_room(tmp_path):
    kept = TrackCache(tmp_path, 3500)
    for number in (1, 2, 3):
        put(kept, number)
    kept.find(name(1))
    put(kept, 4)
    assert here(kept) == [1, 3, 4]
    put(kept, 5, keep={name(3)})
    assert here(kept) == [3, 4, 5]
    put(kept, 6, size=9000)
    assert here(kept) == [6]
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_so_many_tracks_and_no_more(tmp_path):
    kept = TrackCache(tmp_path, MANY, max_tracks=2)
    for number in range(5):
        put(kept, number)
    assert here(kept) == [3, 4]


def test_the_first_of_two_stays_and_leftovers_go_when_they_are_old(tmp_path):
    kept = TrackCache(tmp_path, MANY)
    first = put(kept, 1)
    assert put(kept, 1) == first
    old, young = tmp_path / f".{name(2)}.1.wav.part", tmp_path / f".{name(3)}.1.wav.part"
    foreign = tmp_path / "mine.wav"
    for path in (old, young, foreign, kept.path(name(4))):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    put(kept, 5)
    assert [p.exists() for p in (old, young, foreign, kept.path(name(4)))] == [0, 1, 1, 0]


def test_a_disk_that_takes_nothing_is_named_and_nothing_of_the_track_stays(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudioError, match="cannot be written"):
        TrackCache(tmp_path / "file" / "tracks", MANY).stage(name(1), b"x")
    kept = TrackCache(tmp_path, MANY)
    staged = kept.stage(name(1), b"x")
    monkeypatch.setattr(
        track_cache.files, "replace_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(StudioError):
        kept.publish(name(1), staged, FACTS)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "file"}


def test_a_lock_that_nobody_gives_up_keeps_nobody_waiting(tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(track_cache, "LOCK_TIMEOUT_S", 0.2)
    kept = TrackCache(tmp_path, MANY)
    put(kept, 1)
    with FileLock(tmp_path / ".lock"):
        began = time.monotonic()
        assert kept.find(name(1))
        assert time.monotonic() - began < 2


WRITER = """
import json, os, random, sys
from pathlib import Path
from lofi.track_cache import TrackCache
kept, facts = TrackCache(Path(sys.argv[1]), 4_000_000), json.loads(sys.argv[2])
for turn in range(10**9):
    if turn == 3:  # however slow the disk, some tracks are complete when the kills begin
        print("writes", flush=True)
    track = f"{random.randrange(12):016x}"
    if turn >= 3 and random.random() < 0.5:
        kept.find(track)
    else:
        sound = os.urandom(random.randrange(1, 1_000_000))
        kept.publish(track, kept.stage(track, sound), facts)
"""


def killed(folder, rounds: int) -> int:
    """Two writers on one folder, both killed `rounds` times; how many tracks were proven whole."""
    kept, proven, chance = TrackCache(folder, MANY), 0, random.Random(7)
    for _ in range(rounds):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(folder), json.dumps(FACTS)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        for writer in writers:
            writer.stdout.readline()
        time.sleep(chance.uniform(0.05, 0.5))
        for writer in writers:
            assert writer.poll() is None
            writer.kill()
            writer.wait()
            writer.stdout.close()
        for number in range(12):
            if facts := kept.find(name(number)):
                sound = kept.path(name(number)).read_bytes()
                assert hashlib.sha256(sound).hexdigest() == facts["sha256"]
                proven += 1
    for part in folder.glob("*.part"):
        os.utime(part, (0, 0))
    put(kept, 99)
    assert not list(folder.glob("*.part"))
    assert {p.stem for p in folder.glob("*.json")} == {p.stem for p in folder.glob("*.wav")}
    json.loads((folder / f"{name(99)}.json").read_text())
    return proven


def test_eight_kills_leave_no_half_track(tmp_path):
    assert killed(tmp_path, 4) > 4


@pytest.mark.long
def test_a_hundred_kills_leave_no_half_track(tmp_path):
    assert killed(tmp_path, 50) > 50
