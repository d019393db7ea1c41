"""Constrained decoding: any logits make a legal plan."""

from __future__ import annotations

import random
import re

import pytest
import tiny_planner
import yaml
from tiny_planner import CODEBOOK

from core.music import KEYS, LANGUAGES, TIME_SIGNATURES
from models.plan_format import FIELDS
from models.plan_grammar import PlanConstraint, Vocabulary


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(tiny_planner.tokenizer(), CODEBOOK)


def write_plan(vocabulary, rng, wanted, given, preferred=None, **more):
    """A plan of random tokens, half of them among the `preferred` ones where they are legal."""
    constraint = PlanConstraint(vocabulary, wanted, given, **more)
    choices = constraint.choices()
    token = None
    try:
        while True:
            choice = choices.send(token)
            favourites = (
                [t for t in preferred or () if t in choice.legal] if rng.random() < 0.5 else ()
            )
            token = rng.choice(favourites or choice.legal)
            if choice.greedy and rng.random() < 0.4:
                token = choice.legal[-1]
    except StopIteration:
        return constraint


def check_legal(constraint, wanted, given):
    text, plan = constraint.text(), constraint.plan()
    assert re.fullmatch(r"<think>\n(.*\n)?</think>", text, re.DOTALL), text
    assert not re.search(r"`|<\|\w+\|>", text)
    begun = [line.partition(":")[0] for line in text.split("\n")[1:-1] if line[:1] not in " \t"]
    assert begun == [field for field in FIELDS if field in wanted or field in given]
    for field, value in given.items():
        assert f"\n{field}: {value}\n" in text
    values = plan.fields()
    assert set(begun) - set(values) <= (
        {
            field
            for field in ("caption", "genres")
            if re.search(rf"\n{field}:[\s'\"\x00-\x1f]+\n", text)
        }
    )
    assert {k: values[k] for k in given} == {
        k: int(v) if k == "timesignature" else v for k, v in given.items()
    }
    assert yaml.safe_load(plan.yaml() or "{}") == values
    assert plan.bpm is None or 30 <= plan.bpm <= 300
    assert plan.duration_s is None or 10 <= plan.duration_s <= 240
    assert plan.keyscale in (None, *KEYS)
    assert plan.language in (None, *LANGUAGES)
    assert plan.timesignature in (None, *TIME_SIGNATURES)
    assert "\n" not in f"{plan.caption}{plan.genres}"


def test_any_logits_make_a_legal_plan(vocabulary):
    values = {
        "bpm": 121, "duration": 31, "keyscale": "Bb major", "language": "no", "timesignature": "6",
    }  # fmt: skip
    awkward = [
        t
        for text in (":", " #", "'", '"', ".\n", "\n", " ", "-", "[")
        for t in vocabulary.encode(text)
    ]
    for seed in range(600):
        rng = random.Random(seed)
        wanted = [field for field in FIELDS if rng.random() < 0.8]
        given = {field: value for field, value in values.items() if rng.random() < 0.2}
        preferred = awkward if seed % 2 else None
        constraint = write_plan(vocabulary, rng, wanted, given, preferred, max_duration_s=240)
        check_legal(constraint, wanted, given)


def test_a_caption_ends_after_512_tokens(vocabulary):
    constraint = PlanConstraint(vocabulary, ["caption"], {"timesignature": "4"})
    assert write_always(constraint, vocabulary.encode("a")[0]) == 512
    assert constraint.text().endswith("a\ntimesignature: 4\n</think>")


def test_genres_end_with_their_line_or_after_48_tokens(vocabulary):
    constraint = PlanConstraint(vocabulary, ["genres"], {"duration": 30, "keyscale": "C major"})
    assert write_always(constraint, vocabulary.encode("a")[0]) == 48
    text = "<think>\nduration: 30\ngenres:{}\nkeyscale: C major\n</think>"
    assert constraint.text() == text.format("a" * 48)
    constraint = PlanConstraint(vocabulary, ["genres"], {"duration": 30, "keyscale": "C major"})
    choices = constraint.choices()
    assert not set(next(choices).legal) & vocabulary.line_ends, "something visible comes first"
    choices.send(vocabulary.encode("a")[0])
    assert send(choices, vocabulary.newline) is None
    assert constraint.text() == text.format("a")
    assert constraint.plan().genres == "a"


def write_always(constraint, token):
    """How often the model is asked if it chooses the same token every time."""
    choices = constraint.choices()
    next(choices)
    return 1 + sum(1 for _ in iter(lambda: send(choices, token), None))


def send(choices, token):
    try:
        return choices.send(token)
    except StopIteration:
        return None


def test_a_caption_needs_something_visible_before_its_line_ends(vocabulary):
    choice = next(PlanConstraint(vocabulary, ["caption"], {}).choices())
    assert not set(choice.legal) & vocabulary.line_ends
    assert vocabulary.encode(".\n")[0] in vocabulary.line_ends


@pytest.mark.parametrize("field", ["bpm", "duration", "keyscale", "language", "timesignature"])
@pytest.mark.parametrize("edition", [1, 2])
def test_the_trie_holds_each_legal_value_and_no_other(vocabulary, field, edition):
    found = []

    def walk(node, path):
        for token, further in node.items():
            if token == vocabulary.newline:
                assert not further
                found.append(vocabulary.decode(path))
            else:
                walk(further, [*path, token])

    walk(vocabulary.value_trie(field, 240, edition), [])
    legal = {
        "bpm": range(30, 301),
        "duration": range(10, 241),
        "keyscale": KEYS if edition == 1 else signed_keys(),
        "language": LANGUAGES,
        "timesignature": TIME_SIGNATURES,
    }[field]
    assert sorted(found) == sorted(f" {value}" for value in legal)


def signed_keys():
    """All notes with all five signs, major and minor."""
    signs = ("", "#", "b", "\u266f", "\u266d")
    return {f"{note}{sign} {mode}" for note in "ABCDEFG" for sign in signs for mode in MODES}


MODES = ("major", "minor")


@pytest.mark.parametrize(
    ("written", "key"), [("E\u266d major", "Eb major"), ("F\u266f minor", "F# minor")]
)
def test_a_key_may_be_written_with_its_sign_and_is_read_in_ascii(vocabulary, written, key):
    def choose(edition):
        constraint = PlanConstraint(vocabulary, ["keyscale"], {}, edition=edition)
        choices, wanted = constraint.choices(), vocabulary.encode_value("keyscale", written)
        choice = next(choices)
        while choice:
            at = len(constraint.tokens) - len(vocabulary.encode("<think>\nkeyscale:"))
            legal = at < len(wanted) and wanted[at] in choice.legal
            choice = send(choices, wanted[at] if legal else choice.legal[0])
        return constraint.plan().keyscale

    assert choose(edition=2) == key
    assert choose(edition=1) in KEYS
    assert choose(edition=1) != key


def test_forced_tokens_are_those_of_the_whole_text(vocabulary):
    given = {"bpm": 121, "caption": "A calm piano", "duration": 31, "keyscale": "Bb major"}
    given |= {"language": "en", "timesignature": "4"}
    constraint = PlanConstraint(vocabulary, [], given)
    assert [*constraint.choices()] == []
    whole = "".join(f"{field}: {value}\n" for field, value in given.items())
    assert constraint.tokens == vocabulary.encode(f"<think>\n{whole}</think>")


def test_the_language_is_chosen_greedily_and_other_values_are_sampled(vocabulary):
    choices = PlanConstraint(vocabulary, ["language"], {}).choices()
    assert next(choices).greedy
    assert not next(PlanConstraint(vocabulary, ["bpm"], {}).choices()).greedy
    assert not next(PlanConstraint(vocabulary, ["keyscale"], {}).choices()).greedy


def test_lyrics_follow_only_if_requested_and_hold_no_codes(vocabulary):
    constraint = write_plan(vocabulary, random.Random(0), [], {"bpm": 90}, lyric_tokens=50)
    assert "</think>\n\n" in constraint.text()
    assert "audio_code" not in constraint.text()
    stopped = write_plan(
        vocabulary, random.Random(0), [], {"bpm": 90}, [vocabulary.stop], lyric_tokens=50
    )
    assert stopped.tokens.index(vocabulary.stop) == len(stopped.tokens) - 1
