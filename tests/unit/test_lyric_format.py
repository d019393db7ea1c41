"""The format of lyrics and the songwriter's prompt."""

from __future__ import annotations

import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tooltips
from core.errors import StudioError
from core.music import LANGUAGES
from core.requests import Lyrics
from models import lyric_format

SONG = """[verse]
Streetlights hum a tune I know
The river runs and the morning comes

[chorus]
Carry me home, carry me slow
träum süß, 夜空の星

[verse]
Летняя ночь
love and light"""


def request(**changes):
    given = {"brief": "a night on the river", "structure": "verse, chorus", "seed": 7, "lines": 2}
    return Lyrics.of({**given, **changes})


@pytest.mark.parametrize(
    ("structure", "sections"),
    [
        ("verse, chorus, verse", "verse chorus verse"),
        ("Verse 1 / Pre Chorus / CHORUS", "verse pre-chorus chorus"),
        ("verse x2, 2x chorus; outro", "verse verse chorus chorus outro"),
        ("intro - verse - refrain", "intro verse chorus"),
        ("[Verse]\n[Bridge]\n\n", "verse bridge"),
        ("Strophe → Refrain > Brücke", "verse chorus bridge"),
        ("主歌, 副歌", "verse chorus"),
    ],
)
def test_a_structure_is_parsed_from_many_spellings(structure, sections):
    assert lyric_format.parse_structure(structure) == tuple(sections.split())


def test_an_unknown_name_is_a_section_too():
    assert lyric_format.parse_structure("verse, Gospel choir") == ("verse", "gospel choir")
    text = lyric_format.normalise(
        "**Gospel Choir:**\nHallelujah\n\n(Verse 2)\nno more", ["gospel choir"]
    )
    assert text == "[gospel choir]\nHallelujah\n\n[verse]\nno more"
    assert lyric_format.section_names(text, ["gospel choir"]) == ("gospel choir", "verse")


@pytest.mark.parametrize("structure", ["", " , ;", "verse x17", "chorus x999999999"])
def test_no_section_and_more_than_16_are_refused(structure):
    with pytest.raises(StudioError, match="1 to 16 fit") as caught:
        lyric_format.parse_structure(structure)
    assert caught.value.code == "value-out-of-range"


@pytest.mark.parametrize(
    "tag",
    [
        *("[Verse 1]", "[VERSE]", "[ verse ]:", "【Verse】", "(Verse)", "（Verse 2）", "Verse 1:"),
        *("**Verse 1:**", "**[Verse 1]**", "### Verse", "# **Verse 2**", "__Verse__", "Verse 2"),
        *(
            "*[Verse]*",
            "[Verse 1 - softly]",
            "[Verse 2: Anna]",
            "Verse：",
            "[Strophe 2]",
            "(Verse):",
        ),
        *(
            "[verso 1]",
            "[Куплет]",
            "[主歌]",
            "**Verse (x2)**",
            "> [Verse]",
            "- [Verse]",
            "`[Verse]`",
        ),
    ],
)
def test_every_spelling_of_a_tag_becomes_the_standard_one(tag):
    draft = f"Here you are:\n\n{tag}\n\nStreetlights hum\n\n\n{tag}\nCarry me"
    assert lyric_format.normalise(draft) == "[verse]\nStreetlights hum\n\n[verse]\nCarry me"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("Final Chorus", "chorus"),
        ("pre_chorus", "pre-chorus"),
        ("Post Chorus 2", "post-chorus"),
        ("Guitar solo", "solo"),
        ("soft verse", "verse"),
        ("Instrumental", "inst"),
        ("Outro (fade)", "outro"),
        ("softly, with the chorus", ""),
        ("the night before the chorus", ""),
        ("Fade Out", ""),
    ],
)
def test_section_names_are_standardised(words, name):
    assert lyric_format.section_name(words) == name


def test_lyrics_on_the_line_of_a_tag_are_kept():
    assert lyric_format.normalise("[Verse 1] Rain again") == "[verse]\nRain again"
    assert lyric_format.normalise("Chorus: Carry me") == "[chorus]\nCarry me"
    assert lyric_format.normalise("[Chorus] (x2)\nCarry me") == "[chorus]\nCarry me"


@pytest.mark.parametrize(
    "line",
    [
        "Remember: the night is long",
        "(ooh, ooh)",
        "[whispered]",
        "Break my heart",
        "(break it down)",
        "The last verse: it is ours",
        "Drop the bass",
        "The chorus of the birds",
        "Bridge over water",
        "This song is all I have",
        "snake_case and 3 * 4 * 5",
    ],
)
def test_sung_lines_that_look_like_tags_or_comments_stay(line):
    draft = f"[verse]\n{line}\nfar away\n\n{line}\n\n[outro]"
    assert lyric_format.normalise(draft) == draft


def test_markdown_and_comments_are_removed():
    draft = (
        "Sure! Here is a song:\n\n# **Home**\n\n```\n**Verse 1:**\n*Streetlights* hum a **tune**  \n"
        "- Carry me home\r\n> slow<br>\n---\n[Chorus]\nCarry me\ufffd\x07<|im_end|>\n```\n***\n"
        "It has a couplet rhyme.\n\n"
    )
    wanted = "[verse]\nStreetlights hum a tune\nCarry me home\nslow\n\n[chorus]\nCarry me"
    assert lyric_format.normalise(draft) == wanted
    for talk in (
        "Note: the chorus repeats.",
        "Let me know if you want changes!",
        "I hope you like it.\n\nFeel free to ask.",
        "This song follows the AABB scheme.",
    ):
        assert lyric_format.normalise(f"{wanted}\n\n{talk}") == wanted


PIECES = [
    "[Verse 1]",
    "(Chorus)",
    "**",
    "*",
    "_",
    "#",
    "# ",
    "- ",
    "---",
    "`",
    "~~",
    "\n",
    "\n\n",
    ":",
]
PIECES += [
    "Verse:",
    "[",
    "]",
    "love",
    " and ",
    "Note: x",
    "Let me know",
    "1. ",
    "> ",
    "\ufffd",
    "<|",
    "夜",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=80))
def test_normalising_is_idempotent(text):
    once = lyric_format.normalise(text)
    assert lyric_format.normalise(once) == once
    assert not set("\ufffd\r\x00") & set(once)


def test_formatted_lyrics_are_not_changed():
    assert lyric_format.normalise(SONG) == SONG
    assert lyric_format.section_names(SONG) == ("verse", "chorus", "verse")


def test_a_section_counts_if_it_has_lines_or_needs_none():
    text = "[intro]\n\n[verse]\n\n[chorus]\nla\n\n[solo]\n\n[fade out]\n\n[bridge]"
    assert lyric_format.section_names(text) == ("intro", "chorus", "solo")


def test_problems_of_a_draft_are_sentences():
    asked = ("verse", "chorus", "chorus")
    assert lyric_format.structure_problems(asked, asked) == []
    assert lyric_format.structure_problems(asked, ("verse", "outro")) == [
        "These sections are missing: chorus (2 times).",
        "Nobody asked for these sections: outro.",
    ]
    assert lyric_format.structure_problems(asked, ("chorus", "verse", "chorus")) == [
        "The sections are in another order: chorus, verse, chorus."
    ]
    assert lyric_format.line_count_problem(SONG, 2) == ""
    assert lyric_format.line_count_problem(SONG, 3).endswith(
        "verse has 2, chorus has 2, verse has 2."
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_prompt_names_every_language_in_full(language):
    asked = lyric_format.chat_messages(request(language=language))[1][1]
    assert "Language: " in asked
    assert (f"Language: {language}" in asked) is False


PROMPT = """\
Write the lyrics of a song.
About: a night on the river
Language: German
Tone: dry, tender
Rhyme: ABAB, every other line rhymes
Lines in each section: 2
Sections, in this order, each under its tag:
[verse]
[chorus]"""

SYSTEM = (
    "You are a songwriter. You write words that are sung as they stand: short lines under section "
    "tags in square brackets, in English as given, with a blank line between sections. A chorus "
    "comes back with the same words, a verse with new ones. You write no title, no comment and no "
    "markdown."
)

CORRECTION = (
    "These sections are missing: chorus. Nobody asked for these sections: outro. Write the whole "
    "song again. Keep the lines that are good, and use exactly these sections, in this order, each "
    "with 2 lines under its tag:\n[verse]\n[chorus]"
)


def prompts():
    """All that the songwriter is sent for one request, and for the repair of one draft."""
    asked = request(language="de", tone=" dry,\ntender", rhyme="alternate")
    draft = "Sure!\n**Verse 1**\nStreetlights hum\n\n(Outro)\n"
    return lyric_format.chat_messages(asked), lyric_format.repair_messages(asked, draft)


def test_the_prompt_is_this_to_the_byte():
    """Other words mean other lyrics for every seed that was ever used."""
    messages, repair = prompts()
    assert messages == [("system", SYSTEM), ("user", PROMPT)]
    answer = ("assistant", "[verse]\nStreetlights hum\n\n[outro]")
    assert repair == [*messages, answer, ("user", CORRECTION)]


def test_rewording_the_interface_leaves_the_prompt_unchanged(monkeypatch):
    def reworded(value):
        if isinstance(value, dict):
            return {key: reworded(each) for key, each in value.items()}
        return "reworded" if isinstance(value, str) else value

    before = prompts()
    for name, value in vars(tooltips).copy().items():
        if name.isupper():
            monkeypatch.setattr(tooltips, name, reworded(value))
    for field in Lyrics.model_fields.values():
        monkeypatch.setattr(field, "title", "reworded")
    try:
        importlib.reload(lyric_format)  # so that texts taken over on import would show, too
        assert prompts() == before
    finally:
        monkeypatch.undo()
        importlib.reload(lyric_format)
