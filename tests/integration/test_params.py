"""Parameters that should be audible change the samples.

That every parameter of every mode changes what reaches the model is tested in `test_modes`.
"""

from __future__ import annotations

import numpy as np
import pytest
from conftest import drain, song

CHANGES = {
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


def render(engine, **changes) -> np.ndarray:
    request = song(**{**BASE, **changes})
    return drain(engine.text_to_music(request)).sound


def rms(sound: np.ndarray) -> float:
    return float(np.sqrt(np.mean(sound**2)))


@pytest.fixture(scope="module")
def plain(engine):
    return render(engine)


@pytest.mark.parametrize("name", CHANGES)
def test_changing_a_parameter_changes_the_samples(engine, plain, name):
    assert rms(render(engine, **{name: CHANGES[name]}) - plain) > 1e-3 * rms(plain)


def test_every_sampler_gives_different_samples(engine, plain):
    sounds = [plain, *(render(engine, infer_method=method) for method in ("sde", "heun"))]
    for i, one in enumerate(sounds):
        assert all(rms(one - other) > 1e-3 * rms(plain) for other in sounds[i + 1 :])
