"""The songwriter: a language model that writes lyrics word by word.

The model in `models.llm` returns logits; tokens are sampled here, so that seed, temperature and
penalty mean the same on every machine. Prompts and the format of lyrics are in
`models.lyric_format`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import StudioError
from core.requests import Lyrics
from core.results import Progress
from core.text import describe_length
from models import llm, lyric_format, weights
from models.catalog import SongwriterModel
from models.llm import END, EOS, TURN

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer


STOPS = ("\n\n\n", "\nNote:", "\n(Note", TURN, END, EOS)
"""What ends an answer even if the model continues. None of it is ever shown."""


PROMPT_CHUNK = 256
"""Tokens of the prompt read at a time: between two chunks the work can be stopped."""


PROGRESS_INTERVAL_S = 0.05
"""Seconds between two progress events, at least."""


TOP_CANDIDATES = 1024
"""So many of the most likely tokens nearly always reach the probability that top-p keeps."""


LINE_TOKENS, TAG_TOKENS = 40, 8
"""Tokens allowed for a line and for a tag. In scripts that the tokenizer covers badly a line takes
40."""


LOADING, WRITING = "Loading the songwriter", "Writing the words"


@dataclass(frozen=True)
class WrittenLyrics:
    """Formatted lyrics, the sections that were requested, those that were found, and notes."""

    text: str
    requested: tuple[str, ...]
    found: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Songwriter:
    """One loaded songwriter. Not thread-safe: one song at a time, from any thread."""

    def __init__(
        self, writer: SongwriterModel, tokenizer: Tokenizer, model: llm.LanguageModel
    ) -> None:
        self.writer = writer
        self.tokenizer = tokenizer
        self.model = model
        self._turn, self._end = (tokenizer.token_to_id(mark) for mark in (TURN, END))
        tokenizer.encode_special_tokens = True  # special tokens in a brief are plain text

    @classmethod
    def load(
        cls, writer: SongwriterModel, folder: Path, device: str
    ) -> Generator[Progress, None, Songwriter]:
        """Load the songwriter in `folder`, and check that it is complete.

        Args:
            device: "cpu", "cuda" or "mps". bfloat16 on CUDA, else float32; MLX has one device of
                its own, and its weights are quantised.

        Raises:
            StudioError: `model-broken`, `model-mismatch`, `writer-memory`.
        """
        yield Progress(stage=LOADING, step=0, steps=2)
        config, tokenizer = llm.check_files(writer, folder)
        yield Progress(stage=LOADING, step=1, steps=2)
        with llm.memory_errors(writer, device):
            kind = llm.MlxModel if writer.engine == "mlx" else llm.TransformersModel
            model = kind(writer, folder, config, device)
        yield Progress(stage=LOADING, step=2, steps=2)
        return cls(writer, tokenizer, model)

    def write(self, request: Lyrics) -> Generator[Progress, None, WrittenLyrics]:
        """Write the lyrics of a song. Each `Progress` holds the text so far; closing stops between
        two words.

        Args:
            request: with its seed set. The same request makes the same text.

        Raises:
            StudioError: `value-out-of-range` for the structure, `lyrics-too-long`, `writer-memory`.
        """
        return (yield from self._answer(request, lyric_format.chat_messages(request)))

    def repair(self, request: Lyrics, text: str) -> Generator[Progress, None, WrittenLyrics]:
        """Write a draft with faults again, given what is wrong with it.

        Args:
            text: the draft, in any format. Request, seed and draft decide the answer.

        Returns, Raises: as `write`.
        """
        return (yield from self._answer(request, lyric_format.repair_messages(request, text)))

    def close(self) -> None:
        """Free the memory. The songwriter cannot be used after that."""
        self.model.close()

    def _answer(
        self, request: Lyrics, messages: Sequence[tuple[str, str]]
    ) -> Generator[Progress, None, WrittenLyrics]:
        requested = lyric_format.parse_structure(request.structure)
        limit = len(requested) * (request.lines * LINE_TOKENS + TAG_TOKENS)
        prefix = lyric_format.answer_prefix(requested)
        ids = self._encode_chat(messages) + self._encode(prefix)
        context_length = self.model.context_length
        room = context_length - len(ids)
        if room < len(requested) * TAG_TOKENS:
            text = "\n".join(text for _, text in messages)
            length = describe_length(text, 0.8 * context_length / len(ids))
            raise StudioError(
                "lyrics-too-long", tokens=len(ids), limit=context_length, length=length
            )
        draft = _Draft(self.tokenizer, prefix)
        with llm.memory_errors(self.writer, self.model.device):
            for _ in self._tokens(ids, draft, request, min(limit, room)):
                text = lyric_format.normalise(draft.shown, requested)
                step = min(len(lyric_format.section_names(text, requested)), len(requested))
                yield Progress(stage=WRITING, step=step, steps=len(requested), text=text)
        text = lyric_format.normalise(draft.text, requested)
        notes = [] if draft.ended else ["The songwriter did not come to an end and was cut off."]
        if problem := lyric_format.line_count_problem(text, request.lines, requested):
            notes.append(problem)
        found = lyric_format.section_names(text, requested)
        return WrittenLyrics(text, requested, found, tuple(notes))

    def _tokens(self, ids: list[int], draft: _Draft, request: Lyrics, limit: int) -> Iterator[None]:
        """Add up to `limit` tokens to `draft`. Yields whenever there is more to show."""
        import numpy as np

        if request.seed is None:
            raise ValueError("the request has no seed")
        random = np.random.Generator(np.random.PCG64(request.seed))
        self.model.reset()
        logits, reported = None, time.monotonic()
        for start in range(0, len(ids), PROMPT_CHUNK):
            yield
            logits = self.model.forward(ids[start : start + PROMPT_CHUNK])
        for _ in range(limit):
            if not np.isfinite(logits.max()):
                raise weights.broken(self.writer, "it", "answers with no finite numbers")
            token = sample_token(logits, draft.penalised, random.random(), request)
            draft.add(token)
            if draft.ended:
                break
            logits = self.model.forward([token])
            if time.monotonic() - reported > PROGRESS_INTERVAL_S:
                reported = time.monotonic()
                yield
        yield

    def _encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """A conversation in ChatML, as tokens, with the assistant's turn open."""
        ids, line = [], self._encode("\n")
        for role, text in messages:
            ids += [self._turn, *self._encode(f"{role}\n{text}"), self._end, *line]
        return [*ids, self._turn, *self._encode("assistant\n")]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def sample_token(logits: np.ndarray, penalised: set[int], draw: float, sampling: Any) -> int:
    """The token that `draw` selects.

    Penalty first (Keskar et al. 2019, CTRL: positive logits divided, negative multiplied, once for
    every token in `penalised`), then top-k, top-p at temperature 1, and temperature, as in
    `models.token_sampling`.

    Args:
        logits: float32 [vocabulary], finite.
        draw: uniform in [0, 1); not used at temperature 0, which takes the most likely token.
        sampling: has `temperature`, `top_p`, `top_k` (0: all) and `repetition_penalty`.
    """
    import numpy as np

    if penalised and sampling.repetition_penalty != 1:
        logits, seen = logits.copy(), np.fromiter(penalised, int)
        penalty = np.float32(sampling.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if sampling.temperature <= 0:
        return int(logits.argmax())
    order = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        order = _most_likely(logits, sampling.top_k)
    if sampling.top_p < 1:
        order = _nucleus(logits, order, sampling.top_p)
    sums = np.cumsum(_unnormalised(logits[order], sampling.temperature))
    return int(order[np.searchsorted(sums, draw * sums[-1], "right")])


def _nucleus(logits: np.ndarray, order: np.ndarray, top_p: float) -> np.ndarray:
    """The most likely of the tokens in `order` that together just reach `top_p`, in that order."""
    import numpy as np

    candidates = logits[order]
    enough = top_p * _unnormalised(candidates).sum()
    kept = order
    for few in (TOP_CANDIDATES, len(order)):  # sorting the whole vocabulary takes ten times as long
        first = order[_most_likely(candidates, min(few, len(order)))]
        probabilities = _unnormalised(logits[first])
        kept = first[np.cumsum(probabilities) - probabilities < enough]
        if len(kept) < len(first):
            break
    return kept


def _most_likely(logits: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, largest first, equal ones in their order."""
    import numpy as np

    found = np.argpartition(logits, -count)[-count:]
    return found[np.lexsort((found, -logits[found]))]


def _unnormalised(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities that do not sum to 1 yet, in float64: rounding must not choose a word."""
    import numpy as np

    return np.exp((logits.astype(np.float64) - logits.max()) / temperature)


class _Draft:
    """Text that grows by tokens, without incomplete characters and without what follows a stop.

    Attributes:
        penalised: tokens for the repetition penalty: words, not punctuation, line ends or tags.
        ended: whether the songwriter came to an end.
    """

    def __init__(self, tokenizer: Tokenizer, prefix: str) -> None:
        self._tokenizer = tokenizer
        self._prefix = self.text = prefix
        self._pending: list[int] = []
        self.penalised: set[int] = set()
        self.ended = False

    def add(self, token: int) -> None:
        """Add a token; the text ends before the first stop."""
        word = self._decode([token])
        tag = (self.text + word).rpartition("\n")[2].startswith("[")
        if not tag and any(c.isalnum() for c in word):
            self.penalised.add(token)
        self._pending.append(token)
        piece = self._decode(self._pending)
        if piece.endswith("\ufffd"):  # an incomplete character
            return
        self.text += piece
        self._pending = []
        start = len(self.text) - len(self.text[len(self._prefix) :].lstrip())
        stops = [at for stop in STOPS if (at := self.text.find(stop, start)) >= 0]
        if stops:
            self.text, self.ended = self.text[: min(stops)], True

    @property
    def shown(self) -> str:
        """The text; until it has ended, without what may still become a stop, a tag or markup."""
        text = self.text
        if self.ended:
            return text
        for length in range(max(map(len, STOPS)) - 1, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in STOPS):
                text = text[:-length]
                break
        before, _, last = text.rpartition("\n")
        return before if last[:1] in tuple("[(【（*_#`>~-") else text

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)
