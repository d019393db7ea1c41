"""Text that looks the same is normalised to one spelling, and cut between characters."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from audio.settings import request_of
from core import text
from core.requests import Generate, Lyrics

LINE_ENDS = ["\r\n", "\r", "\n", "\u2028", "\u2029", "\x85", "\v", "\f"]
CONTROLS = [chr(c) for c in (0, 1, 8, 14, 27, 28, 30, 31, 127, 128, 159)]

PARTS = [*LINE_ENDS, *CONTROLS, "\ufeff", "e", "\u0301", "\u0308", "क", "\u093f", "\t"]

anything = st.lists(
    st.sampled_from(PARTS) | st.characters(exclude_categories=["Cs"]), max_size=30
).map("".join)


@settings(max_examples=40, deadline=None)
@given(anything)
@example("\r\0\n")
@example("e\0\u0301")
def test_normalising_twice_changes_nothing(given):
    once = text.normalize(given)
    assert text.normalize(once) == once


@settings(max_examples=40, deadline=None)
@given(anything)
def test_normalised_text_holds_no_controls_and_one_kind_of_line_end(given):
    done = text.normalize(given)
    assert unicodedata.is_normalized("NFC", done)
    assert "\ufeff" not in done
    assert not {c for c in done if unicodedata.category(c) in ("Cc", "Zl", "Zp")} - {"\t", "\n"}
    assert done.splitlines() == done.removesuffix("\n").split("\n") or not done


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(LINE_ENDS), max_size=4), st.booleans(), st.booleans())
def test_equal_visible_text_is_an_equal_request(ends, mark, decomposed):
    lines = ["[verse]", "Señor Ångström", "caf\u00e9", "ends"]
    ends = (ends + ["\n"] * 3)[:3]
    written = lines[0] + "".join(end + line for end, line in zip(ends, lines[1:], strict=True))
    written = unicodedata.normalize("NFD", written) if decomposed else written
    written = "\ufeff" + written if mark else written
    same = Generate.of({"prompt": "x", "lyrics": "\n".join(lines)})
    assert Generate.of({"prompt": "x", "lyrics": written}) == same


def test_every_text_of_a_request_is_normalised():
    texts = [k.name for k in Generate.params() if k.type is str and not k.choices]
    request = Generate.of(dict.fromkeys(texts, "\ufeffa\r\nb\x00"))
    assert {getattr(request, name) for name in texts} == {"a\nb"}
    texts = [k.name for k in Lyrics.params() if k.type is str and not k.choices]
    request = Lyrics.of(dict.fromkeys(texts, "\ufeffa\r\nb\x00"))
    assert {getattr(request, name) for name in texts} == {"a\nb"}


def test_stored_text_stays_as_it_is():
    stored = {"prompt": "x\r\ny", "lyrics": "\ufeffe\u0301\u2028z"}
    request = Generate.stored(stored)
    assert (request.prompt, request.lyrics) == (stored["prompt"], stored["lyrics"])
    assert Generate.of(stored) != request


def test_the_request_of_a_file_keeps_its_text():
    stored = {"prompt": "x\r\ny", "lyrics": "\ufeffe\u0301\u2028z"}
    found = {"mode": "generate", "request": stored, "adapters": [], "names": {}}
    request = request_of(found, seed=3)
    assert (request.prompt, request.lyrics, request.seed) == (*stored.values(), 3)


def test_text_may_be_as_long_as_the_limit_once_it_is_normalised():
    assert len(Generate.of({"prompt": "x", "lyrics": "a\r\n" * 2048}).lyrics) == 4096


@settings(max_examples=40, deadline=None)
@given(anything, st.integers(0, 20), st.integers(0, 40))
def test_truncated_text_is_a_beginning_within_both_limits(given, chars, size):
    cut = text.truncate(given, chars, size)
    assert given.startswith(cut)
    assert len(cut) <= chars
    assert len(cut.encode()) <= size


@pytest.mark.parametrize(
    "unit", ["e\u0301", "कि", "👩\u200d🚀", "👍\U0001f3fd", "ni\u0303"], ids=ascii
)
def test_truncating_keeps_visible_characters_whole(unit):
    long = unit * 30
    cut = text.truncate(long, 40, 60)
    units = len(cut) // len(unit)
    assert units
    assert cut in (unit * units, unit * units + "n")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[31m\n.wav", "a?[31m?.wav"),
        ("मेरा गाना.wav", "मेरा गाना.wav"),
        ("👩\u200d🚀.wav", "👩\u200d🚀.wav"),
        ("x" * 90, "x" * 80),
        ("e\u0301" + "x" * 79, "x" * 79),
        ("\u202egnp.wav", "?gnp.wav"),
        ("\u0301\u200d", ""),
        ("", ""),
    ],
)
def test_printable_text_disturbs_no_terminal(name, shown):
    assert text.printable(name) == shown


@pytest.mark.parametrize(
    ("lyrics", "fraction", "length"),
    [
        ("one two three four", 0.5, "2 words"),
        ("streetlight", 1, "1 word"),
        ("", 1, "0 words"),
        ("夜の電車で帰る" * 10, 0.5, "35 characters"),
        ("ฉันรักเพลงนี้" * 10, 1, "130 characters"),
        ("我想你\n你想我", 1, "6 characters"),
        ("나는 너를 사랑해", 1, "3 words"),
        ("my 夜 song of the long night", 1, "7 words"),
    ],
)
def test_length_is_in_characters_where_a_script_has_no_spaces(
    lyrics: str, fraction: float, length: str
):
    assert text.describe_length(lyrics, fraction) == length
