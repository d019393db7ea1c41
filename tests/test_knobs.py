"""Every knob, turned, changes what reaches the model; the ones a listener hears change the sound."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drain, song

from knobs import PLANNER
from song import Generate

TURNED = {
    "prompt": "bright house piano, four on the floor",
    "lyrics": "[Verse]\nslow rain on the window",
    "instrumental": True,
    "duration_s": 11.0,
    "inference_steps": 4,
    "guidance_scale": 6.0,
    "infer_method": "sde",
    "seed": 8,
    "cfg_interval_start": 0.5,
    "cfg_interval_end": 0.5,
    "shift": 3.0,
    "use_adg": True,
    "bpm": 140,
    "keyscale": "A minor",
    "timesignature": "3",
    "vocal_language": "de",
}
HEARD = [
    *("inference_steps", "guidance_scale", "shift", "infer_method", "seed", "bpm", "keyscale"),
    *("prompt", "use_adg"),
]
BASE = {"instrumental": False, "lyrics": "[Verse]\nla la la"}


@pytest.fixture(scope="module")
def far_wall(engine):
    """What the transformer receives for a request, as one hash of every tensor in order."""

    def listen(request: Generate) -> str:
        heard = hashlib.sha256()

        def record(_module, args, kwargs):
            for value in (*args, *(kwargs[name] for name in sorted(kwargs))):
                if isinstance(value, torch.Tensor):
                    heard.update(str(tuple(value.shape)).encode())
                    heard.update(value.contiguous().numpy().tobytes())

        hook = engine.pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
        try:
            with torch.inference_mode():
                conditions, _ = engine.conditions(request)
                drain(engine.denoise(conditions, request, request.seed))
        finally:
            hook.remove()
        return heard.hexdigest()

    return listen


def test_every_knob_that_needs_no_planner_is_turned_here():
    """The planner's and the files are turned in `test_modes`, with all of these again."""
    alone = {k.name for k in Generate.knobs() if k.group != PLANNER and k.type is not Path}
    assert set(TURNED) == alone


def test_the_far_wall_hears_the_same_for_the_same_request(far_wall):
    assert far_wall(song(**BASE)) == far_wall(song(**BASE))


@pytest.mark.parametrize("name", TURNED)
def test_turning_it_changes_what_reaches_the_model(far_wall, name):
    assert far_wall(song(**BASE)) != far_wall(song(**{**BASE, name: TURNED[name]}))


@pytest.mark.parametrize("method", ["ode", "sde", "heun"])
def test_each_method_sends_the_model_somewhere_else(far_wall, method):
    others = {"ode", "sde", "heun"} - {method}
    heard = far_wall(song(**BASE, infer_method=method))
    assert all(heard != far_wall(song(**BASE, infer_method=other)) for other in others)


@pytest.fixture(scope="module")
def plain(engine):
    return drain(engine.text_to_music(song(**BASE), [7]))[0].sound


@pytest.mark.parametrize("name", HEARD)
def test_turning_it_changes_the_sound(engine, plain, name):
    request = song(**{**BASE, name: TURNED[name]})
    turned = drain(engine.text_to_music(request, [request.seed]))[0].sound
    difference = np.sqrt(np.mean((turned - plain) ** 2))
    assert difference > 1e-3 * np.sqrt(np.mean(plain**2))
