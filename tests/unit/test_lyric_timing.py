"""Times of lyrics from attention maps whose path is known, and from maps that have none."""

from __future__ import annotations

import re

import numpy as np
import pytest

from models.lyric_timing import best_path, time_lyrics

FRAME_S = 0.08

VERSES = """[verse]
Streetlights hum a tune I know
Every window keeps it low

[chorus - soft]
Carry me home, carry me slow
Rain on the roof and nowhere to go

[verse 2]
Somebody whistles under the stairs
Nobody listens and nobody cares

[chorus - soft]
Carry me home, carry me slow
Rain on the roof and nowhere to go"""


def tokens_of(lyrics: str) -> list[tuple[int, int]]:
    """Words with the space before them, tags, line ends and single CJK characters, like a
    tokenizer's."""
    pattern = r"\[[^\]]*\]|\n+|[\u3040-\u9fff]| ?[^\s\[\u3040-\u9fff]{1,5}"
    return [match.span() for match in re.finditer(pattern, lyrics)]


def song(lyrics, seed=0, frames=700, intro=60, outro=40, unsung=(), heads=3, noise=0.01):
    """Maps [heads, tokens, frames] of a song, and the frames of each token, none where not sung.

    Every token is attended to for at least two frames; tags, line ends and the text in `unsung`
    have none. Heads attend to some tokens throughout, and are noisy.
    """
    generator = np.random.default_rng(seed)
    spans = tokens_of(lyrics)
    silent = [lyrics.find(text) for text in unsung]
    silent = [(at, at + len(text)) for at, text in zip(silent, unsung, strict=True)]
    sung = [
        i
        for i, (a, b) in enumerate(spans)
        if lyrics[a:b].strip()
        and lyrics[a] != "["
        and not any(start <= a < end for start, end in silent)
    ]
    spare = frames - intro - outro - 2 * len(sung)
    longer = generator.multinomial(spare, np.full(len(sung), 1 / len(sung)))
    edges = intro + np.concatenate([[0], np.cumsum(2 + longer)])
    clean, places = np.zeros((len(spans), frames)), {}
    for n, token in enumerate(sung):
        places[token] = (int(edges[n]), int(edges[n + 1]))
        clean[token, edges[n] : edges[n + 1]] = 0.3
    maps = clean * generator.uniform(0.4, 1, (heads, 1, frames))
    maps += generator.exponential(noise, maps.shape) + generator.uniform(0, 0.1, (len(spans), 1))
    return maps, spans, places


def expected(lyrics, spans, places, text, occurrence=0):
    """First and last frame of a piece of the lyrics."""
    at = [m.start() for m in re.finditer(re.escape(text), lyrics)][occurrence]
    inside = [i for i, (a, b) in enumerate(spans) if b > at and a < at + len(text) and i in places]
    return places[inside[0]][0], places[inside[-1]][1]


def check(lyrics, lines, spans, places):
    """Every line and word within a frame of where it was put."""
    seen = dict.fromkeys((line.text for line in lines), 0)
    for line in lines:
        start, end = expected(lyrics, spans, places, line.text, seen[line.text])
        seen[line.text] += 1
        assert line.start_s == pytest.approx(start * FRAME_S, abs=FRAME_S + 1e-6)
        assert line.end_s == pytest.approx(end * FRAME_S, abs=FRAME_S + 1e-6)
        assert line.sung
        assert line.confidence > 0.8
        assert line.words[0].start_s == line.start_s
        assert all(line.start_s <= word.start_s <= word.end_s <= line.end_s for word in line.words)


@pytest.mark.parametrize("heads", [1, 7])
def test_lines_and_words_are_found_within_a_frame(heads):
    maps, spans, places = song(VERSES, heads=heads)
    lines = time_lyrics(maps, VERSES, spans, FRAME_S)
    assert [line.text for line in lines] == [
        text for text in VERSES.split("\n") if text and text[0] != "["
    ]
    check(VERSES, lines, spans, places)
    words = lines[0].words
    assert [word.text for word in words] == "Streetlights hum a tune I know".split()
    for word in words[1:]:
        start, end = expected(VERSES, spans, places, f" {word.text}")
        assert word.start_s == pytest.approx(start * FRAME_S, abs=FRAME_S + 1e-6)
        assert word.end_s == pytest.approx(end * FRAME_S, abs=FRAME_S + 1e-6)


def test_a_repeated_line_that_attention_cannot_tell_apart_is_found_both_times():
    maps, spans, places = song(VERSES)
    first, second = (
        [i for i, (a, b) in enumerate(spans) if start <= a < start + 62 and b > start]
        for start in (m.start() for m in re.finditer("Carry me home, carry me slow", VERSES))
    )
    either = np.maximum(maps[:, first], maps[:, second])
    maps[:, first] = maps[:, second] = either
    lines = time_lyrics(maps, VERSES, spans, FRAME_S)
    check(VERSES, lines, spans, places)


def test_lines_that_are_not_sung_are_listed_and_flagged():
    missing = "Nobody listens and nobody cares"
    maps, spans, _ = song(VERSES, unsung=[missing])
    lines = time_lyrics(maps, VERSES, spans, FRAME_S)
    assert [line.text for line in lines if not line.sung] == [missing]
    assert len(lines) == 8
    flagged = next(i for i, line in enumerate(lines) if not line.sung)
    assert lines[flagged - 1].end_s <= lines[flagged].start_s <= lines[flagged + 1].start_s
    starts = [line.start_s for line in lines]
    assert starts == sorted(starts)


def test_words_of_scripts_without_spaces_are_single_characters():
    lyrics = "[verse]\n歌う夜の街を歩く、\n星が見える\n[chorus]\n遠い空の下で"
    maps, spans, places = song(lyrics, frames=300)
    lines = time_lyrics(maps, lyrics, spans, FRAME_S)
    assert [line.text for line in lines] == ["歌う夜の街を歩く、", "星が見える", "遠い空の下で"]
    check(lyrics, lines, spans, places)
    assert [word.text for word in lines[0].words] == [*"歌う夜の街を歩", "く、"]


def test_tags_within_a_line_and_lines_of_tags_alone_are_left_out():
    lyrics = "[intro] [soft]\n[verse] Over the sea we row [whispered]\n\nand over the hill we go"
    maps, spans, _ = song(lyrics, frames=200, intro=20, outro=20)
    lines = time_lyrics(maps, lyrics, spans, FRAME_S)
    assert [line.text for line in lines] == ["Over the sea we row", "and over the hill we go"]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["flat", "noise", "one head of noise", "sparse", "backwards"])
def test_maps_that_follow_no_order_give_no_times(kind, seed):
    generator = np.random.default_rng(seed)
    good, spans, _ = song(VERSES, frames=400)
    maps = {
        "flat": np.full(good.shape, 1 / len(spans)),
        "noise": generator.random(good.shape),
        "one head of noise": generator.random((1, *good.shape[1:])),
        "sparse": (generator.random(good.shape) > 0.99).astype(float),
        "backwards": good[:, ::-1],
    }[kind]
    assert time_lyrics(maps, VERSES, spans, FRAME_S) == ()


def test_frames_where_nothing_new_is_sung_are_not_used():
    """An extended song: its first half has other words, which may resemble the new ones."""
    maps, spans, places = song(VERSES, intro=300)
    maps[:, :, :300] += np.flip(maps[:, :, 300:600], 2)
    within = np.arange(700) >= 300
    lines = time_lyrics(maps, VERSES, spans, FRAME_S, within)
    check(VERSES, lines, spans, places)


def test_more_tokens_than_frames_skip_what_they_must():
    path = best_path(np.eye(12)[:, ::3], 0.05)
    assert [*path] == [0, 3, 6, 9]
