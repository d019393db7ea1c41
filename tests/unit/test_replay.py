"""A song made again: what stands in the way of the same samples, and how far off it is."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import pytest
import soundfile

from core.results import DeviceUsed, ModelUsed, Take
from runtime import replay

HISS = np.random.default_rng(0).standard_normal((48_000, 2)) * 0.1
MODEL = ModelUsed(name="mini", source="x", revision="1", sha256="a", licence="MIT", may_sell=True)
DEVICE = DeviceUsed(kind="cpu", name="A", dtype="float32", threads=2, torch="2.13.0")


def take(path, **changes) -> Take:
    given = {
        "id": "1",
        "path": str(path),
        "mode": "cover",
        "request": {"prompt": "x"},
        "model": MODEL,
        "device": DEVICE,
        "sample_rate": 48_000,
        "samples": 48_000,
        "peak_dbfs": -1.0,
        "timings_s": {},
        "files": {"source": "c"},
        "made_at": datetime.now(UTC),
        "studio": "1",
    }
    return Take(**{**given, **changes})


def files(tmp_path, now: np.ndarray):
    for name, sound in (("then", HISS), ("now", now)):
        soundfile.write(tmp_path / f"{name}.wav", sound, 48_000, "FLOAT")
    return tmp_path / "then.wav", take(tmp_path / "now.wav")


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (HISS, "The samples are the same, every one."),
        (HISS * 1.01, "The difference is 40.0 dB below the song."),
        (-HISS, "It is another song: the difference is as loud as the song itself."),
        (HISS[:47_000], "The file holds 48000 samples, and 47000 were made."),
    ],
    ids=["same", "near", "other", "shorter"],
)
def test_the_difference_is_stated_in_decibels(now, says, tmp_path, own_cache):
    assert replay.compare(*files(tmp_path, now)) == says


def test_settings_alone_have_no_sound_to_compare(tmp_path):
    assert "settings only" in replay.compare(tmp_path / "song.json", take("x"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        (
            {"model": MODEL.model_copy(update={"sha256": "b"})},
            "with mini; mini here has other weights",
        ),
        ({"planner": MODEL}, "with no planner; mini here"),
        ({"device": DEVICE.model_copy(update={"kind": "cuda"})}, "with kind cpu; here it is cuda"),
        ({"device": DEVICE.model_copy(update={"threads": 4})}, "with threads 2; here it is 4"),
        ({"device": DEVICE.model_copy(update={"name": "B"})}, None),
        (
            {"device": DEVICE.model_copy(update={"implementation": "fast"})},
            "with the transformer's reference implementation; here it is the fast one",
        ),
        ({"edition": 2}, "follows edition 1 of the rules"),
        ({"files": {"source": "d"}}, "The source is not the file that was used then."),
    ],
)
def test_each_possible_cause_of_a_difference_is_stated(changes, says):
    told = json.loads(take("x").model_dump_json())
    said = replay.differences(told, take("x", **changes))
    assert (says is None and not said) or (len(said) == 1 and says in said[0])
