"""How well a song's audio codes fit its caption, lyrics and metadata, by the planner's probabilities.

The authors' score of a take: the planner is shown the codes as when it describes a song, and what
the song was to be is measured as the answer. Higher is better; scores rank takes of one request and
say nothing by themselves. Source: the authors' `acestep/core/scoring/lm_score.py`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from core.music import INSTRUMENTAL
from core.results import Progress
from models import plan_format, qwen3
from models.plan_format import THINK_END, THINK_START, Plan
from models.planner import PROMPT_CHUNK, Planner

if TYPE_CHECKING:
    import torch


STAGE = "Scoring"


TOP_K = 10
"""How far down the list of most likely tokens a metadata token still counts."""


SCALE = 0.5
"""Pointwise mutual information, in nats a token, that makes a score of 0.73. Source: the default of
the authors' page."""


WEIGHTS = {"caption": 0.5, "lyrics": 0.3, "metadata": 0.2}


LOGITS_CHUNK = 128
"""Tokens whose logits over the whole vocabulary are held at a time: 0.1 GB of float32."""


@dataclass(frozen=True)
class TargetStatistics:
    """A target text under the planner, after one prompt.

    Attributes:
        log_probability: natural logarithm, mean over the tokens.
        recall: mean over the tokens of 1 - (rank - 1) / `TOP_K`, 0 beyond the `TOP_K` most likely.
    """

    log_probability: float
    recall: float

    @property
    def perplexity(self) -> float:
        """exp of the negative mean log-probability."""
        return math.exp(-self.log_probability)


@dataclass(frozen=True)
class PlannerScore:
    """Scores from 0 to 1; None where there was nothing to score.

    Attributes:
        caption, lyrics: the logistic function of the pointwise mutual information with the codes,
            that is how much likelier the codes make the text, per token. 0.5: not at all.
        metadata: recall by field, of those that the plan knows.
        perplexity: of caption and lyrics given the codes, by name.
    """

    caption: float | None = None
    lyrics: float | None = None
    metadata: dict[str, float] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float | None:
        """The mean of all parts by `WEIGHTS`, over those that exist."""
        metadata = sum(self.metadata.values()) / len(self.metadata) if self.metadata else None
        parts = {"caption": self.caption, "lyrics": self.lyrics, "metadata": metadata}
        known = {name: value for name, value in parts.items() if value is not None}
        if not known:
            return None
        weight = sum(WEIGHTS[name] for name in known)
        return sum(WEIGHTS[name] * value for name, value in known.items()) / weight


def score_codes(
    planner: Planner, codes: Sequence[int], plan: Plan, lyrics: str, scale: float = SCALE
) -> Generator[Progress, None, PlannerScore]:
    """Score audio codes against what their song was to be.

    The codes are read once; of those that leave no room in the context for the longest text, the
    beginning counts. Steps are texts.

    Args:
        codes: five a second.
        plan: with the fields to score.
        lyrics: not scored where they are blank or mark an instrumental.
        scale: see `SCALE`.

    Raises:
        ValueError: a code outside the quantiser, or a text longer than the model's context.
    """
    vocabulary = planner.vocabulary
    if not all(0 <= code < vocabulary.codebook for code in codes):
        raise ValueError(f"codes run from 0 to {vocabulary.codebook - 1}")
    texts = target_texts(plan, lyrics)
    if not texts:
        return PlannerScore()
    targets = {name: vocabulary.encode(text) for name, text in texts.items()}
    longest = max(map(len, targets.values()))
    empty = vocabulary.encode(plan_format.understand_prompt(()))
    room = planner.context_length - len(empty) - longest
    if room < 1:
        raise ValueError(f"the texts take {longest} tokens and the planner reads fewer")
    prompt = vocabulary.encode(plan_format.understand_prompt(codes[:room]))
    unconditional = vocabulary.encode(
        plan_format.chat_prompt(plan_format.UNDERSTAND, plan_format.NO_USER_INPUT)
    )
    compared = {name: ids for name, ids in targets.items() if name in ("caption", "lyrics")}
    steps = len(targets) + len(compared)
    given = yield from _measure(planner, prompt, targets, 0, steps)
    alone = yield from _measure(planner, unconditional, compared, len(targets), steps)
    yield Progress(stage=STAGE, step=steps, steps=steps)
    information = {
        name: given[name].log_probability - alone[name].log_probability for name in compared
    }
    scores = {name: 1 / (1 + math.exp(-value / scale)) for name, value in information.items()}
    return PlannerScore(
        caption=scores.get("caption"),
        lyrics=scores.get("lyrics"),
        metadata={name: given[name].recall for name in targets if name not in compared},
        perplexity={name: given[name].perplexity for name in compared},
    )


def target_texts(plan: Plan, lyrics: str) -> dict[str, str]:
    """The answers whose probability is measured, to the byte as the authors do, by what they hold:
    each field of the plan by itself, and the lyrics."""
    texts = {
        name: f"{THINK_START}\n{_yaml({name: value})}\n{THINK_END}\n"
        for name, value in plan.fields().items()
    }
    if lyrics.strip() and lyrics.strip() != INSTRUMENTAL:
        texts["lyrics"] = f"{THINK_START}\n{THINK_END}\n# Lyric\n{lyrics}\n"
    return texts


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.dump(dict(values), allow_unicode=True, sort_keys=True).strip()


def _measure(
    planner: Planner,
    prompt: Sequence[int],
    targets: Mapping[str, Sequence[int]],
    done: int,
    steps: int,
) -> Generator[Progress, None, dict[str, TargetStatistics]]:
    """Statistics of each target after `prompt`, which is read once."""
    if not targets:
        return {}
    cache = qwen3.KeyValueCache(planner.qwen, [prompt], max(map(len, targets.values())))
    hidden = None
    for chunk in cache.prompts.split(PROMPT_CHUNK, 1):
        yield Progress(stage=STAGE, step=done, steps=steps)
        hidden = planner.qwen.forward(chunk, cache)
    found, length = {}, cache.length
    for name, ids in targets.items():
        cache.length = length
        statistics = yield from _statistics(planner, cache, hidden, ids, done, steps)
        found[name] = statistics
        done += 1
    return found


def _statistics(
    planner: Planner,
    cache: qwen3.KeyValueCache,
    hidden: torch.Tensor,
    ids: Sequence[int],
    done: int,
    steps: int,
) -> Generator[Progress, None, TargetStatistics]:
    """Statistics of one target, teacher-forced after what `cache` holds.

    Args:
        hidden: the hidden state [1, width] of the last token in the cache.
    """
    import torch

    log_probabilities, recalls = [], []
    target = torch.tensor([list(ids)], device=planner.device)
    for chunk in target.split(LOGITS_CHUNK, 1):
        yield Progress(stage=STAGE, step=done, steps=steps)
        states = planner.qwen.forward(chunk, cache, last_only=False)
        # A token is predicted by the state before it.
        before, hidden = torch.cat([hidden[:, None], states[:, :-1]], 1), states[:, -1]
        with torch.inference_mode():
            logits = torch.nn.functional.linear(before[0], planner.output_head).float()
            wanted = logits.gather(1, chunk[0, :, None])
            rank = (logits > wanted).sum(1)  # 0 is the most likely
            log_probabilities.append((wanted[:, 0] - logits.logsumexp(1)).double())
            recalls.append((1 - rank.double() / TOP_K).clamp_min(0))
    return TargetStatistics(
        log_probability=float(torch.cat(log_probabilities).mean()),
        recall=float(torch.cat(recalls).mean()),
    )
