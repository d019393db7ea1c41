"""The language of the 5Hz planner: its prompts, its plans, and what it may write when.

No torch here. Formats are to the byte those that ACE-Step 1.5's planners were trained on (current
form, April 2026: the assistant's turn stays open after the thought).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from core.requests import INSTRUMENTAL, KEYS, LANGUAGES, TIME_SIGNATURES, SongRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer


GENERATE = "Generate audio semantic tokens based on the given conditions:"


UNDERSTAND = "Understand the given musical conditions and describe the audio semantics accordingly:"


INSPIRE = "Expand the user's input into a more detailed and specific musical description:"


REWRITE = "Format the user's input into a more detailed and specific musical description:"


NOTHING = "NO USER INPUT"


THINK, THOUGHT, START, STOP = "<think>", "</think>", "<|im_start|>", "<|im_end|>"


FIELDS = ("bpm", "caption", "duration", "keyscale", "language", "timesignature")
"""What a plan may say, in the order in which it is written."""


METAS = ("bpm", "duration", "keyscale", "timesignature")


CODE_RATE = 5
"""Codes a second; one code is five latent frames."""


CAPTION_TOKENS = 512
"""Where a caption that will not end is ended. Source: the authors' state machine."""


LYRIC_TOKENS = 2048
"""Where lyrics that will not end are ended: more is not read by the model that sings them."""


CAPTION_WORDS, CAPTION_LETTERS = 100, 512
"""What is kept of a caption. Long ones make guided XL checkpoints collapse into texture, and the
style of a request holds 512 characters."""


SHORTEST_S, LONGEST_S = 10, 600


@dataclass(frozen=True)
class Plan:
    """What a piece is to be, or what was heard in one. None: nothing was said.

    `bpm` 30 to 300, `duration_s` whole seconds from 10 to 600, `keyscale` one of `song.KEYS`,
    `language` of `song.LANGUAGES`, `timesignature` of `song.METRES`.
    """

    bpm: int | None = None
    caption: str | None = None
    duration_s: int | None = None
    keyscale: str | None = None
    language: str | None = None
    timesignature: str | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Plan:
        """From the field names and values of a thought, keeping what is legal."""
        bpm, length = _whole(said.get("bpm")), _whole(said.get("duration"))
        key = str(said.get("keyscale") or "").replace("\u266f", "#").replace("\u266d", "b")
        language = str(said.get("language") or "")
        metre = str(said.get("timesignature") or "").partition("/")[0]
        return cls(
            bpm=bpm if bpm is not None and 30 <= bpm <= 300 else None,
            caption=capped(str(said.get("caption") or "")) or None,
            duration_s=length if length and SHORTEST_S <= length <= LONGEST_S else None,
            keyscale=key if key in KEYS else None,
            language=language if language in LANGUAGES else None,
            timesignature=metre if metre in TIME_SIGNATURES else None,
        )

    def said(self) -> dict[str, Any]:
        """Field names and values as a thought holds them, only those that are known."""
        values = asdict(self)
        values["duration"] = values.pop("duration_s")
        if self.timesignature:
            values["timesignature"] = int(self.timesignature)
        return {field: values[field] for field in FIELDS if values[field] is not None}

    def text(self) -> str:
        """The plan as YAML, wrapped and quoted by PyYAML as in training; empty if nothing is known."""
        said = self.said()
        return yaml.dump(said, allow_unicode=True, sort_keys=True).strip() if said else ""


def _whole(value: Any) -> int | None:
    return int(value) if re.fullmatch(r"\s*\d{1,4}\s*", str(value)) else None


def capped(caption: str) -> str:
    """A caption on one line, cut to about 100 words: after a sentence if one ends in its later half."""
    printable = "".join(c if c.isprintable() else " " for c in caption.replace("\ufffd", ""))
    words = printable.split()
    kept = " ".join(words[:CAPTION_WORDS])
    if len(kept) > CAPTION_LETTERS:
        kept = kept[: CAPTION_LETTERS + 1].rpartition(" ")[0] or kept[:CAPTION_LETTERS]
    if len(kept) < len(" ".join(words)):
        sentence = re.match(r".*[.!?](?=\s|$)", kept)
        if sentence and sentence.end() > len(kept) // 2:
            kept = sentence.group()
    return kept


def parse(text: str) -> Plan:
    """Read what stands between `<think>` and `</think>`, or all of `text` before them.

    A line that does not begin with a space and holds a colon opens a field, others go on with the
    last one. Read line by line and not as YAML, which takes the language "no" for a refusal and
    stumbles over a colon in a caption; only a caption that was quoted for YAML is unquoted by it.
    """
    body = text.partition(THOUGHT)[0].rpartition(THINK)[2]
    said: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in body.split("\n"):
        name, colon, value = line.partition(":")
        if colon and not line.startswith((" ", "\t")) and name.strip() in FIELDS:
            lines = said.setdefault(name.strip(), [])
            line = value
        lines.append(line)
    values = {field: " ".join(" ".join(found).split()) for field, found in said.items()}
    if values.get("caption", "")[:1] in ("'", '"'):
        values["caption"] = _unquoted("\n".join(said["caption"]))
    return Plan.of(values)


def _unquoted(value: str) -> str:
    try:
        found = yaml.safe_load(f"caption:{value}")["caption"]
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        found = None
    return found if isinstance(found, str) else value.strip().strip("'\"")


def parse_lyrics(text: str) -> str:
    """The lyrics that follow a thought, without the headings that the model puts around them."""
    tail = text.partition(THOUGHT)[2].partition(STOP)[0].strip()
    tail = re.sub(r"\A# Languages?[ \t]*\n[^\n]*(\n+|\Z)", "", tail)
    tail = re.sub(r"\A# Lyrics?:?[ \t]*(\n|\Z)", "", tail)
    return re.sub(r"(\A|\n)# Languages?\b.*\Z", "", tail, flags=re.DOTALL).strip()


def fill(song: SongRequest, plan: Plan) -> tuple[SongRequest, dict[str, Any]]:
    """The request with what it left open filled from `plan`, and what was taken.

    What a person set stays. The caption, where the plan has one, takes the place of the style:
    who does not want that does not ask for one.
    """
    found = {
        "bpm": plan.bpm if song.bpm is None else None,
        "keyscale": plan.keyscale if not song.keyscale else None,
        "timesignature": plan.timesignature if not song.timesignature else None,
        "vocal_language": plan.language if song.vocal_language == "unknown" else None,
        "prompt": plan.caption,
    }
    used = {
        name: value
        for name, value in found.items()
        if value is not None and value != getattr(song, name)
    }
    return song.model_copy(update=used), used


def given_by(song: SongRequest, duration_s: float) -> dict[str, Any]:
    """What a request settles already, under the names of a thought's fields.

    The language is among it, unlike in the authors' generation: codes for words in one language
    under a plan that names another serve nobody.
    """
    said = {
        "bpm": song.bpm,
        "duration": min(max(int(duration_s), SHORTEST_S), LONGEST_S),
        "keyscale": song.keyscale or None,
        "language": song.vocal_language if song.vocal_language != "unknown" else None,
        "timesignature": song.timesignature or None,
    }
    return {field: value for field, value in said.items() if value is not None}


def chat(instruction: str, user: str) -> str:
    """System and user turn, and the assistant's opened: what the chat template renders."""
    system = f"{START}system\n# Instruction\n{instruction}\n\n{STOP}\n"
    return f"{system}{START}user\n{user}{STOP}\n{START}assistant\n"


def plan_prompt(caption: str, lyrics: str) -> str:
    """Ask for a plan. `lyrics` of a piece without words are `[Instrumental]`, not empty."""
    return chat(GENERATE, f"# Caption\n{caption}\n\n# Lyric\n{lyrics}\n")


def codes_prompt(caption: str, lyrics: str, plan: Plan) -> str:
    """Ask for codes: the person's own caption above, the plan's in the thought; the turn is open."""
    return f"{plan_prompt(caption, lyrics)}{THINK}\n{plan.text()}\n{THOUGHT}\n\n"


def plain_prompt(negative: str) -> str:
    """What guidance leads away from: the negative prompt as it stands, or nobody's wish."""
    return f"{chat(GENERATE, negative if negative.strip() else NOTHING)}{THINK}\n\n{THOUGHT}\n\n"


def understand_prompt(codes: Iterable[int]) -> str:
    """Ask what is heard in `codes`."""
    return chat(UNDERSTAND, "".join(map(code_token, codes)))


def inspire_prompt(query: str, instrumental: bool) -> str:
    """Ask for a whole song from one idea."""
    idea = query if query.strip() else NOTHING
    return chat(INSPIRE, f"{idea}\n\ninstrumental: {str(instrumental).lower()}")


def rewrite_prompt(caption: str, lyrics: str) -> str:
    """Ask for style and lyrics in the form the model likes. No newline at the end, unlike a plan."""
    caption = caption if caption.strip() else NOTHING
    lyrics = lyrics if lyrics.strip() else INSTRUMENTAL
    return chat(REWRITE, f"# Caption\n{caption}\n\n# Lyric\n{lyrics}")


def code_token(code: int) -> str:
    return f"<|audio_code_{code}|>"


class Words:
    """What the automaton knows of a tokenizer: ids, and which tokens may stand where.

    Args:
        tokenizer: of any ACE-Step planner.
        codebook: how many codes the quantiser of the music model has. Tokenizers hold more.

    Raises:
        ValueError: this tokenizer lacks what a planner needs, in a few words.
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
        self.stop = self._one(STOP)
        self._one(THINK), self._one(THOUGHT)
        self.newline = self._one("\n")
        self._sort()
        self._trees: dict[tuple[str, int], dict] = {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def value_ids(self, field: str, value: Any) -> list[int]:
        """The tokens of a value as they follow `"{field}:"`, the space before it included."""
        name, whole = self.ids(f"{field}:"), self.ids(f"{field}: {value}")
        if whole[: len(name)] != name:
            raise ValueError(f"splits {field}: {value} in the middle of the name")
        return whole[len(name) :]

    def tree(self, field: str, longest_s: int) -> dict:
        """The legal values of a field as a prefix tree over ids; the newline ends a value."""
        if (field, longest_s) not in self._trees:
            tree: dict = {}
            for value in _legal(field, longest_s):
                node = tree
                for token in self.value_ids(field, value):
                    node = node.setdefault(token, {})
                node[self.newline] = {}
            self._trees[field, longest_s] = tree
        return self._trees[field, longest_s]

    def _one(self, text: str) -> int:
        ids = self.ids(text)
        if len(ids) != 1:
            raise ValueError(f"has no token for {text!r}")
        return ids[0]

    def _sort(self) -> None:
        """Sort all tokens into where they may stand.

        `opening`: in a caption's line before anything visible; `inside`: after that, line ends
        included (also those glued to a full stop); `going_on`: beginning a further line, or what
        is written after the caption, by that token; `free`: in lyrics. Audio codes and marks in angle brackets may stand in none of them.
        """
        marks = {
            token
            for token, added in self.tokenizer.get_added_tokens_decoder().items()
            if added.special or added.content.startswith("<")
        }
        plain = [token for token in range(self.size) if token not in marks]
        said = dict(
            zip(plain, self.tokenizer.decode_batch([[token] for token in plain]), strict=True)
        )
        said = {token: text for token, text in said.items() if text}
        tame = {
            token: text
            for token, text in said.items()
            if not re.search("[`\r]|\n.", text, re.DOTALL)
        }
        self.ending = frozenset(token for token, text in tame.items() if text.endswith("\n"))
        self.blank = frozenset(token for token, text in tame.items() if not capped(text))
        self.opening = tuple(token for token in tame if token not in self.ending)
        self.inside = tuple(tame)
        self.free = (*said, self.stop)
        going_on = [token for token in self.opening if tame[token].startswith((" ", "\t"))]
        after = [self.ids(f"{field}:")[0] for field in FIELDS] + [self.ids(THOUGHT)[0]]
        self.going_on = {token: (*going_on, token) for token in after}


def _legal(field: str, longest_s: int) -> Iterable[Any]:
    """All values of a limited field. Keys are spelled plainly, as everywhere in the studio: the
    model's share for the musical signs goes to their plain twins."""
    if field == "bpm":
        return range(30, 301)
    if field == "duration":
        return range(SHORTEST_S, longest_s + 1)
    return {"keyscale": KEYS, "language": LANGUAGES, "timesignature": TIME_SIGNATURES}[field]


class Ask(NamedTuple):
    """The model is to choose among `legal` token ids: the likeliest if `greedy`, else by dice."""

    legal: tuple[int, ...]
    greedy: bool


class Thought:
    """The automaton that makes every plan legal, whatever the model says.

    Literal text is forced, limited fields walk a prefix tree of their legal values, the caption is
    free but for its end. What is `given` is written untouched; what is neither given nor `wanted`
    vanishes with its name. Source: the state machine of the authors' constrained decoding.

    Args:
        wanted: names among `FIELDS` that the model is to fill.
        given: values by name among `FIELDS`, each legal.
        longest_s: upper end of `duration`.
        lyrics: tokens of free text that may follow the thought; 0 ends with it.
    """

    def __init__(
        self,
        words: Words,
        wanted: Collection[str],
        given: Mapping[str, Any],
        longest_s: int = LONGEST_S,
        lyrics: int = 0,
    ) -> None:
        self.words = words
        self.given = {field: given[field] for field in FIELDS if given.get(field) is not None}
        self.fields = [f for f in FIELDS if f in wanted or f in self.given]
        self.longest_s = longest_s
        self.lyrics = lyrics
        self.tokens: list[int] = []
        self.done = 0

    def asks(self) -> Generator[Ask, int, None]:
        """Yields a choice, is sent the token chosen; meanwhile `tokens` grows by all that is said.

        `done` counts the fields that are finished.
        """
        ids = self.words.ids
        self.tokens += ids(f"{THINK}\n")
        for i, field in enumerate(self.fields):
            self.tokens += ids(f"{field}:")
            after = (*self.fields, None)[i + 1]
            if field in self.given:
                value = self.words.value_ids(field, self.given[field])
                self.tokens += [*value, self.words.newline]
            elif field == "caption":
                yield from self._caption(ids(f"{after}:" if after else THOUGHT)[0])
            else:
                yield from self._value(field)
            self.done += 1
        self.tokens += ids(f"{THOUGHT}\n\n" if self.lyrics else THOUGHT)
        for _ in range(self.lyrics):
            token = yield Ask(self.words.free, greedy=False)
            self.tokens.append(token)
            if token == self.words.stop:
                return

    def text(self) -> str:
        return self.words.text(self.tokens)

    def plan(self) -> Plan:
        return parse(self.text())

    def _value(self, field: str) -> Generator[Ask, int, None]:
        """One value of the tree. The language is the likeliest one, as the authors do it."""
        node = self.words.tree(field, self.longest_s)
        while node:
            legal = tuple(node)
            token = legal[0] if len(legal) == 1 else (yield Ask(legal, field == "language"))
            self.tokens.append(token)
            node = node[token]

    def _caption(self, after: int) -> Generator[Ask, int, None]:
        """Free text to the end of a line after which the likeliest token begins the next field.

        PyYAML wraps long captions: a line that begins with a space goes on with the caption.
        """
        words, visible, line_starts = self.words, False, False
        for _ in range(CAPTION_TOKENS):
            if line_starts:
                token = yield Ask(words.going_on[after], greedy=True)
                if token == after:
                    return
            else:
                token = yield Ask(words.inside if visible else words.opening, greedy=False)
            self.tokens.append(token)
            line_starts = token in words.ending
            visible = not line_starts and (visible or token not in words.blank)
        if not line_starts:
            self.tokens.append(words.newline)
