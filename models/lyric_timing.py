"""When each line and word of the lyrics is sung, from the transformer's attention to them.

Pure numpy. The attention of some heads follows the lyrics while the song goes on; a monotone path
through it, found by dynamic programming as in dynamic time warping, gives the times. Where the
attention is flat or follows no order, there are no times: wrong ones would look like right ones.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from core.results import LyricLine, LyricWord
from core.text import SPACELESS, is_mark

if TYPE_CHECKING:
    import numpy as np

SKIP_COST = 0.05
"""Cost of a token without a frame, as a share of the strongest attention in a usual frame. Tags,
punctuation and lines that are not sung have none; without a cost, noise would skip at will."""

LEAST_ORDER, LEAST_DEVIATIONS = 0.3, 3.5
"""Least order of a map that gets times, and how many standard deviations more it must have than the
same map without order. See `order_of`."""

SHUFFLES = 16
"""Maps without order that a map is compared with."""

MOST_OF_ONE = 2
"""Where the order is judged, no token counts more than this many usual ones."""

COARSE = (192, 384)
"""Tokens and frames of the map on which the order is judged; larger maps are averaged down."""

LEAST_SUNG = 0.3
"""Least confidence of a line that counts as sung."""

LEAST_ENERGY, LEAST_SHARE = 0.15, 0.5
"""Least attention to a line while it is sung: as a share of the usual attention to what is sung, and
of the strongest to any word at that time."""

TAG = re.compile(r"\[[^\]\n]*\]")
"""A section tag, which is read by the model and not sung."""


def time_lyrics(
    maps: Iterable[np.ndarray],
    lyrics: str,
    spans: Sequence[tuple[int, int]],
    frame_s: float,
    within: np.ndarray | None = None,
) -> tuple[LyricLine, ...]:
    """Times of every line of `lyrics` but section tags; nothing where the maps do not show them.

    Args:
        maps: the attention of each head, [tokens, frames], from each frame to each token.
        spans: where each token stands in `lyrics`, as first and last + 1 character.
        frame_s: seconds from one frame to the next.
        within: bool [frames], where these lyrics can be sung; everywhere if None.

    Returns:
        The lines in the order of the lyrics. One without a place of its own has no length.
    """
    energy = energy_of(maps)
    if within is not None:
        energy = energy * within
    path = align(energy)
    if path is None:
        return ()
    lines = split_lines(lyrics, spans)
    same = defaultdict(set)
    for line in lines:
        same[line.text.casefold()].update(i for tokens in line.tokens for i in tokens)
    least = _least(energy)
    return tuple(
        _timed(line, sorted(same[line.text.casefold()]), path, energy, least, frame_s)
        for line in lines
    )


def has_lines(lyrics: str) -> bool:
    """Whether there is anything to sing in `lyrics`."""
    sung = TAG.sub("", lyrics)
    return bool(sung.strip())


def energy_of(maps: Iterable[np.ndarray]) -> np.ndarray:
    """How much more than usual each frame attends to each token, [tokens, frames], mean of heads.

    Of each head's map the median of every token over time is taken away, then that of every frame
    over the tokens: what attends to a token throughout, or to all tokens at once, follows nothing.
    A head that follows the lyrics has stronger attention than one that does not, so the mean needs
    no weights, and one head is enough.
    """
    import numpy as np

    total, heads = None, 0
    for attention in maps:
        above = attention.astype(np.float32)
        above = np.maximum(above - np.median(above, axis=1, keepdims=True), 0)
        above = np.maximum(above - np.median(above, axis=0, keepdims=True), 0)
        total, heads = above if total is None else total + above, heads + 1
    if total is None:
        raise ValueError("no maps")
    return total / heads


def align(energy: np.ndarray) -> np.ndarray | None:
    """The token of each frame by `best_path`; None where the map has too little order."""
    order, deviations = order_of(energy)
    if order < LEAST_ORDER or deviations < LEAST_DEVIATIONS:
        return None
    return best_path(energy, _skip_cost(energy))


def order_of(energy: np.ndarray) -> tuple[float, float]:
    """How well the energy of a map follows the order of its tokens.

    A monotone path through the map is compared with paths through maps in which every token's
    energy was moved to a random time. Each token keeps its own course there, so that the comparison
    holds for smooth maps and for few tokens too.

    Returns:
        The share of what a path without order could not collect, 0 for noise and 1 where all of the
        strongest attention lies on one path; and by how many standard deviations the path collects
        more than those of the other maps do.
    """
    import numpy as np

    coarse = _averaged(_averaged(energy, COARSE[0]).T, COARSE[1]).T
    # A tag that holds an intro would outweigh all words together.
    sums = coarse.sum(axis=1, keepdims=True)
    coarse = coarse * np.minimum(1, MOST_OF_ONE * sums.mean() / np.maximum(sums, 1e-12))
    upper = float(coarse.max(axis=0, initial=0.0).sum())
    if upper <= 0:
        return 0.0, 0.0
    generator, frames = np.random.default_rng(0), np.arange(coarse.shape[1])
    shifts = generator.integers(0, len(frames), (SHUFFLES, coarse.shape[0], 1))
    moved = np.take_along_axis(coarse[None], (frames - shifts) % len(frames), axis=2)
    found, *by_chance = _best_sums(np.concatenate([coarse[None], moved]), _skip_cost(coarse))
    more = found - float(np.mean(by_chance))
    return (
        more / max(upper - float(np.mean(by_chance)), 1e-9 * upper),
        more / max(float(np.std(by_chance)), 1e-9 * upper),
    )


def _best_sums(energies: np.ndarray, skip_cost: float) -> np.ndarray:
    """The sum of energy less skips of the best path through each map.

    Args:
        energies: [maps, tokens, frames].
    """
    import numpy as np

    ramp = skip_cost * np.arange(energies.shape[1])
    columns = np.ascontiguousarray(energies.transpose(2, 0, 1))
    best = columns[0] - ramp
    for column in columns[1:]:
        highest = np.maximum.accumulate(best + ramp, axis=1)
        np.maximum(best[:, 1:], highest[:, :-1] - ramp[:-1], out=best[:, 1:])
        best += column
    return (best - ramp[::-1]).max(axis=1)


def _skip_cost(energy: np.ndarray) -> float:
    import numpy as np

    strongest = energy.max(axis=0)
    return SKIP_COST * float(strongest[strongest >= np.median(strongest)].mean())


def _averaged(values: np.ndarray, most: int) -> np.ndarray:
    """`values` with neighbouring rows averaged, so that there are at most `most`."""
    import numpy as np

    parts = np.linspace(0, len(values), min(len(values), most) + 1).astype(int)
    sums = np.add.reduceat(values, parts[:-1], axis=0)
    return sums / np.diff(parts)[:, None]


def best_path(energy: np.ndarray, skip_cost: float) -> np.ndarray:
    """The token of each frame, never falling, with the largest sum of energy less skips.

    From one frame to the next the path stays, goes to the next token, or skips tokens, each at
    `skip_cost`; so does it at both ends. Ties stay.

    Args:
        energy: [tokens, frames].

    Returns:
        int [frames].
    """
    import numpy as np

    count, length = energy.shape
    position = np.arange(count)
    ramp = skip_cost * position
    columns = np.ascontiguousarray(energy.T, dtype=np.float64)
    came_from = np.empty((length, count), np.int32)
    best = columns[0] - ramp
    for frame in range(1, length):
        # Of all tokens before, the one to come from: their sums, less a skip for each in between.
        lifted = best + ramp
        highest = np.maximum.accumulate(lifted)
        source = np.maximum.accumulate(np.where(lifted == highest, position, 0))
        moved = np.empty(count)
        moved[0] = -np.inf
        moved[1:] = highest[:-1] - ramp[:-1]
        stays = best >= moved
        came_from[frame, 0] = 0
        came_from[frame, 1:] = np.where(stays[1:], position[1:], source[:-1])
        best = np.where(stays, best, moved) + columns[frame]
    path = np.empty(length, np.int64)
    path[-1] = int(np.argmax(best - skip_cost * position[::-1]))
    for frame in range(length - 1, 0, -1):
        path[frame - 1] = came_from[frame, path[frame]]
    return path


@dataclass(frozen=True)
class TextLine:
    """A line of the lyrics, its words, and the tokens of each word, which follow each other."""

    text: str
    words: tuple[str, ...]
    tokens: tuple[range, ...]


def split_lines(lyrics: str, spans: Sequence[tuple[int, int]]) -> list[TextLine]:
    """The lines that can be sung: without section tags, and none that is empty then.

    In scripts without spaces between words, a token that begins with a character of its own is a
    word.

    Args:
        spans: see `time_lyrics`.
    """
    starts = {start for start, _ in spans}
    lines = []
    for line in re.finditer(r"[^\n]+", TAG.sub(lambda tag: " " * len(tag.group()), lyrics)):
        words, tokens = [], []
        for run in re.finditer(r"\S+", line.group()):
            text, first = run.group(), line.start() + run.start()
            cuts = [
                i
                for i, char in enumerate(text)
                if i and SPACELESS.match(char) and not is_mark(char) and first + i in starts
            ]
            for a, b in pairwise((0, *cuts, len(text))):
                words.append(text[a:b])
                tokens.append(_tokens_in(first + a, first + b, spans))
        if words:
            lines.append(TextLine(" ".join(line.group().split()), tuple(words), tuple(tokens)))
    return lines


def _tokens_in(start: int, end: int, spans: Sequence[tuple[int, int]]) -> range:
    """The tokens that share characters with this part of the lyrics."""
    touching = [i for i, (a, b) in enumerate(spans) if b > start and a < end]
    return range(touching[0], touching[-1] + 1) if touching else range(0)


def _least(energy: np.ndarray) -> float:
    """The attention above which a frame shows that something is sung."""

    strongest = energy.max(axis=0)
    return LEAST_ENERGY * float((strongest**2).sum() / strongest.sum())


def _timed(
    line: TextLine,
    same: Sequence[int],
    path: np.ndarray,
    energy: np.ndarray,
    least: float,
    frame_s: float,
) -> LyricLine:
    """The times of a line and of its words: while the attention on `path` is on them.

    Args:
        same: the tokens of all lines that read like this one: attention to those is no sign
            against it.
        least: by `_least`.
    """
    import numpy as np

    rows = sorted(i for tokens in line.tokens for i in tokens)
    first, last = (rows[0], rows[-1] + 1) if rows else (0, 0)
    begin, end = (int(i) for i in np.searchsorted(path, (first, last)))
    inside = energy[:, begin:end]
    strongest = inside.max(axis=0, initial=0.0)
    total = float(strongest.sum())
    own = np.isin(inside.argmax(axis=0), same) if begin < end else np.zeros(0, bool)
    confidence = float(strongest[own].sum()) / total if total > 0 else 0.0
    loudest = energy[rows].max(axis=0, initial=0.0)
    on_it = (loudest > least) & (loudest >= LEAST_SHARE * energy.max(axis=0, initial=0.0))
    words, now = [], begin
    for text, tokens in zip(line.words, line.tokens, strict=True):
        bounds = np.searchsorted(path, (tokens.start, tokens.stop))
        start, stop = (max(now, int(i)) for i in bounds)
        a, b = _loudest_part(np.where(on_it[start:stop], 1.0, -1.0))
        words.append((text, start + a, start + b))
        now = start + b
    timed = [(start, stop) for _, start, stop in words if start < stop]
    begin, end = (timed[0][0], timed[-1][1]) if timed else (begin, begin)
    return LyricLine(
        text=line.text,
        start_s=_at(begin, frame_s),
        end_s=_at(end, frame_s),
        words=tuple(
            LyricWord(
                text=text,
                start_s=_at(min(max(start, begin), end), frame_s),
                end_s=_at(min(max(stop, begin), end), frame_s),
            )
            for text, start, stop in words
        ),
        confidence=round(min(confidence, 1.0), 3),
        sung=confidence >= LEAST_SUNG,
    )


def _loudest_part(values: np.ndarray) -> tuple[int, int]:
    """The part of `values` with the largest sum, as first and last + 1; (0, 0) where all are < 0.

    So a word does not reach into the music before or after it for a frame of noise there.
    """
    import numpy as np

    sums = np.concatenate([[0.0], np.cumsum(values)])
    gains = sums - np.minimum.accumulate(sums)
    end = int(gains.argmax())
    return int(sums[: end + 1].argmin()), end


def _at(frame: int, frame_s: float) -> float:
    return round(frame * frame_s, 3)
