"""The words: one for each knob and none besides, no numbers of their own, honest about time."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import tooltips as words
from core.params import Param
from core.requests import (
    EXPORTS,
    HELPERS,
    LANGUAGES,
    MODES,
    SONGS,
    TIME_SIGNATURES,
    Generate,
    Lyrics,
)
from core.results import Progress
from runtime import job

REQUESTS = SONGS | HELPERS | EXPORTS | {Lyrics.mode: Lyrics}
KNOBS = {(mode, k.name): k for mode, request in REQUESTS.items() for k in request.params()}


def test_tips_and_knobs_match_one_to_one():
    for mode, name in KNOBS:
        assert words.TIPS.keys() & {name, f"{mode}.{name}"}, f"no tip for {name}"
    names = {name for _, name in KNOBS} | {f"{mode}.{name}" for mode, name in KNOBS}
    assert words.TIPS.keys() <= names, "a tip for a knob that is not there"


def test_every_mode_has_a_name():
    assert words.MODES.keys() == words.NOTHING_YET_TIPS.keys()
    assert words.MODES.keys() == MODES.keys() | {Lyrics.mode}
    assert words.HELP.keys() == words.HELPS.keys() == HELPERS.keys()


@pytest.mark.parametrize("name", words.TIPS)
def test_tips_repeat_no_number_and_speak_in_one_voice(name: str):
    tip = words.TIPS[name]
    assert not any(c.isdigit() for c in tip), "ranges come from the knob"
    assert tip[0].isupper()
    assert tip.endswith(".")
    assert "!" not in tip
    assert len(tip) <= 100


@pytest.mark.parametrize("table", [words.LABELS, words.PLACEHOLDERS, words.CHOICES])
def test_no_word_is_left_for_a_knob_that_is_gone(table: dict[str, object]):
    assert table.keys() <= {name for _, name in KNOBS}


def test_choices_are_named_by_values_that_exist():
    by_name = {name: k for (_, name), k in KNOBS.items()}
    for name, called in words.CHOICES.items():
        allowed = by_name[name].choices or (False, True)
        assert called.keys() <= set(allowed)


def test_every_language_is_named_in_full_with_its_code():
    for code in LANGUAGES:
        shown = words.choice("vocal_language", code)
        assert shown == words.AUTO if code == "unknown" else shown.endswith(f" ({code})")
        assert len(shown) > len(code) + 3 or code == "unknown"


def test_every_metre_is_written_as_one():
    assert [words.choice("timesignature", m) for m in TIME_SIGNATURES] == [
        "2/4",
        "3/4",
        "4/4",
        "6/8",
    ]


def test_every_stage_of_a_song_has_a_name():
    assert set(job.STAGES) <= words.STAGES.keys()


def test_a_tip_carries_the_range_of_its_knob():
    told = words.tip("generate", KNOBS["generate", "duration_s"])
    assert "From 5 to 240 s, normally 30." in told
    assert "automatic unless set" in words.tip("generate", KNOBS["generate", "seed"])


@given(st.floats(0, 5000), st.floats(0, 5000))
def test_time_left_is_a_range_that_holds_what_is_expected(a: float, b: float):
    soonest, latest = sorted((a, b))
    told = words.left((soonest, latest))
    unit = 60 if " min " in told else 1
    numbers = [int(part) * unit for part in told.split() if part.isdigit()]
    low, high = (0, numbers[0]) if told.startswith("up to") else (numbers[0], numbers[-1])
    assert low <= soonest
    assert latest <= high


def test_time_left_says_so_while_nothing_is_known():
    assert words.left(None) == words.MEASURING
    assert words.left((20.0, 35.0)) == "about 20 to 35 s left"
    assert words.left((0.2, 3.0)) == "up to 3 s left"


def test_a_line_of_progress():
    event = Progress(stage="Denoising", step=3, steps=27, elapsed_s=7.9, left_s=(20, 35))
    assert words.progress_line(event) == (
        "Shaping the sound · step 3 of 27 · 0:07 · about 20 to 35 s left"
    )
    waiting = Progress(stage="Waiting", step=2)
    assert "2 ahead of you" in words.progress_line(waiting)
    fetching = Progress(stage="Fetching vae/model.safetensors", step=120, steps=2000)
    assert "120 of 2,000 MB" in words.progress_line(fetching)


def test_a_value_is_shown_as_a_person_would_write_it():
    params: dict[str, Param] = {k.name: k for k in Generate.params()}
    assert words.shown(params["bpm"], 92) == "92 bpm"
    assert words.shown(params["duration_s"], 12.5) == "12.5 s"
    assert words.shown(params["use_adg"], True) == "on"
    assert words.shown(params["instrumental"], True) == "Instrumental"
    assert words.shown(params["vocal_language"], "de") == "German (de)"


def test_every_text_is_used():
    files = [ROOT / f"{name}.py" for name in ("theme", "tooltips", "cli")]
    files += (ROOT / "web").glob("*.py")
    code = "".join(path.read_text("utf-8") for path in files)
    for name in vars(words):
        if name.isupper() and name != "TYPE_CHECKING":
            assert len(re.findall(rf"\b{name}\b", code)) > 1, f"{name} is used nowhere"
