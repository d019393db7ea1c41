"""The planner's text formats: the prompts it reads, the plans it writes, what a request leaves open.

Without torch. The formats are, to the byte, those that ACE-Step 1.5's planners were trained on
(the current form of April 2026: the assistant's turn stays open after the reasoning block).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import yaml

from core.music import INSTRUMENTAL, KEYS, LANGUAGES, TIME_SIGNATURES
from core.params import Request
from core.requests import (
    EDITION,
    HELPERS,
    Cover,
    Edit,
    Generate,
    Listen,
    SongRequest,
    effective_lyrics,
)

Song = TypeVar("Song", bound=SongRequest)


GENERATE = "Generate audio semantic tokens based on the given conditions:"


UNDERSTAND = "Understand the given musical conditions and describe the audio semantics accordingly:"


INSPIRE = "Expand the user's input into a more detailed and specific musical description:"


REWRITE = "Format the user's input into a more detailed and specific musical description:"


NO_USER_INPUT = "NO USER INPUT"


THINK_START, THINK_END, IM_START, IM_END = "<think>", "</think>", "<|im_start|>", "<|im_end|>"


FIELDS = ("bpm", "caption", "duration", "genres", "keyscale", "language", "timesignature")
"""The fields of a plan, in the order in which it is written."""


CODE_RATE = 5
"""Audio codes a second; one code is five latent frames."""


CAPTION_WORDS, CAPTION_CHARACTERS = 100, 512
"""How long `shorten_caption` leaves a caption."""


LYRIC_CHARACTERS = 4096
"""How many characters of lyrics an answer keeps: as many as a request may have."""


MIN_BPM, MAX_BPM = 30, 300


MIN_DURATION_S, MAX_DURATION_S = 10, 600


@dataclass(frozen=True)
class Plan:
    """What a song is to be, or what was detected in one. None: not known.

    Attributes:
        bpm: 30 to 300.
        caption: on one line.
        duration_s: whole seconds, 10 to 600.
        keyscale: one of `KEYS`.
        language: one of `LANGUAGES`.
        timesignature: one of `TIME_SIGNATURES`.
        genres: free text on one line.
    """

    bpm: int | None = None
    caption: str | None = None
    duration_s: int | None = None
    keyscale: str | None = None
    language: str | None = None
    timesignature: str | None = None
    genres: str | None = None

    @classmethod
    def from_fields(cls, values: Mapping[str, Any], edition: int = EDITION) -> Plan:
        """From field names and values as a plan's text has them; illegal values are left out.

        Args:
            edition: 1 shortens the caption.
        """
        bpm, duration = _integer(values.get("bpm")), _integer(values.get("duration"))
        key = ascii_key(str(values.get("keyscale") or ""))
        language = str(values.get("language") or "")
        time_signature = str(values.get("timesignature") or "").partition("/")[0]
        caption = str(values.get("caption") or "")
        caption = shorten_caption(caption) if edition < 2 else clean_caption(caption)
        return cls(
            bpm=bpm if bpm is not None and MIN_BPM <= bpm <= MAX_BPM else None,
            caption=caption or None,
            duration_s=duration
            if duration and MIN_DURATION_S <= duration <= MAX_DURATION_S
            else None,
            keyscale=key if key in KEYS else None,
            language=language if language in LANGUAGES else None,
            timesignature=time_signature if time_signature in TIME_SIGNATURES else None,
            genres=clean_caption(str(values.get("genres") or "")) or None,
        )

    def fields(self) -> dict[str, Any]:
        """Names and values as the plan's text has them, without those that are not known."""
        values = asdict(self)
        values["duration"] = values.pop("duration_s")
        if self.timesignature:
            values["timesignature"] = int(self.timesignature)
        return {field: values[field] for field in FIELDS if values[field] is not None}

    def yaml(self) -> str:
        """The plan as YAML, wrapped and quoted by PyYAML as in training; "" if nothing is known."""
        fields = self.fields()
        return yaml.dump(fields, allow_unicode=True, sort_keys=True).strip() if fields else ""


def _integer(value: Any) -> int | None:
    return int(value) if re.fullmatch(r"\s*\d{1,4}\s*", str(value)) else None


def ascii_key(key: str) -> str:
    """A key with `#` and `b` for the sharp and flat signs U+266F and U+266D."""
    return key.replace("\u266f", "#").replace("\u266d", "b")


def clean_caption(caption: str) -> str:
    """A caption on one line, without characters that cannot be printed."""
    printable = "".join(c if c.isprintable() else " " for c in caption.replace("\ufffd", ""))
    return " ".join(printable.split())


def shorten_caption(
    caption: str, words: int = CAPTION_WORDS, characters: int = CAPTION_CHARACTERS
) -> str:
    """A clean caption of at most so many words and characters, cut after a sentence if one ends in
    its second half."""
    whole = clean_caption(caption)
    kept = " ".join(whole.split()[:words])
    if len(kept) > characters:
        kept = kept[: characters + 1].rpartition(" ")[0] or kept[:characters]
    if len(kept) < len(whole):
        sentence = re.match(r".*[.!?](?=\s|$)", kept)
        if sentence and sentence.end() > len(kept) // 2:
            kept = sentence.group()
    return kept


def parse_plan(text: str, edition: int = EDITION) -> Plan:
    """Read the reasoning block of an answer, or all of `text` up to where it ends.

    A line that does not begin with a space and has a colon after a field's name opens that field;
    other lines continue the last one. Not read as YAML, which takes the language "no" for false
    and rejects a colon in a caption; only a caption that is quoted as in YAML is unquoted by it.

    Args:
        edition: as in `Plan.from_fields`.
    """
    body = text.partition(THINK_END)[0].rpartition(THINK_START)[2]
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in body.split("\n"):
        name, colon, value = line.partition(":")
        if colon and not line.startswith((" ", "\t")) and name.strip() in FIELDS:
            lines = found.setdefault(name.strip(), [])
            line = value
        lines.append(line)
    values = {field: " ".join(" ".join(parts).split()) for field, parts in found.items()}
    if values.get("caption", "")[:1] in ("'", '"'):
        values["caption"] = _unquote("\n".join(found["caption"]))
    return Plan.from_fields(values, edition)


def _unquote(value: str) -> str:
    try:
        caption = yaml.safe_load(f"caption:{value}")["caption"]
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        caption = None
    return caption if isinstance(caption, str) else value.strip().strip("'\"")


def parse_lyrics(text: str) -> str:
    """The lyrics after the reasoning block, without the headings that the model puts around them,
    and cut after a line where there are more than a request may have."""
    answer = text.partition(THINK_END)[2].partition(IM_END)[0].strip()
    answer = re.sub(r"\A# Languages?[ \t]*\n[^\n]*(\n+|\Z)", "", answer)
    answer = re.sub(r"\A# Lyrics?:?[ \t]*(\n|\Z)", "", answer)
    answer = re.sub(r"(\A|\n)# Languages?\b.*\Z", "", answer, flags=re.DOTALL).strip()
    if len(answer) <= LYRIC_CHARACTERS:
        return answer
    kept = answer[: LYRIC_CHARACTERS + 1].rpartition("\n")[0]
    return kept.strip() or answer[:LYRIC_CHARACTERS]


def requested_fields(request: Request, edition: int = EDITION) -> set[str]:
    """The fields of a plan that `request` leaves to the planner; empty if it is not needed.

    In Generate the planner also composes codes if `thinking` is on; in the other modes `thinking`
    means listening to the source. Genres are written wherever audio or an idea is described in
    full, as in training; nothing reads them.

    Args:
        edition: 1 asks for no language where `instrumental` is on, and for no genres.
    """
    if not isinstance(request, SongRequest):
        return set(FIELDS) if request.mode in HELPERS else set()
    new_song = isinstance(request, Generate)
    if not new_song and not request.thinking:
        return set()
    fields = {"bpm", "keyscale", "timesignature"} if request.use_cot_metas else set()
    if request.use_cot_caption and (new_song or not request.prompt.strip()):
        fields.add("caption")
    if isinstance(request, Edit) and request.kind == "morph" and not request.source_prompt.strip():
        fields.add("caption")
    if edition >= 2 and not new_song and "caption" in fields:
        fields.add("genres")
    planned_language = edition >= 2 or not request.instrumental
    if request.use_cot_language and request.vocal_language == "unknown" and planned_language:
        fields.add("language")
    return fields - requested_values(request, 0.0).keys()


def requests_lyrics(request: Request) -> bool:
    """Whether the planner is to write down the lyrics of the request's source: because it asks for
    them, and has a place for them."""
    if isinstance(request, Listen):
        return request.transcribe
    if not isinstance(request, Cover | Edit) or not (request.thinking and request.use_cot_lyrics):
        return False
    if isinstance(request, Edit) and request.kind == "morph" and not request.source_lyrics.strip():
        return True
    return not request.instrumental and not request.lyrics.strip()


def requested_values(song: SongRequest, duration_s: float) -> dict[str, Any]:
    """The fields of a plan that a request settles itself, with their values.

    The language is one of them, unlike in the authors' generation: codes for lyrics in one language
    under a plan that names another would not fit.
    """
    values = {
        "bpm": song.bpm,
        "duration": min(max(int(duration_s), MIN_DURATION_S), MAX_DURATION_S),
        "keyscale": song.keyscale or None,
        "language": song.vocal_language if song.vocal_language != "unknown" else None,
        "timesignature": song.timesignature or None,
    }
    return {field: value for field, value in values.items() if value is not None}


def fill(
    song: Song, plan: Plan, lyrics: str = "", edition: int = EDITION
) -> tuple[Song, dict[str, Any]]:
    """The request with what it leaves open filled from `plan`, and the values that were filled in.

    What a person set stays. The caption, where the plan has one, replaces the style: a request that
    does not want that does not ask for a caption.

    Args:
        lyrics: those detected in the source; they are filled in where the song has none and is not
            marked as instrumental.
        edition: from 2 on an instrumental takes no language from the plan, as it is described to
            the transformer without one.
    """
    wants_lyrics = not song.instrumental and not song.lyrics.strip()
    found = {
        "bpm": plan.bpm if song.bpm is None else None,
        "keyscale": plan.keyscale if not song.keyscale else None,
        "timesignature": plan.timesignature if not song.timesignature else None,
        "vocal_language": plan.language if song.vocal_language == "unknown" else None,
        "prompt": plan.caption,
        "lyrics": lyrics if wants_lyrics and lyrics.strip() else None,
    }
    if edition >= 2 and not found["lyrics"] and effective_lyrics(song) == INSTRUMENTAL:
        found["vocal_language"] = None
    filled = {
        name: value
        for name, value in found.items()
        if value is not None and value != getattr(song, name)
    }
    return song.model_copy(update=filled), filled


def chat_prompt(instruction: str, user: str) -> str:
    """The system's and the user's turn, with the assistant's opened, as the chat template has it."""
    system = f"{IM_START}system\n# Instruction\n{instruction}\n\n{IM_END}\n"
    return f"{system}{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n"


def plan_prompt(caption: str, lyrics: str) -> str:
    """Asks for a plan. `lyrics` of an instrumental are `[Instrumental]`, not empty."""
    return chat_prompt(GENERATE, f"# Caption\n{caption}\n\n# Lyric\n{lyrics}\n")


def codes_prompt(caption: str, lyrics: str, plan: Plan) -> str:
    """Asks for audio codes: the request's own caption in the user's turn, the plan's caption in the
    reasoning block; the assistant's turn is open."""
    return f"{plan_prompt(caption, lyrics)}{THINK_START}\n{plan.yaml()}\n{THINK_END}\n\n"


def unconditional_prompt(negative: str) -> str:
    """What guidance leads away from: the negative prompt as it stands, or no user input."""
    user = negative if negative.strip() else NO_USER_INPUT
    return f"{chat_prompt(GENERATE, user)}{THINK_START}\n\n{THINK_END}\n\n"


def understand_prompt(codes: Iterable[int]) -> str:
    """Asks for the plan, and maybe the lyrics, of a song given as audio codes."""
    return chat_prompt(UNDERSTAND, "".join(map(code_token, codes)))


def inspire_prompt(query: str, instrumental: bool) -> str:
    """Asks for a whole song from one idea."""
    idea = query if query.strip() else NO_USER_INPUT
    return chat_prompt(INSPIRE, f"{idea}\n\ninstrumental: {str(instrumental).lower()}")


def rewrite_prompt(caption: str, lyrics: str) -> str:
    """Asks for style and lyrics in the form of the training data. Unlike `plan_prompt`, the user's
    turn ends without a newline."""
    caption = caption if caption.strip() else NO_USER_INPUT
    lyrics = lyrics if lyrics.strip() else INSTRUMENTAL
    return chat_prompt(REWRITE, f"# Caption\n{caption}\n\n# Lyric\n{lyrics}")


def code_token(code: int) -> str:
    """The token of an audio code, as the tokenizer spells it."""
    return f"<|audio_code_{code}|>"
