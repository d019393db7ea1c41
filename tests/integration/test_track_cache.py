"""The track cache: ids, limits, concurrent writers and kills at any moment."""

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


def track_name(number: int) -> str:
    return f"{number:016x}"


def put(cache: TrackCache, number: int, size: int = 1000, keep=()):
    track = track_name(number)
    return cache.publish(track, cache.stage(track, os.urandom(size)), FACTS, keep)


def cached(cache: TrackCache) -> list[int]:
    return sorted(int(p.stem, 16) for p in cache.folder.glob("*.wav"))


def test_track_id_hashes_every_parameter_and_7_equals_7_0():
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


def test_a_track_is_found_with_its_facts_until_its_audio_changes(tmp_path):
    cache = TrackCache(tmp_path / "new" / "tracks", MANY)
    assert cache.find(track_name(1)) is None
    assert not cache.folder.exists()
    facts = put(cache, 1)
    sound = cache.path(track_name(1)).read_bytes()
    assert facts["sha256"] == hashlib.sha256(sound).hexdigest()
    assert cache.find(track_name(1), use=False) == facts
    used = cache.find(track_name(1))
    assert used["last_used"] > facts["last_used"]
    assert used["created_at"] == facts["created_at"]
    assert cache.find(track_name(1), use=False) == used
    cache.path(track_name(1)).write_bytes(sound[:-1])
    assert cache.find(track_name(1)) is None
    assert {p.name for p in cache.folder.iterdir()} == {".lock"}


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "7", "null", '{"track_id": "x"}', "\xff", "[" * 9]
)
def test_an_invalid_sidecar_is_removed_with_its_audio(tmp_path, text):
    cache = TrackCache(tmp_path, MANY)
    put(cache, 1)
    (tmp_path / f"{track_name(1)}.json").write_text(text, "latin-1")
    assert cache.find(track_name(1)) is None
    assert cached(cache) == []


def test_a_sidecar_of_another_track_or_without_audio_is_ignored_and_removed(tmp_path):
    cache = TrackCache(tmp_path, MANY)
    put(cache, 1)
    (tmp_path / f"{track_name(2)}.json").write_bytes(
        (tmp_path / f"{track_name(1)}.json").read_bytes()
    )
    (tmp_path / f"{track_name(2)}.wav").write_bytes(
        (tmp_path / f"{track_name(1)}.wav").read_bytes()
    )
    assert cache.find(track_name(2)) is None
    (tmp_path / f"{track_name(1)}.wav").unlink()
    assert cache.find(track_name(1)) is None
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "bad", ["../x", "..", "", "x" * 16, track_name(1).upper() + "G", "/" + track_name(1)]
)
def test_an_unsafe_track_id_never_leaves_the_folder(tmp_path, bad):
    for suffix in ("wav", "json"):
        (tmp_path / f"x.{suffix}").write_text("mine")
    assert TrackCache(tmp_path / "tracks", MANY).find(bad) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_the_least_recently_used_tracks_are_evicted_first(tmp_path):
    cache = TrackCache(tmp_path, 3500)
    for number in (1, 2, 3):
        put(cache, number)
    cache.find(track_name(1))
    put(cache, 4)
    assert cached(cache) == [1, 3, 4]
    put(cache, 5, keep={track_name(3)})
    assert cached(cache) == [3, 4, 5]
    put(cache, 6, size=9000)
    assert cached(cache) == [6]
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_the_number_of_tracks_is_limited(tmp_path):
    cache = TrackCache(tmp_path, MANY, max_tracks=2)
    for number in range(5):
        put(cache, number)
    assert cached(cache) == [3, 4]


def test_the_first_of_two_equal_tracks_is_kept_and_old_partial_files_are_removed(tmp_path):
    cache = TrackCache(tmp_path, MANY)
    first = put(cache, 1)
    assert put(cache, 1) == first
    old, young = (
        tmp_path / f".{track_name(2)}.1.wav.part",
        tmp_path / f".{track_name(3)}.1.wav.part",
    )
    foreign = tmp_path / "mine.wav"
    for path in (old, young, foreign, cache.path(track_name(4))):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    put(cache, 5)
    assert [p.exists() for p in (old, young, foreign, cache.path(track_name(4)))] == [0, 1, 1, 0]


def test_a_failed_write_raises_and_leaves_no_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudioError, match="cannot be written"):
        TrackCache(tmp_path / "file" / "tracks", MANY).stage(track_name(1), b"x")
    cache = TrackCache(tmp_path, MANY)
    staged = cache.stage(track_name(1), b"x")
    monkeypatch.setattr(
        track_cache.files, "replace_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(StudioError):
        cache.publish(track_name(1), staged, FACTS)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "file"}


def test_a_lookup_does_not_wait_for_a_held_lock(tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(track_cache, "LOCK_TIMEOUT_S", 0.2)
    cache = TrackCache(tmp_path, MANY)
    put(cache, 1)
    with FileLock(tmp_path / ".lock"):
        began = time.monotonic()
        assert cache.find(track_name(1))
        assert time.monotonic() - began < 2


WRITER = """
import json, os, random, sys
from pathlib import Path
from lofi.track_cache import TrackCache
cache, facts = TrackCache(Path(sys.argv[1]), 4_000_000), json.loads(sys.argv[2])
for turn in range(10**9):
    if turn == 3:  # some tracks are complete before the kills, even on a slow disk
        print("writes", flush=True)
    track = f"{random.randrange(12):016x}"
    if turn >= 3 and random.random() < 0.5:
        cache.find(track)
    else:
        sound = os.urandom(random.randrange(1, 1_000_000))
        cache.publish(track, cache.stage(track, sound), facts)
"""


def kill_writers(folder, rounds: int) -> int:
    """Kill two writers on one folder `rounds` times; the number of tracks verified complete."""
    cache, verified, chance = TrackCache(folder, MANY), 0, random.Random(7)
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
            if facts := cache.find(track_name(number)):
                sound = cache.path(track_name(number)).read_bytes()
                assert hashlib.sha256(sound).hexdigest() == facts["sha256"]
                verified += 1
    for part in folder.glob("*.part"):
        os.utime(part, (0, 0))
    put(cache, 99)
    assert not list(folder.glob("*.part"))
    assert {p.stem for p in folder.glob("*.json")} == {p.stem for p in folder.glob("*.wav")}
    json.loads((folder / f"{track_name(99)}.json").read_text())
    return verified


def test_eight_kills_leave_no_partial_track(tmp_path):
    assert kill_writers(tmp_path, 4) > 4


@pytest.mark.long
def test_a_hundred_kills_leave_no_partial_track(tmp_path):
    assert kill_writers(tmp_path, 50) > 50
