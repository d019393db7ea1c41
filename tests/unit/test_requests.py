"""Requests are checked when built, survive JSON and pickling, and name what is wrong."""

import json
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ERRORS, StudioError
from core.params import DIFFUSION, MUSIC, SCHEDULE, AdapterRef
from core.requests import (
    EXPORTS,
    HELPERS,
    SAMPLE_RATE,
    SONGS,
    Edit,
    Extend,
    Generate,
    Lyrics,
)
from core.results import Cancelled, Failed, Progress
from core.text import normalize

ALL = SONGS | HELPERS | EXPORTS | {Lyrics.mode: Lyrics}


@pytest.mark.parametrize("mode", ALL.values())
def test_every_default_lies_in_its_own_range(mode):
    for param in mode.params():
        if param.required or param.default is None:
            continue
        if param.low is not None:
            assert param.low <= param.default <= param.high
        if param.choices:
            assert param.default in param.choices


def test_the_advanced_parameters_are_here():
    advanced = [k.name for k in Generate.params() if k.group in (DIFFUSION, SCHEDULE, MUSIC)]
    assert advanced == [
        *("inference_steps", "guidance_scale", "infer_method", "seed"),
        *("cfg_interval_start", "cfg_interval_end", "shift", "use_adg"),
        *("bpm", "keyscale", "timesignature", "vocal_language"),
        "fast_preview",
    ]


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ({}, "prompt-empty", "style is empty"),
        ({"prompt": " \n"}, "prompt-empty", "style is empty"),
        (
            {"duration_s": 999},
            "value-out-of-range",
            "Length must be a number from 5 to 600 s, not 999",
        ),
        ({"duration_s": float("nan")}, "value-out-of-range", "Length must be a number from 5"),
        ({"duration_s": float("inf")}, "value-out-of-range", "Length must be a number from 5"),
        (
            {"duration_s": True},
            "value-out-of-range",
            "Length must be a number from 5 to 600 s, not True",
        ),
        ({"inference_steps": 7.5}, "value-out-of-range", "Steps must be a whole number"),
        (
            {"inference_steps": -3},
            "value-out-of-range",
            "Steps must be a whole number from 1 to 200, not -3",
        ),
        ({"guidance_scale": 1e308}, "value-out-of-range", "Guidance must be a number from 1 to 30"),
        ({"seed": 10**40}, "value-out-of-range", "Seed"),
        ({"seed": "seven"}, "value-out-of-range", "Seed must be a whole number"),
        ({"keyscale": "H major"}, "value-out-of-range", "Key cannot be 'H major'"),
        ({"infer_method": "magic"}, "value-out-of-range", "Sampler cannot be 'magic'"),
        ({"use_adg": "perhaps"}, "value-out-of-range", "must be on or off"),
        ({"lyrics": "la " * 4000}, "value-out-of-range", "12,000 characters; the limit is 4,096"),
        ({"prompt": ["x"]}, "value-out-of-range", "Style must be text"),
        ({"cfg_interval_start": 0.6, "cfg_interval_end": 0.2}, "value-out-of-range", "below"),
        ({"lyrics": "a\ud800"}, "value-out-of-range", "Lyrics contains broken characters"),
        ({"steps": 8}, "unknown-field", "'steps' is not a setting of generate"),
    ],
)
def test_invalid_values_are_refused_with_a_sentence_and_an_action(given, code, says):
    with pytest.raises(StudioError) as caught:
        Generate.of(given if not given or "prompt" in given else {"prompt": "x", **given})
    error = caught.value
    assert error.code == code
    assert says in error.message
    assert error.message.endswith(".")
    assert len(error.action) > 10
    assert "Traceback" not in str(error)


def values(param):
    """Legal values of a parameter."""
    if param.choices:
        base = st.sampled_from(param.choices)
    elif param.type is bool:
        base = st.booleans()
    elif param.type is int:
        base = st.integers(int(param.low), int(param.high))
    elif param.type is float:
        base = st.floats(param.low, param.high)
    elif param.type is AdapterRef:
        fields = {k.name: values(k) for k in AdapterRef.params()}
        base = st.lists(st.fixed_dictionaries(fields), max_size=3)
    else:
        base = st.text(min_size=1, max_size=40).filter(lambda words: normalize(words).strip())
        base = base.filter(lambda name: "\0" not in name) if param.type is Path else base
    return st.none() | base if param.optional else base


requests = st.fixed_dictionaries({k.name: values(k) for k in Generate.params()}).filter(
    lambda d: d["cfg_interval_start"] <= d["cfg_interval_end"]
)


@settings(max_examples=60, deadline=None)
@given(requests)
def test_a_request_survives_json_and_pickling(given):
    request = Generate.of(given)
    assert Generate.of(json.loads(request.model_dump_json())) == request
    assert pickle.loads(pickle.dumps(request)) == request


def test_a_request_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Generate.of({"prompt": "x"}).seed = 3


def test_non_defaults_are_what_was_set():
    assert Generate.of({"prompt": "x", "bpm": 90}).non_defaults() == {"prompt": "x", "bpm": 90}


@pytest.mark.parametrize(
    "event",
    [
        Progress(stage="Denoising", step=3, steps=8, elapsed_s=1.5, left_s=(2.0, 4.0)),
        Cancelled(stage="Decoding", elapsed_s=2.0),
        Failed(code="prompt-empty", message="a.", action="b."),
    ],
)
def test_events_survive_json_and_pickling(event):
    assert type(event).model_validate_json(event.model_dump_json()) == event
    assert pickle.loads(pickle.dumps(event)) == event


def facts_of(kind) -> dict:
    import string

    names = [
        (field, spec)
        for text in kind
        for _, field, spec, _ in string.Formatter().parse(text)
        if field
    ]
    return {name: 1.0 if spec else "it" for name, spec in names}


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_has_a_sentence_and_an_action_and_survives_pickling(code):
    error = StudioError(code, **facts_of(ERRORS[code]))
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.message, again.action) == (code, error.message, error.action)
    assert error.message[0].isupper() or error.message[0] in "'1i"
    assert error.message.endswith(".")
    assert error.action


def test_an_error_as_data_holds_code_message_and_action():
    error = StudioError("source-missing", name="song.wav")
    data = {
        "code": "source-missing",
        "message": "song.wav was not found.",
        "action": "Choose the file again.",
    }
    assert error.as_dict() == Failed.from_error(error).as_dict() == data


LABELS = {param.label for mode in ALL.values() for param in mode.params()}


@pytest.mark.parametrize("code", ERRORS)
def test_errors_name_settings_by_their_labels(code):
    """Capitalised words within a sentence are labels, names of things, or nothing."""
    names = {"Set", "JSON", "GPU", "ZeroGPU", "HF_HOME", "Models", "WAV", "FLAC", "MP3", "FILE"}
    for text in ERRORS[code]:
        for phrase in re.findall(
            r"(?:Set|Turn|Lower|Reduce|lower|set) ((?:[A-Z][\w-]*)(?: [a-z]+)*)", text
        ):
            label = re.split(r" (?:to|off|or|by)\b", phrase)[0]
            assert label in LABELS | names, phrase


LESS, ONE = 0.4 / SAMPLE_RATE, 1 / SAMPLE_RATE


@pytest.mark.parametrize(("before", "after"), [(0, 0), (LESS, LESS), (LESS, 0), (0, 1e-12)])
def test_adding_less_than_a_sample_is_nothing_to_add(before, after):
    with pytest.raises(StudioError) as caught:
        Extend.of({"source": "a.wav", "before_s": before, "after_s": after})
    assert caught.value.code == "nothing-to-add"


def test_adding_one_sample_is_something():
    assert Extend.of({"source": "a.wav", "before_s": 0, "after_s": ONE}).after_s == ONE


@pytest.mark.parametrize("length", [0, -1, LESS, 1e-12])
def test_a_region_of_less_than_a_sample_is_empty(length):
    with pytest.raises(StudioError) as caught:
        Edit.of({"source": "a.wav", "start_s": 2, "end_s": 2 + length})
    assert caught.value.code == "region-empty"


def test_a_region_of_one_sample_is_a_region():
    assert Edit.of({"source": "a.wav", "start_s": 2, "end_s": 2 + ONE}).kind == "repaint"
