"""A studio with a planner of random weights: its plans are nonsense, but valid and repeatable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_planner
from trained import pair, write

from core.requests import SAMPLE_RATE

STEADY = {
    "inference_steps": 3,
    "guidance_scale": 3.0,
    "shift": 1.0,
    "seed": 7,
    "instrumental": False,
    "lyrics": "[verse]\nla la la",
    "thinking": True,
    "use_cot_caption": False,
}
"""Request fields of a short song that uses the planner."""


def music(seconds: float, root: float = 220.0, seed: int = 0) -> np.ndarray:
    """A chord under a click on every half second, float32 [2, samples] at 48 kHz."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    chord = sum(np.sin(2 * np.pi * root * ratio * t + seed) for ratio in (1, 1.26, 1.5)) / 8
    click = 0.3 * np.exp(-60 * (t % 0.5)) * np.sin(2 * np.pi * 1500 * t)
    return np.stack([chord + click, chord + 0.8 * click]).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Two short songs at 48 kHz, one at 44.1 kHz in mono, and an adapter."""
    folder = tmp_path_factory.mktemp("uploads")
    paths = {name: folder / f"{name}.wav" for name in ("song", "other", "mono")}
    soundfile.write(paths["song"], music(3.2).T, SAMPLE_RATE, "PCM_24")
    soundfile.write(paths["other"], music(2.5, 329.6, 1).T, SAMPLE_RATE, "PCM_24")
    soundfile.write(paths["mono"], music(3.0)[0][::1], 44_100, "PCM_16")
    paths["adapter"] = write(folder / "warm.safetensors", pair())
    return paths


@pytest.fixture(scope="module")
def planned(own_cache, tmp_path_factory):
    """A studio on the embedded model; its planner has random weights and the model's codebook size."""
    import backend
    from models import catalog, checkpoints
    from runtime import device

    model = catalog.choose("mini")
    slots, tiny_planner.SLOTS = tiny_planner.SLOTS, checkpoints.codebook(model.folder)
    folder = tiny_planner.write(tmp_path_factory.mktemp("planner"))
    tiny_planner.SLOTS = slots
    instance = backend.Studio(model, device.find_device("cpu"), str(folder))
    yield instance
    instance.leave("v")
