"""Constrained decoding of plans: which tokens the planner may write next.

Without torch. The format of what is written is in `plan_format`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from core.music import KEYS, LANGUAGES, TIME_SIGNATURES
from core.requests import EDITION
from models.plan_format import (
    FIELDS,
    IM_END,
    MAX_BPM,
    MAX_DURATION_S,
    MIN_BPM,
    MIN_DURATION_S,
    THINK_END,
    THINK_START,
    Plan,
    clean_caption,
    code_token,
    parse_plan,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer


CAPTION_TOKENS = 512
"""Where a caption is ended that does not end by itself. Source: the authors' state machine."""


GENRE_TOKENS = 48
"""Where a list of genres is ended that does not end by itself."""


LYRIC_TOKENS = 2048
"""Where lyrics are ended that do not end by themselves: the transformer reads no more."""


DETECTED_LYRIC_TOKENS = LYRIC_TOKENS - 48
"""The same for lyrics that go straight to the transformer, which reads a heading with them."""


SIGNED_KEYS = tuple(
    dict.fromkeys(
        spelling
        for key in KEYS
        for spelling in (
            key,
            key.replace("#", "\u266f"),
            key[0] + key[1:].replace("b ", "\u266d ", 1),
        )
    )
)
"""`KEYS`, also spelled with the sharp and flat signs U+266F and U+266D: 70 spellings of 42 keys.
About one plan in twenty of the authors' examples has a sign, and where it is not allowed its
probability goes to the natural key, a semitone off."""


class Vocabulary:
    """A planner's tokenizer, and which of its tokens may stand where.

    Args:
        tokenizer: of any ACE-Step planner.
        codebook: number of codes of the music model's quantiser. Tokenizers have more.

    Raises:
        ValueError: the tokenizer lacks what a planner needs; the message says what in a few words.
    """

    def __init__(self, tokenizer: Tokenizer, codebook: int) -> None:
        self.tokenizer = tokenizer
        self.codebook = codebook
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        first = tokenizer.token_to_id(code_token(0))
        for code in range(codebook):
            if first is None or tokenizer.token_to_id(code_token(code)) != first + code:
                raise ValueError(f"lacks the audio code {code}, or has it out of order")
        self.first_code = first
        self.stop = self._single(IM_END)
        for token in (THINK_START, THINK_END):
            self._single(token)
        self.newline = self._single("\n")
        self._classify()
        self._tries: dict[tuple[str, int, int], dict] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def encode_value(self, field: str, value: Any) -> list[int]:
        """The tokens of a value as they follow `"{field}:"`, with the space before it."""
        name, whole = self.encode(f"{field}:"), self.encode(f"{field}: {value}")
        if whole[: len(name)] != name:
            raise ValueError(f"splits {field}: {value} in the middle of the name")
        return whole[len(name) :]

    def value_trie(self, field: str, max_duration_s: int, edition: int = EDITION) -> dict:
        """The legal values of a field as a prefix tree of token ids; a newline ends each value."""
        if (field, max_duration_s, edition) not in self._tries:
            trie: dict = {}
            for value in legal_values(field, max_duration_s, edition):
                node = trie
                for token in self.encode_value(field, value):
                    node = node.setdefault(token, {})
                node[self.newline] = {}
            self._tries[field, max_duration_s, edition] = trie
        return self._tries[field, max_duration_s, edition]

    def _single(self, text: str) -> int:
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f"has no token for {text!r}")
        return ids[0]

    def _classify(self) -> None:
        """Sort all tokens by where they may stand.

        `line_start`: in a line of a caption before anything visible; `caption`: after that,
        including line ends (also those joined to a full stop); `continuation`: at the start of a
        further line, or the first token of what follows the caption, by that token; `free`: in
        lyrics. Audio codes and tags in angle brackets stand in none of them.
        """
        special = {
            token
            for token, added in self.tokenizer.get_added_tokens_decoder().items()
            if added.special or added.content.startswith("<")
        }
        ordinary = [token for token in range(self.size) if token not in special]
        decoded = self.tokenizer.decode_batch([[token] for token in ordinary])
        texts = {token: text for token, text in zip(ordinary, decoded, strict=True) if text}
        in_captions = {
            token: text
            for token, text in texts.items()
            if not re.search("[`\r]|\n.", text, re.DOTALL)
        }
        self.line_ends = frozenset(t for t, text in in_captions.items() if text.endswith("\n"))
        self.blank = frozenset(t for t, text in in_captions.items() if not clean_caption(text))
        self.line_start = tuple(t for t in in_captions if t not in self.line_ends)
        self.caption = tuple(in_captions)
        self.free = (*texts, self.stop)
        indents = [t for t in self.line_start if in_captions[t].startswith((" ", "\t"))]
        following = [self.encode(f"{field}:")[0] for field in FIELDS]
        following.append(self.encode(THINK_END)[0])
        self.continuation = {token: (*indents, token) for token in following}


def legal_values(field: str, max_duration_s: int, edition: int = EDITION) -> Iterable[Any]:
    """All values of a field that has a limited number of them.

    Args:
        edition: 1 allows keys in ASCII only.
    """
    if field == "bpm":
        return range(MIN_BPM, MAX_BPM + 1)
    if field == "duration":
        return range(MIN_DURATION_S, max_duration_s + 1)
    keys = SIGNED_KEYS if edition >= 2 else KEYS
    return {"keyscale": keys, "language": LANGUAGES, "timesignature": TIME_SIGNATURES}[field]


class TokenChoice(NamedTuple):
    """The model is to choose among the `legal` token ids: the most likely one if `greedy`, else by
    sampling."""

    legal: tuple[int, ...]
    greedy: bool


class PlanConstraint:
    """The state machine that makes every plan legal, whatever the model's logits are.

    Literal text is forced, limited fields walk a trie of their legal values, caption and genres are
    free until a line ends. `given` values are written as they are; a field that is neither given
    nor requested is left out together with its name. Source: the state machine of the authors'
    constrained decoding.

    Args:
        requested: names among `FIELDS` that the model is to fill.
        given: values by name among `FIELDS`, each legal.
        max_duration_s: upper end of `duration`.
        lyric_tokens: how many tokens of free text may follow the reasoning block; 0 ends with it.
        edition: as in `legal_values` and `Plan.from_fields`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        requested: Collection[str],
        given: Mapping[str, Any],
        max_duration_s: int = MAX_DURATION_S,
        lyric_tokens: int = 0,
        edition: int = EDITION,
    ) -> None:
        self.vocabulary = vocabulary
        self.given = {field: given[field] for field in FIELDS if given.get(field) is not None}
        self.fields = [f for f in FIELDS if f in requested or f in self.given]
        self.max_duration_s = max_duration_s
        self.lyric_tokens = lyric_tokens
        self.edition = edition
        self.tokens: list[int] = []
        self.done = 0

    def choices(self) -> Generator[TokenChoice, int, None]:
        """Yields each choice and is sent the chosen token; `tokens` grows by all that is written.

        `done` counts the finished fields.
        """
        encode = self.vocabulary.encode
        self.tokens += encode(f"{THINK_START}\n")
        for i, field in enumerate(self.fields):
            self.tokens += encode(f"{field}:")
            following = (*self.fields, None)[i + 1]
            if field in self.given:
                value = self.vocabulary.encode_value(field, self.given[field])
                self.tokens += [*value, self.vocabulary.newline]
            elif field == "caption":
                after = encode(f"{following}:" if following else THINK_END)[0]
                yield from self._caption(after)
            elif field == "genres":
                yield from self._line(GENRE_TOKENS)
            else:
                yield from self._value(field)
            self.done += 1
        self.tokens += encode(f"{THINK_END}\n\n" if self.lyric_tokens else THINK_END)
        for _ in range(self.lyric_tokens):
            token = yield TokenChoice(self.vocabulary.free, greedy=False)
            self.tokens.append(token)
            if token == self.vocabulary.stop:
                return

    def text(self) -> str:
        """All that was written."""
        return self.vocabulary.decode(self.tokens)

    def plan(self) -> Plan:
        """The plan in what was written."""
        return parse_plan(self.text(), self.edition)

    def _value(self, field: str) -> Generator[TokenChoice, int, None]:
        """A value of the trie. The language is the most likely one, as the authors do it."""
        node = self.vocabulary.value_trie(field, self.max_duration_s, self.edition)
        while node:
            legal = tuple(node)
            if len(legal) == 1:
                token = legal[0]
            else:
                token = yield TokenChoice(legal, greedy=field == "language")
            self.tokens.append(token)
            node = node[token]

    def _caption(self, following: int) -> Generator[TokenChoice, int, None]:
        """Free text, up to the end of a line after which the next field is the most likely.

        PyYAML wraps long captions: a line that begins with a space continues the caption.
        """
        words, visible, new_line = self.vocabulary, False, False
        for _ in range(CAPTION_TOKENS):
            if new_line:
                token = yield TokenChoice(words.continuation[following], greedy=True)
                if token == following:
                    return
            else:
                legal = words.caption if visible else words.line_start
                token = yield TokenChoice(legal, greedy=False)
            self.tokens.append(token)
            new_line = token in words.line_ends
            visible = not new_line and (visible or token not in words.blank)
        if not new_line:
            self.tokens.append(words.newline)

    def _line(self, limit: int) -> Generator[TokenChoice, int, None]:
        """Free text up to the end of the line."""
        words, visible = self.vocabulary, False
        for _ in range(limit):
            token = yield TokenChoice(words.caption if visible else words.line_start, greedy=False)
            self.tokens.append(token)
            if token in words.line_ends:
                return
            visible = visible or token not in words.blank
        self.tokens.append(words.newline)
