"""The planner's text formats byte for byte, and the fields a request leaves to the planner."""

from __future__ import annotations

import pytest
from conftest import song

from core.music import INSTRUMENTAL
from core.requests import HELPERS, MODES, effective_lyrics, lyrics_note
from models import plan_format
from models.plan_format import Plan

FULL_PLAN = Plan(92, "A calm piano piece", 30, "F# minor", "en", "4")


def test_prompts_equal_those_of_training_to_the_byte():
    system = "<|im_start|>system\n# Instruction\n{}\n\n<|im_end|>\n<|im_start|>user\n"
    generate = system.format("Generate audio semantic tokens based on the given conditions:")
    user = "# Caption\nlofi\n\n# Lyric\n[Verse]\nhi\n<|im_end|>\n<|im_start|>assistant\n"
    assert plan_format.plan_prompt("lofi", "[Verse]\nhi") == generate + user
    reasoning = (
        "<think>\nbpm: 92\ncaption: A calm piano piece\nduration: 30\nkeyscale: F# minor\n"
        "language: en\ntimesignature: 4\n</think>\n\n"
    )
    assert plan_format.codes_prompt("lofi", "[Verse]\nhi", FULL_PLAN) == generate + user + reasoning
    unconditional = generate + "{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for negative in ("", " \n", "NO USER INPUT"):
        assert plan_format.unconditional_prompt(negative) == unconditional.format("NO USER INPUT")
    assert plan_format.unconditional_prompt(" drums, noise") == unconditional.format(
        " drums, noise"
    )
    understand = system.format(
        "Understand the given musical conditions and describe the audio semantics accordingly:"
    )
    assert plan_format.understand_prompt([12, 345]) == (
        understand + "<|audio_code_12|><|audio_code_345|><|im_end|>\n<|im_start|>assistant\n"
    )
    inspire = system.format(
        "Expand the user's input into a more detailed and specific musical description:"
    )
    for query, shown in (("a storm", "a storm"), ("  ", "NO USER INPUT")):
        assert plan_format.inspire_prompt(query, True) == (
            f"{inspire}{shown}\n\ninstrumental: true<|im_end|>\n<|im_start|>assistant\n"
        )
    rewrite = system.format(
        "Format the user's input into a more detailed and specific musical description:"
    )
    assert plan_format.rewrite_prompt("", "") == (
        f"{rewrite}# Caption\nNO USER INPUT\n\n# Lyric\n[Instrumental]<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_plan_is_yaml_as_pyyaml_wraps_and_quotes_it():
    long = "A melancholic piano ballad: " + "soft strings and a distant choir, " * 5
    plan = Plan(bpm=92, caption=long.strip(), language="no", timesignature="6")
    text = plan.yaml()
    assert text == (
        "bpm: 92\n"
        "caption: 'A melancholic piano ballad: soft strings and a distant choir, soft strings\n"
        "  and a distant choir, soft strings and a distant choir, soft strings and a distant\n"
        "  choir, soft strings and a distant choir,'\n"
        "language: 'no'\n"
        "timesignature: 6"
    )
    assert plan_format.parse_plan(f"<think>\n{text}\n</think>").caption == long.strip()
    assert Plan(caption="träum \u266a").yaml() == "caption: träum \u266a"
    assert Plan().yaml() == ""


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("language: no", "language", "no"),
        ("caption: key: C, tempo: #1", "caption", "key: C, tempo: #1"),
        ("caption: one\n  two: three\n   four", "caption", "one two: three four"),
        ("caption: 'it''s\n  quoted: here'", "caption", "it's quoted: here"),
        ('caption: "half', "caption", "half"),
        ('caption: "a\\\n  \\ b"', "caption", "a b"),
        ("keyscale: F\u266f minor", "keyscale", "F# minor"),
        ("timesignature: 6/8", "timesignature", "6"),
        ("timesignature: 5", "timesignature", None),
        ("bpm: 301", "bpm", None),
        ("bpm: fast", "bpm", None),
        ("duration: 184", "duration_s", 184),
        ("duration: 5", "duration_s", None),
        ("keyscale: H major", "keyscale", None),
        ("genres: jazz", "caption", None),
        ("caption: one\ngenres: jazz, soul\nkeyscale: C major", "caption", "one"),
        ("genres: jazz,  soul", "genres", "jazz, soul"),
        ("keyscale: E\u266d major", "keyscale", "Eb major"),
    ],
)
def test_a_plan_is_parsed_line_by_line(line, field, value):
    assert getattr(plan_format.parse_plan(f"<think>\n{line}\n</think>\n\nbpm: 77"), field) == value


def test_headings_around_the_lyrics_are_removed():
    tail = "</think>\n\n{}<|im_end|>"
    for shown in (
        "[Verse]\nhi\n",
        "# Lyric\n[Verse]\nhi",
        "# Languages\nen\n\n# Lyrics\n[Verse]\nhi",
        "# Lyric\n[Verse]\nhi\n\n# Languages\nen\n",
    ):
        assert plan_format.parse_lyrics(tail.format(shown)) == "[Verse]\nhi"
    assert plan_format.parse_lyrics("<think>\nbpm: 90\n</think>") == ""


def test_lyrics_longer_than_a_request_may_have_are_cut_after_a_line():
    line = "la la la la la la"
    lyrics = plan_format.parse_lyrics("</think>\n\n" + "\n".join([line] * 300))
    assert 4000 < len(lyrics) <= 4096
    assert set(lyrics.split("\n")) == {line}
    assert len(plan_format.parse_lyrics("</think>\n\n" + "la" * 3000)) == 4096


def test_shortened_captions_keep_a_hundred_words_and_512_characters():
    assert plan_format.shorten_caption(" two\n  words\x00 ") == "two words"
    assert plan_format.shorten_caption("w " * 150) == " ".join("w" * 100)
    assert len(plan_format.shorten_caption("abcdefghi " * 90)) <= 512
    assert plan_format.shorten_caption("abcdefghi " * 90).endswith("abcdefghi")
    assert plan_format.shorten_caption("One two three. " * 40).endswith("three.")
    assert len(plan_format.shorten_caption("x" * 600)) == 512


def test_a_long_caption_is_shortened_in_edition_1_only():
    caption = " ".join(["piano"] * 300)
    text = f"<think>\ncaption: {caption}\n</think>"
    assert plan_format.parse_plan(text).caption == caption
    assert plan_format.parse_plan(text, edition=1).caption == " ".join(["piano"] * 85)
    written = plan_format.codes_prompt("p", "l", plan_format.parse_plan(text))
    assert " ".join(written.split()).count("piano") == 300


def test_set_values_stay_and_open_ones_are_filled():
    plan = Plan(92, "Warm piano", 30, "F# minor", "de", "3")
    sung = {"instrumental": False, "lyrics": "la"}
    filled, used = plan_format.fill(song(**sung, bpm=120, keyscale="C major"), plan)
    assert (filled.bpm, filled.keyscale) == (120, "C major")
    assert used == {"prompt": "Warm piano", "timesignature": "3", "vocal_language": "de"}
    assert {name: getattr(filled, name) for name in used} == used
    same, used = plan_format.fill(song(vocal_language="en", timesignature="4"), Plan(language="de"))
    assert (same, used) == (song(vocal_language="en", timesignature="4"), {})


def test_requested_values_are_those_the_request_sets():
    request = song(bpm=120, keyscale="C major", vocal_language="de", timesignature="3")
    assert plan_format.requested_values(request, 12.7) == {
        "bpm": 120, "duration": 12, "keyscale": "C major", "language": "de", "timesignature": "3",
    }  # fmt: skip
    assert plan_format.requested_values(song(), 700) == {"duration": 600}


def test_an_instrumental_takes_no_language_from_its_plan_since_edition_2():
    plan = Plan(language="de")
    for request in (song(instrumental=True), song(instrumental=False, lyrics=" \n")):
        assert plan_format.fill(request, plan)[0].vocal_language == "unknown"
        assert plan_format.fill(request, plan, edition=1)[0].vocal_language == "de"
    assert plan_format.fill(song(instrumental=False, lyrics="la"), plan)[1] == {
        "vocal_language": "de"
    }


def test_detected_lyrics_fill_only_a_song_that_has_none():
    words, plan = "[verse]\nla la", Plan(language="de")
    filled, used = plan_format.fill(song(instrumental=False, lyrics=""), plan, words)
    assert used == {"lyrics": words, "vocal_language": "de"}
    assert effective_lyrics(filled) == words
    for kept in (song(instrumental=True, lyrics=""), song(instrumental=False, lyrics="own")):
        assert plan_format.fill(kept, plan, words)[0].lyrics == kept.lyrics


def test_empty_lyrics_mean_an_instrumental_and_a_note_says_so():
    blank = song(instrumental=False, lyrics=" \n")
    assert effective_lyrics(blank) == INSTRUMENTAL
    assert effective_lyrics(blank, edition=1) == " \n"
    assert "instrumental" in lyrics_note(blank)
    assert lyrics_note(blank, edition=1) == ""
    sung = song(instrumental=False, lyrics="la")
    assert (effective_lyrics(sung), lyrics_note(sung)) == ("la", "")
    marked = song(instrumental=True, lyrics="la")
    assert effective_lyrics(marked, edition=1) == effective_lyrics(marked) == INSTRUMENTAL
    assert "left out" in lyrics_note(marked)
    assert lyrics_note(song(instrumental=True, lyrics="")) == ""


METAS = {"bpm", "keyscale", "timesignature"}


@pytest.mark.parametrize(
    ("mode", "values", "edition", "fields"),
    [
        ("generate", {"instrumental": True}, 2, METAS | {"language"}),
        ("generate", {"instrumental": True}, 1, METAS),
        ("generate", {"use_cot_caption": True}, 2, METAS | {"language", "caption"}),
        ("generate", {"bpm": 90, "keyscale": "C major"}, 2, {"timesignature", "language"}),
        ("generate", {"use_cot_metas": False, "use_cot_language": False}, 2, set()),
        ("cover", {"thinking": False}, 2, set()),
        ("cover", {"prompt": ""}, 2, METAS | {"language", "caption", "genres"}),
        ("cover", {"prompt": ""}, 1, METAS | {"language", "caption"}),
        ("extend", {"vocal_language": "de"}, 2, METAS),
        ("edit", {"kind": "morph"}, 2, METAS | {"language", "caption", "genres"}),
    ],
)
def test_fields_left_to_the_planner(mode, values, edition, fields):
    given = {"prompt": "lofi", "thinking": True, **values}
    given |= {} if mode == "generate" else {"source": "a.wav"}
    request = MODES[mode].of(given)
    assert plan_format.requested_fields(request, edition) == fields


@pytest.mark.parametrize("mode", HELPERS)
def test_helpers_ask_for_every_field(mode):
    request = HELPERS[mode].of({"source": "a.wav"} if mode == "listen" else {})
    assert plan_format.requested_fields(request) == set(plan_format.FIELDS)


@pytest.mark.parametrize(
    ("mode", "values", "detects"),
    [
        ("cover", {"use_cot_lyrics": True}, True),
        ("cover", {}, False),
        ("cover", {"use_cot_lyrics": True, "thinking": False}, False),
        ("cover", {"use_cot_lyrics": True, "lyrics": "la"}, False),
        ("cover", {"use_cot_lyrics": True, "instrumental": True}, False),
        ("edit", {"use_cot_lyrics": True}, True),
        ("edit", {"use_cot_lyrics": True, "lyrics": "la"}, False),
        ("edit", {"use_cot_lyrics": True, "lyrics": "la", "kind": "morph"}, True),
        ("extend", {}, False),
        ("generate", {}, False),
        ("listen", {}, False),
        ("listen", {"transcribe": True}, True),
    ],
)
def test_lyrics_are_detected_only_on_request_and_where_there_is_a_place_for_them(
    mode, values, detects
):
    given = {"prompt": "lofi", "thinking": True} if mode in MODES else {}
    given |= {} if mode == "generate" else {"source": "a.wav"}
    request = (MODES | HELPERS)[mode].of({**given, **values})
    assert plan_format.requests_lyrics(request) is detects
