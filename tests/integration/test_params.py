"""The knobs that a listener hears, turned, change the sound.

That every knob changes what reaches the model, in every mode, is in `test_modes`.
"""

from __future__ import annotations

import numpy as np
import pytest
from conftest import drain, song

TURNED = {
    "prompt": "bright house piano, four on the floor",
    "inference_steps": 4,
    "guidance_scale": 6.0,
    "infer_method": "sde",
    "seed": 8,
    "shift": 3.0,
    "use_adg": True,
    "bpm": 140,
    "keyscale": "A minor",
}
BASE = {"instrumental": False, "lyrics": "[Verse]\nla la la"}


def made(engine, **changes) -> np.ndarray:
    request = song(**{**BASE, **changes})
    return drain(engine.text_to_music(request)).sound


def rms(sound: np.ndarray) -> float:
    return float(np.sqrt(np.mean(sound**2)))


@pytest.fixture(scope="module")
def plain(engine):
    return made(engine)


@pytest.mark.parametrize("name", TURNED)
def test_turning_it_changes_the_sound(engine, plain, name):
    assert rms(made(engine, **{name: TURNED[name]}) - plain) > 1e-3 * rms(plain)


def test_each_method_goes_its_own_way(engine, plain):
    ways = [plain, *(made(engine, infer_method=method) for method in ("sde", "heun"))]
    for i, one in enumerate(ways):
        assert all(rms(one - other) > 1e-3 * rms(plain) for other in ways[i + 1 :])
