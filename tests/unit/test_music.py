"""Keys, time signatures, languages, tempi and seeds are accepted in every unambiguous spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import StudioError
from core.music import KEYS, LANGUAGE_NAMES, LANGUAGES, TIME_SIGNATURE_NAMES, parse_key
from core.requests import MODES, Generate, Lyrics

SIGNS = {
    "": [""],
    "#": ["#", "♯", "＃", " sharp", "-sharp", "Sharp"],
    "b": ["b", "♭", " flat", "-flat", "B"],
}
MODE_WORDS = {
    "major": ["major", "maj", "Major", "MAJ", "M", "dur"],
    "minor": ["minor", "min", "m", "Minor", "MIN", "moll"],
}


def request(**values):
    return Generate.of({"prompt": "x", **values})


def spellings(key: str) -> list[str]:
    """Every way to write one of `KEYS` that nobody could take for another."""
    tonic, mode = key.split()
    note, sign = tonic[0], tonic[1:]
    return [
        f"{letter}{accidental}{gap}{word}"
        for letter in (note, note.lower())
        for accidental in SIGNS[sign]
        for gap in ("", " ", "-", ":", "_", "  ")
        for word in MODE_WORDS[mode]
    ] + [f"{note}{accidental}" for accidental in SIGNS[sign] if mode == "major"]


@pytest.mark.parametrize("key", KEYS)
def test_every_spelling_of_a_key_is_that_key(key):
    for written in spellings(key):
        assert request(keyscale=written).keyscale == key, written
        assert request(keyscale=f" {written}\n").keyscale == key, written


@pytest.mark.parametrize("written", ["Am", "A minor", "Amin", "a minor", "A:min", "A moll"])
def test_a_minor(written):
    assert request(keyscale=written).keyscale == "A minor"


@pytest.mark.parametrize(
    "written", ["a", "c#", "bb", "H major", "C-", "Cm7", "F##", "C lydian", "E♭♭", "major", "12"]
)
def test_a_key_that_is_ambiguous_or_none_is_refused(written):
    with pytest.raises(StudioError, match="Key cannot be"):
        request(keyscale=written)


@given(st.text(max_size=12))
def test_no_text_breaks_the_key_parser(written):
    parsed = parse_key(written)
    assert parsed in ("", *KEYS) or parsed == written


@pytest.mark.parametrize(
    ("written", "beats"),
    [
        *((name, beats) for beats, name in TIME_SIGNATURE_NAMES.items()),
        *((beats, beats) for beats in TIME_SIGNATURE_NAMES),
        *((int(beats), beats) for beats in TIME_SIGNATURE_NAMES),
        *((float(beats), beats) for beats in TIME_SIGNATURE_NAMES),
        *((written, "") for written in ("", "auto", "Auto", None)),
        (" 3 / 4 ", "3"),
    ],
)
def test_time_signatures_are_read_as_musicians_write_them(written, beats):
    assert request(timesignature=written).timesignature == beats


@pytest.mark.parametrize("written", [5, "5/4", "2/2", "4/8", True, 4.5, float("inf"), "four", []])
def test_another_time_signature_is_refused(written):
    with pytest.raises(StudioError, match="Time signature"):
        request(timesignature=written)


@pytest.mark.parametrize("code", LANGUAGE_NAMES)
def test_languages_are_known_by_code_and_name_in_any_case(code):
    name = LANGUAGE_NAMES[code]
    for written in (code, code.upper(), name, name.lower(), f" {name} ", f"{name} ({code})"):
        assert request(vocal_language=written).vocal_language == code
        assert Lyrics.of({"brief": "x", "language": written}).language == code


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("en-US", "en"),
        ("pt_BR", "pt"),
        ("zh-Hans-CN", "zh"),
        ("Mandarin", "zh"),
        ("auto", "unknown"),
    ],
)
def test_other_names_of_languages(written, code):
    assert request(vocal_language=written).vocal_language == code


@pytest.mark.parametrize("written", ["Klingon", "xx", "e", 3, True])
def test_an_unknown_language_is_refused(written):
    with pytest.raises(StudioError, match="Vocal language cannot be"):
        request(vocal_language=written)


@pytest.mark.parametrize("written", [120, 120.0, "120", "120.0", "120 bpm", "120BPM", " 120 "])
def test_a_tempo_may_have_its_unit(written):
    assert request(bpm=written).bpm == 120


@pytest.mark.parametrize("written", [None, "", "auto", "AUTO", " automatic "])
@pytest.mark.parametrize(
    "name", ["bpm", "seed", "inference_steps", "guidance_scale", "shift", "thinking"]
)
def test_what_may_be_left_open_may_be_called_auto(name, written):
    assert getattr(request(**{name: written}), name) is None


@pytest.mark.parametrize("written", [-1, -1.0, "-1", "random", "Random"])
def test_seed_minus_one_is_automatic(written):
    assert request(seed=written).seed is None


@pytest.mark.parametrize("written", [-2, "-2", True, 1.5, "seven"])
def test_another_seed_below_zero_is_refused(written):
    with pytest.raises(StudioError, match="Seed must be a whole number from 0"):
        request(seed=written)


@pytest.mark.parametrize("mode", MODES.values())
def test_every_choice_that_an_error_offers_is_accepted(mode):
    for param in (k for k in mode.params() if k.choices):
        needed = {"prompt": "x", "source": "a.wav"}
        given = {k.name: needed[k.name] for k in mode.params() if k.name in needed}
        with pytest.raises(StudioError) as caught:
            mode.of({**given, param.name: "nonsense"})
        offered = caught.value.action.removeprefix("Choose one of ").removesuffix(".")
        for choice in offered.removesuffix(" and so on").split(", "):
            mode.of({**given, param.name: choice})
            mode.of({**given, param.name: choice.upper()})


def test_languages_end_with_the_unknown_one():
    assert (*sorted(LANGUAGE_NAMES), "unknown") == LANGUAGES
