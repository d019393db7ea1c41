"""How a model is loaded, from the command line to the take, and a second try when memory runs out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import UNPLANNED, song

from core.results import Failed, Take
from runtime.memory_plan import MemoryPlan

pytestmark = pytest.mark.slow

QUICK = ("--duration-s", "5", "--inference-steps", "1", "--seed", "3", "--no-thinking")


def test_flags_reach_the_model_and_the_take_and_replay_tells_of_them(command):
    pytest.importorskip("torchao", reason="int8 and fp8 weights need the extra int8")
    flags = ("--precision", "int8", "--offload", "encoders", "--planner", "none")
    done = command("generate", "--prompt", "lofi", *QUICK, *flags, "--out", "a.wav", "--json")
    assert done.stderr.startswith("int8 weights, encoders offloaded: Needs about")
    take = json.loads(done.stdout)
    assert take["memory_plan"] == {
        "precision": "int8",
        "offload": "encoders",
        "planner_in_turn": False,
        "tile": 256,
    }
    done = command("replay", "a.wav", "--planner", "none", "--out", "b.wav")
    assert "The file was made with int8 weights; here they are float32." in done.stderr


def test_a_wrong_word_in_the_environment_is_named(command, monkeypatch):
    monkeypatch.setenv("ACE_PRECISION", "int4")
    done = command("generate", "--prompt", "lofi", *QUICK)
    assert done.returncode == 2
    assert done.stderr.startswith("value-out-of-range: ACE_PRECISION must be one of auto, bf16")


@pytest.fixture
def forgetful(studio, monkeypatch):
    """A studio with a smaller plan to fall back on, whose transformer fails as often as told."""
    from diffusers import AceStepTransformer1DModel

    forward, left = AceStepTransformer1DModel.forward, []

    def fail_first(*args, **kwargs):
        if left:
            raise torch.OutOfMemoryError(left.pop())
        return forward(*args, **kwargs)

    monkeypatch.setattr(AceStepTransformer1DModel, "forward", fail_first)
    smaller = MemoryPlan(tile=64)
    studio.setup = replace(studio.setup, plan=replace(studio.setup.plan, fallback=smaller))
    return studio, left


def run(studio):
    *_, ending = studio.run(song(duration_s=5, inference_steps=1, **UNPLANNED), "visitor")
    return ending


def test_a_song_is_tried_once_more_with_less_memory_and_says_so(forgetful):
    studio, left = forgetful
    left.append("CUDA out of memory")
    take = run(studio)
    assert isinstance(take, Take)
    assert take.memory_plan["tile"] == 64
    assert "Memory ran out with float32; the song was made with float32 and tiles of 64" in str(
        take.notes
    )
    after = run(studio)
    assert (after.memory_plan["tile"], after.notes) == (256, ())


def test_a_second_failure_is_the_usual_error(forgetful):
    studio, left = forgetful
    left += ["CUDA out of memory"] * 2
    ending = run(studio)
    assert isinstance(ending, Failed)
    assert ending.code == "out-of-memory"
    assert isinstance(run(studio), Take)
