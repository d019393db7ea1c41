"""A language model as songwriter: which there are, and how one writes word by word.

What may come next is read in `qwen2`; what comes is chosen here, so that seed, temperature and
penalty mean the same on every machine. What is asked, and what is kept, is decided in `stanzas`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import StudioError
from core.requests import Lyrics
from core.results import Progress
from models import checkpoints, llm, lyric_format, weights
from models.catalog import SONGWRITERS, SongwriterModel
from models.llm import END, EOS, TURN

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer


STOPS = ("\n\n\n", "\nNote:", "\n(Note", TURN, END, EOS)
"""Where an answer is over although the model goes on. None of it is ever shown."""


PIECE = 256
"""Tokens of the prompt that are read at a time: between two of them the work can be stopped."""


PULSE_S = 0.05
"""Seconds between two signs of life, at least."""


FEW = 1024
"""Tokens that nearly always hold the share that top-p keeps."""


LINE_TOKENS, TAG_TOKENS = 40, 8
"""Room for a line and for a tag. A line in a script the tokenizer knows little of takes 40."""


LOADING, WRITING = "Loading the songwriter", "Writing the words"


def choose(device: str) -> SongwriterModel:
    """The songwriter of a device ("cpu", "cuda" or "mps"): Qwen, on Apple's GPUs through MLX."""
    return SONGWRITERS["qwen-mlx" if device == "mps" else "qwen"]


def find(writer: SongwriterModel) -> Path:
    """The folder of `writer` on this computer. Never goes online; `checkpoints.fetch` does.

    Raises:
        StudioError: `writer-missing`, with its size and the command that fetches it.
    """
    folder = checkpoints.locate(writer)
    if folder is None or writer.missing(folder):
        raise StudioError(
            "writer-missing", model=writer.title, size=writer.size, command=writer.command
        )
    return folder


@dataclass(frozen=True)
class Written:
    """A songwriter's answer in form: the sections asked for, those that came, and what to say."""

    text: str
    asked: tuple[str, ...]
    got: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Songwriter:
    """One loaded songwriter. Not thread-safe: one song at a time, from any thread."""

    def __init__(self, writer: SongwriterModel, tokenizer: Tokenizer, model: llm.Reader) -> None:
        self.writer = writer
        self.tokenizer = tokenizer
        self.model = model
        self._turn, self._end = (tokenizer.token_to_id(mark) for mark in (TURN, END))
        tokenizer.encode_special_tokens = True  # a mark in somebody's brief is only text

    @classmethod
    def load(cls, writer: SongwriterModel, folder: Path, device: str) -> Iterator[Progress]:
        """Load the songwriter in `folder`, and prove that it is whole.

        Args:
            device: "cpu", "cuda" or "mps". bfloat16 on CUDA, else float32; MLX has one device of
                its own, and its weights their own number format.

        Returns:
            The songwriter (as the generator's return value).

        Raises:
            StudioError: `model-broken`, `model-mismatch`, `writer-memory`.
        """
        yield Progress(stage=LOADING, step=0, steps=2)
        config, tokenizer = llm.judged(writer, folder)
        yield Progress(stage=LOADING, step=1, steps=2)
        with llm.memory(writer, device):
            kind = llm.OnMlx if writer.engine == "mlx" else llm.OnTorch
            model = kind(writer, folder, config, device)
        yield Progress(stage=LOADING, step=2, steps=2)
        return cls(writer, tokenizer, model)

    def write(self, request: Lyrics) -> Iterator[Progress]:
        """Write a song's words. Each `Progress` holds the text so far; closing stops between words.

        Args:
            request: with its seed resolved. The same request makes the same text.

        Returns:
            `Written` (as the generator's return value).

        Raises:
            StudioError: `value-out-of-range` for the structure, `lyrics-too-long`, `writer-memory`.
        """
        return (yield from self._answer(request, lyric_format.turns(request)))

    def repair(self, request: Lyrics, text: str) -> Iterator[Progress]:
        """Have a broken draft written again, in one call: it goes back with what is wrong with it.

        Args:
            text: the draft, of whatever form. With `request` and its seed it decides the answer.

        Returns, Raises: as `write`.
        """
        return (yield from self._answer(request, lyric_format.repair_turns(request, text)))

    def close(self) -> None:
        """Give the memory back. The songwriter cannot be used after that."""
        self.model.close()

    def _answer(self, request: Lyrics, turns: Sequence[tuple[str, str]]) -> Iterator[Progress]:
        wanted = lyric_format.asked(request.structure)
        ids, most = self._ids(turns), len(wanted) * (request.lines * LINE_TOKENS + TAG_TOKENS)
        begun = lyric_format.opening(wanted)
        ids += self._encode(begun)
        room = self.model.longest - len(ids)
        if room < len(wanted) * TAG_TOKENS:
            words = sum(len(text.split()) for _, text in turns)
            words *= 0.8 * self.model.longest / len(ids)
            raise StudioError(
                "lyrics-too-long", tokens=len(ids), limit=self.model.longest, words=int(words)
            )
        draft = _Draft(self.tokenizer, begun)
        with llm.memory(self.writer, self.model.device):
            for _ in self._tokens(ids, draft, request, min(most, room)):
                text = lyric_format.normalise(draft.shown, wanted)
                step = min(len(lyric_format.sections(text, wanted)), len(wanted))
                yield Progress(stage=WRITING, step=step, steps=len(wanted), text=text)
        text = lyric_format.normalise(draft.text, wanted)
        notes = [] if draft.over else ["The songwriter did not come to an end and was cut off."]
        if uneven := lyric_format.uneven(text, request.lines, wanted):
            notes.append(uneven)
        return Written(text, wanted, lyric_format.sections(text, wanted), tuple(notes))

    def _tokens(self, ids: list[int], draft: _Draft, request: Lyrics, most: int) -> Iterator[None]:
        """Let `draft` grow by up to `most` tokens. Yields whenever there is more to show."""
        import numpy as np

        if request.seed is None:
            raise ValueError("the seed is to be resolved before anything is written")
        random = np.random.Generator(np.random.PCG64(request.seed))
        self.model.begin()
        logits, told = None, time.monotonic()
        for start in range(0, len(ids), PIECE):
            yield
            logits = self.model.read(ids[start : start + PIECE])
        for _ in range(most):
            if not np.isfinite(logits.max()):
                raise weights.broken(self.writer, "it", "answers with no finite numbers")
            token = pick(logits, draft.said, random.random(), request)
            draft.add(token)
            if draft.over:
                break
            logits = self.model.read([token])
            if time.monotonic() - told > PULSE_S:
                told = time.monotonic()
                yield
        yield

    def _ids(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """A conversation in ChatML, as tokens, with the answer's turn open."""
        ids, line = [], self._encode("\n")
        for role, text in turns:
            ids += [self._turn, *self._encode(f"{role}\n{text}"), self._end, *line]
        return [*ids, self._turn, *self._encode("assistant\n")]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def pick(logits: np.ndarray, said: set[int], draw: float, dice: Any) -> int:
    """The token that `draw` falls on.

    Penalty first (Keskar et al. 2019, CTRL: positive logits divided, negative multiplied, once for
    every token in `said`), then top-k, top-p at temperature 1, and temperature, as `planner.pick`.

    Args:
        logits: float32 [vocabulary], finite.
        draw: uniform in [0, 1). Temperature 0 needs none and takes the likeliest.
        dice: has `temperature`, `top_p`, `top_k` (0: all) and `repetition_penalty`.
    """
    import numpy as np

    if said and dice.repetition_penalty != 1:
        logits, seen = logits.copy(), np.fromiter(said, int)
        fine = np.float32(dice.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / fine, logits[seen] * fine)
    if dice.temperature <= 0:
        return int(logits.argmax())
    order = np.arange(len(logits))
    if 0 < dice.top_k < len(logits):
        order = _likeliest(logits, dice.top_k)
    if dice.top_p < 1:
        order = _nucleus(logits, order, dice.top_p)
    heights = np.cumsum(_raised(logits[order], dice.temperature))
    return int(order[np.searchsorted(heights, draw * heights[-1], "right")])


def _nucleus(logits: np.ndarray, order: np.ndarray, share: float) -> np.ndarray:
    """The likeliest of the tokens in `order` that together just reach `share`, in that order."""
    import numpy as np

    candidates = logits[order]
    enough = share * _raised(candidates).sum()
    kept = order
    for few in (FEW, len(order)):  # sorting the whole vocabulary takes ten times as long
        first = order[_likeliest(candidates, min(few, len(order)))]
        raised = _raised(logits[first])
        kept = first[np.cumsum(raised) - raised < enough]
        if len(kept) < len(first):
            break
    return kept


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest are, largest first, equal ones in their order."""
    import numpy as np

    found = np.argpartition(logits, -count)[-count:]
    return found[np.lexsort((found, -logits[found]))]


def _raised(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Shares before they are made to sum to 1, in float64: rounding must not choose a word."""
    import numpy as np

    return np.exp((logits.astype(np.float64) - logits.max()) / temperature)


class _Draft:
    """What has been written: text out of tokens, never half a character and nothing after a stop.

    `said` are the tokens that the penalty is for: words, not punctuation, line ends or tags. `over`
    is whether the songwriter came to an end.
    """

    def __init__(self, tokenizer: Tokenizer, begun: str) -> None:
        self._tokenizer = tokenizer
        self._begun = self.text = begun
        self._held: list[int] = []
        self.said: set[int] = set()
        self.over = False

    def add(self, token: int) -> None:
        """Write on; at a stop the text is cut there and over."""
        word = self._decode([token])
        tag = (self.text + word).rpartition("\n")[2].startswith("[")
        if not tag and any(c.isalnum() for c in word):
            self.said.add(token)
        self._held.append(token)
        piece = self._decode(self._held)
        if piece.endswith("\ufffd"):  # half a character
            return
        self.text += piece
        self._held = []
        start = len(self.text) - len(self.text[len(self._begun) :].lstrip())
        stops = [at for stop in STOPS if (at := self.text.find(stop, start)) >= 0]
        if stops:
            self.text, self.over = self.text[: min(stops)], True

    @property
    def shown(self) -> str:
        """The text; until it is over, without an end that may yet become a stop, a tag or a mark."""
        text = self.text
        if self.over:
            return text
        for length in range(max(map(len, STOPS)) - 1, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in STOPS):
                text = text[:-length]
                break
        before, _, last = text.rpartition("\n")
        return before if last[:1] in tuple("[(【（*_#`>~-") else text

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)
