"""The planner's score of audio codes, against transformers and by hand."""

from __future__ import annotations

import math

import pytest
import tiny_planner
import torch
from conftest import drain
from tiny_planner import CODEBOOK

from core.music import INSTRUMENTAL
from core.results import Progress
from models import plan_format, scoring
from models.plan_format import Plan
from models.planner import Planner
from models.scoring import PlannerScore, score_codes

PLAN = Plan(92, "A calm piano: piece", 30, "F# minor", "no", "4")
LYRICS = "[Verse]\nmorning light is on the water\n"
CODES = [1, 2, 3, 30, 2, 2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tiny_planner.write(tmp_path_factory.mktemp("planner") / "tiny")
    return drain(Planner.load(folder, CODEBOOK, "cpu", "float32"))


def reference(tiny, user, target):
    """Mean log-probability and top-10 recall of a text, from one whole pass of transformers."""
    prompt = (
        "<|im_start|>system\n# Instruction\nUnderstand the given musical conditions and describe "
        "the audio semantics accordingly:\n\n<|im_end|>\n<|im_start|>user\n"
        f"{user}<|im_end|>\n<|im_start|>assistant\n"
    )
    offset = len(tiny.vocabulary.encode(prompt))
    ids = torch.tensor(tiny.vocabulary.encode(prompt + target))
    with torch.inference_mode():
        logits = tiny.model(ids[None]).logits[0, offset - 1 : -1].float()
    log_probabilities, recalls = [], []
    for row, token in zip(logits, ids[offset:].tolist(), strict=True):
        log_probabilities.append(float(row.log_softmax(0)[token]))
        top = row.topk(10).indices.tolist()
        recalls.append(1 - top.index(token) / 10 if token in top else 0.0)
    return sum(log_probabilities) / len(ids[offset:]), sum(recalls) / len(recalls)


def test_the_score_equals_the_authors_formulas(tiny):
    user = "".join(f"<|audio_code_{code}|>" for code in CODES)
    caption = "<think>\ncaption: 'A calm piano: piece'\n</think>\n"
    lyrics = f"<think>\n</think>\n# Lyric\n{LYRICS}\n"
    expected = []
    for target in (caption, lyrics):
        information = reference(tiny, user, target)[0] - reference(tiny, "NO USER INPUT", target)[0]
        expected.append(1 / (1 + math.exp(-information / 0.5)))
    found = drain(score_codes(tiny, CODES, PLAN, LYRICS))
    assert [found.caption, found.lyrics] == pytest.approx(expected, abs=1e-5)
    values = {
        "bpm": 92, "duration": 30, "keyscale": "F# minor", "language": "'no'", "timesignature": 4,
    }  # fmt: skip
    assert found.metadata == pytest.approx(
        {
            name: reference(tiny, user, f"<think>\n{name}: {value}\n</think>\n")[1]
            for name, value in values.items()
        },
        abs=1e-6,
    )
    assert found.perplexity["caption"] == pytest.approx(
        math.exp(-reference(tiny, user, caption)[0]), rel=1e-4
    )
    assert 0 < found.total < 1


def test_long_texts_are_measured_in_chunks_with_the_same_result(tiny, monkeypatch):
    whole = drain(score_codes(tiny, CODES, PLAN, LYRICS))
    monkeypatch.setattr(scoring, "LOGITS_CHUNK", 5)
    chunked = drain(score_codes(tiny, CODES, PLAN, LYRICS))
    assert (chunked.caption, chunked.lyrics) == pytest.approx((whole.caption, whole.lyrics))
    assert chunked.metadata == pytest.approx(whole.metadata)


def test_the_total_is_a_weighted_mean_of_what_is_known():
    assert PlannerScore().total is None
    assert PlannerScore(caption=0.8).total == pytest.approx(0.8)
    assert PlannerScore(caption=0.8, lyrics=0.4).total == pytest.approx((0.4 + 0.12) / 0.8)
    metadata = {"bpm": 1.0, "keyscale": 0.5}
    assert PlannerScore(0.8, 0.4, metadata).total == pytest.approx(0.4 + 0.12 + 0.2 * 0.75)
    assert PlannerScore(metadata=metadata).total == pytest.approx(0.75)


@pytest.mark.parametrize("lyrics", ["", " \n", INSTRUMENTAL])
def test_an_instrumental_has_no_score_for_lyrics(tiny, lyrics):
    found = drain(score_codes(tiny, CODES, Plan(bpm=92), lyrics))
    assert (found.caption, found.lyrics, found.perplexity) == (None, None, {})
    assert found.total == found.metadata["bpm"]


def test_nothing_known_is_nothing_scored(tiny):
    assert drain(score_codes(tiny, CODES, Plan(), "")) == PlannerScore()


def test_other_codes_have_another_score(tiny):
    one, other = (drain(score_codes(tiny, codes, PLAN, LYRICS)) for codes in (CODES, [9] * 6))
    assert one.total != other.total


def test_codes_that_do_not_fit_are_cut_and_texts_that_do_not_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "context_length", 200)
    cut = drain(score_codes(tiny, CODES * 100, Plan(bpm=92), ""))
    empty = len(tiny.vocabulary.encode(plan_format.understand_prompt(())))
    text = len(tiny.vocabulary.encode("<think>\nbpm: 92\n</think>\n"))
    fitting = (CODES * 100)[: 200 - empty - text]
    assert cut == drain(score_codes(tiny, fitting, Plan(bpm=92), ""))
    with pytest.raises(ValueError, match="tokens"):
        drain(score_codes(tiny, CODES, PLAN, LYRICS * 20))
    with pytest.raises(ValueError, match="0 to 39"):
        drain(score_codes(tiny, [CODEBOOK], PLAN, ""))


def test_progress_counts_the_texts_up_to_the_end(tiny):
    seen = list(score_codes(tiny, CODES, PLAN, LYRICS))
    assert all(isinstance(event, Progress) and event.stage == "Scoring" for event in seen)
    assert {event.steps for event in seen} == {9}
    steps = [event.step for event in seen]
    assert steps == sorted(steps)
    assert steps[-1] == 9
