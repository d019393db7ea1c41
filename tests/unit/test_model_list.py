"""The list of models: what is said of each is what would happen with it."""

from __future__ import annotations

import pytest

import backend
from models import catalog
from runtime import device, memory_choice


@pytest.mark.parametrize("memory_gb", [8.0, 25.0, 64.0])
def test_a_music_model_is_listed_with_the_plan_it_would_be_loaded_with(monkeypatch, memory_gb):
    monkeypatch.setattr(device, "memory_gb", lambda _: memory_gb)
    monkeypatch.setattr(memory_choice, "has_torchao", lambda: False)
    place = device.find_device("cpu")
    studio = backend.Studio(catalog.choose("mini"), place)
    listed = {entry.name: entry for entry in studio.models() if entry.kind == "model"}
    assert set(listed) == set(catalog.MODELS)
    for name, entry in listed.items():
        plan = memory_choice.choose(catalog.MODELS[name], place, studio.setup.planner)
        assert (entry.fits, entry.memory) == (plan.fits, f"{plan.title}. {plan.reason}")
    assert listed["xl-sft"].fits is (memory_gb > 8)
    if memory_gb == 25:
        assert listed["xl-sft"].memory.startswith("bfloat16")


def test_the_model_in_use_is_listed_with_the_precision_that_was_asked_for():
    studio = backend.Studio(catalog.choose("mini"), device.find_device("cpu"), precision="bf16")
    (mini,) = [entry for entry in studio.models() if entry.in_use and entry.kind == "model"]
    assert mini.memory.startswith(studio.setup.plan.title)
    assert mini.memory.startswith("bfloat16")
