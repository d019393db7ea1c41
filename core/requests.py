"""What can be requested of the studio: one frozen model for each mode, with its parameters."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, field_validator, model_validator

from core.errors import StudioError
from core.params import (
    ADAPTERS,
    DIFFUSION,
    MUSIC,
    PLANNER,
    SCHEDULE,
    AdapterRef,
    FilePath,
    Integer,
    Number,
    Request,
    param,
)

WRITING = "Writing"
"""The group of knobs of the songwriter."""


SAMPLE_RATE = 48_000
"""Hz. What leaves the studio is always 48 kHz stereo."""


AUDIO_FIELDS = ("source", "reference")
"""The fields of requests that are audio files."""

MAX_SEED = 2**31 - 1


NOTES = ("C", "D", "E", "F", "G", "A", "B")


KEYS = tuple(
    f"{note}{sign} {mode}"
    for mode in ("major", "minor")
    for note in NOTES
    for sign in ("", "#", "b")
)


TIME_SIGNATURES = ("2", "3", "4", "6")
"""Beats a bar: 2/4, 3/4, 4/4 and 6/8."""


INSTRUMENTAL = "[Instrumental]"
"""Lyrics that mean: nobody sings. The spelling the models were trained on."""


EDITION = 2
"""The rules by which a request becomes what the models read. A take records them, and a file of an
older edition is replayed by its own.

1: the transformer read empty lyrics as they stood; plans had keys in ASCII only, captions of at
   most 100 words, and no language for a song marked as instrumental.
2: empty lyrics mean an instrumental for the planner and the transformer alike; the planner may
   spell keys with sharp and flat signs, its captions are not shortened, every plan may have a
   language.
"""


LANGUAGE_NAMES = {
    "ar": "Arabic",
    "az": "Azerbaijani",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "ht": "Haitian Creole",
    "hu": "Hungarian",
    "id": "Indonesian",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "la": "Latin",
    "lt": "Lithuanian",
    "ms": "Malay",
    "ne": "Nepali",
    "nl": "Dutch",
    "no": "Norwegian",
    "pa": "Punjabi",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sa": "Sanskrit",
    "sk": "Slovak",
    "sr": "Serbian",
    "sv": "Swedish",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "tl": "Tagalog",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "yue": "Cantonese",
    "zh": "Chinese",
}
"""Languages of lyrics by ISO 639 code, named in English as the songwriter's prompt names them."""

LANGUAGES = tuple(
    "ar az bg bn ca cs da de el en es fa fi fr he hi hr ht hu id is it ja ko la lt ms ne nl no pa pl"
    " pt ro ru sa sk sr sv sw ta te th tl tr uk ur vi yue zh unknown".split()
)


def _plain_key(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip().replace("\u266f", "#").replace("\u266d", "b")
    return value


Key = Annotated[Literal[("", *KEYS)], BeforeValidator(_plain_key)]


class SongRequest(Request):
    """The words and the knobs that every song mode has."""

    prompt: str = param("", "Style", lines=3, max_length=1000)
    lyrics: str = param("", "Lyrics", lines=8, max_length=4096)
    instrumental: bool = param(False, "Instrumental")
    inference_steps: Integer | None = param(None, "Steps", 1, 200, 1, group=DIFFUSION)
    guidance_scale: Number | None = param(None, "Guidance", 1, 30, 0.5, group=DIFFUSION)
    infer_method: Literal["ode", "sde", "heun"] = param("ode", "Method", group=DIFFUSION)
    seed: Integer | None = param(None, "Seed", 0, MAX_SEED, 1, group=DIFFUSION)
    cfg_interval_start: Number = param(0.0, "Guidance ends at", 0, 1, 0.05, group=SCHEDULE)
    cfg_interval_end: Number = param(1.0, "Guidance begins at", 0, 1, 0.05, group=SCHEDULE)
    shift: Number | None = param(None, "Shift", 0.5, 5, 0.1, group=SCHEDULE)
    use_adg: bool = param(False, "Angle guidance (ADG)", group=SCHEDULE)
    thinking: bool | None = param(None, "Think first", group=PLANNER)
    use_cot_caption: bool = param(True, "Find the style", group=PLANNER)
    use_cot_metas: bool = param(True, "Find tempo, key and metre", group=PLANNER)
    use_cot_language: bool = param(True, "Find the language", group=PLANNER)
    lm_temperature: Number = param(0.85, "Temperature", 0, 2, 0.05, group=PLANNER)
    lm_top_p: Number = param(0.9, "Top-p", 0.05, 1, 0.05, group=PLANNER)
    lm_top_k: Integer = param(0, "Top-k", 0, 200, 1, group=PLANNER)
    lm_cfg_scale: Number = param(2.0, "Planner guidance", 1, 5, 0.1, group=PLANNER)
    lm_negative_prompt: str = param("", "Away from", lines=2, max_length=512, group=PLANNER)
    bpm: Integer | None = param(None, "Tempo", 30, 300, 1, group=MUSIC, unit="bpm")
    keyscale: Key = param("", "Key", group=MUSIC)
    timesignature: Literal[("", *TIME_SIGNATURES)] = param("", "Beats per bar", group=MUSIC)
    vocal_language: Literal[LANGUAGES] = param("unknown", "Sung in", group=MUSIC)
    adapters: tuple[AdapterRef, ...] = param((), "Adapters", group=ADAPTERS)

    @field_validator("cfg_interval_end")
    @classmethod
    def _interval_runs_upwards(cls, end: float, info: Any) -> float:
        start = info.data.get("cfg_interval_start", 0.0)
        if end < start:
            raise ValueError(f"is {end:g}, below Guidance ends at ({start:g})")
        return end


def effective_lyrics(request: SongRequest, edition: int = EDITION) -> str:
    """The lyrics as the planner and the transformer read them.

    An instrumental has `INSTRUMENTAL` in their place, and so has a song without any: the authors'
    preprocessing puts it there for empty lyrics.

    Args:
        edition: in edition 1 the transformer read empty lyrics as they stood, and the planner
            already followed the rule of edition 2.
    """
    if request.instrumental or (edition >= 2 and not request.lyrics.strip()):
        return INSTRUMENTAL
    return request.lyrics


def lyrics_note(request: SongRequest, edition: int = EDITION) -> str:
    """What to tell a person where the lyrics are read otherwise than they wrote them, or ""."""
    blank = not request.lyrics.strip()
    if request.instrumental:
        return "" if blank else "Instrumental: the lyrics were left out."
    return NO_LYRICS if blank and edition >= 2 else ""


NO_LYRICS = "No lyrics were given: the song was made as an instrumental."


def _says_something(prompt: str) -> str:
    if not prompt.strip():
        raise StudioError("prompt-empty")
    return prompt


class Generate(SongRequest):
    """A song from words."""

    mode: ClassVar[str] = "generate"
    prompt: str = param(..., "Style", lines=3, max_length=1000)
    duration_s: Number = param(30.0, "Length", 5, 240, 1, unit="s")
    reference: FilePath | None = param(None, "Sound like")
    use_cot_caption: bool = param(False, "Rewrite the style", group=PLANNER)

    _prompt_says_something = field_validator("prompt")(_says_something)


class Cover(SongRequest):
    """A song of yours in another style, or a new one in the sound of a reference."""

    mode: ClassVar[str] = "cover"
    source: FilePath | None = param(None, "Song")
    reference: FilePath | None = param(None, "Sound like")
    strength: Number = param(1.0, "Likeness", 0, 1, 0.05)
    noise: Number = param(0.0, "Start from the song", 0, 1, 0.05)
    use_cot_lyrics: bool = param(False, "Detect the lyrics", group=PLANNER)
    duration_s: Number = param(30.0, "Length without a song", 5, 240, 1, unit="s")

    @model_validator(mode="after")
    def _has_something_to_go_by(self) -> Self:
        if self.source is None and self.reference is None:
            raise StudioError("source-needed", label="Song")
        if self.source is None and self.noise > 0:
            raise StudioError("noise-needs-source")
        return self


class Extend(SongRequest):
    """A song of yours, gone on with: before its beginning, after its end, or both."""

    mode: ClassVar[str] = "extend"
    source: FilePath = param(..., "Song")
    before_s: Number = param(0.0, "Before", 0, 235, 1, unit="s")
    after_s: Number = param(20.0, "After", 0, 235, 1, unit="s")

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if not self.before_s and not self.after_s:
            raise StudioError("nothing-to-add")
        return self


class Edit(SongRequest):
    """A song of yours with one region made anew, or all of it carried to another description."""

    mode: ClassVar[str] = "edit"
    source: FilePath = param(..., "Song")
    kind: Literal["repaint", "morph"] = param("repaint", "Edit")
    start_s: Number = param(0.0, "From", 0, 240, 0.1, unit="s")
    end_s: Number | None = param(None, "To", 0, 240, 0.1, unit="s")
    repaint_mode: Literal["conservative", "balanced", "aggressive"] = param("balanced", "Manner")
    repaint_strength: Number = param(0.5, "Freedom", 0, 1, 0.05)
    source_prompt: str = param("", "Style of the song", lines=2, max_length=512)
    source_lyrics: str = param("", "Lyrics of the song", lines=4, max_length=4096)
    n_min: Number = param(0.0, "Let go at", 0, 1, 0.05)
    n_max: Number = param(1.0, "How far", 0, 1, 0.05)
    n_avg: Integer = param(1, "Tries averaged", 1, 8, 1)
    use_cot_lyrics: bool = param(False, "Detect the lyrics", group=PLANNER)

    @model_validator(mode="after")
    def _spans_run_upwards(self) -> Self:
        if self.kind == "repaint" and self.end_s is not None and self.end_s <= self.start_s:
            raise StudioError("region-empty", start=self.start_s, end=self.end_s)
        if self.kind == "morph" and not self.prompt.strip():
            raise StudioError("prompt-empty")
        if self.kind == "morph" and self.n_max < self.n_min:
            raise StudioError("morph-backwards", low=self.n_min, high=self.n_max)
        return self


class Musicgen(Request):
    """A piece without words by MusicGen, whose weights are not for commercial use."""

    mode: ClassVar[str] = "musicgen"
    prompt: str = param(..., "Style", lines=3, max_length=1000)
    duration_s: Number = param(30.0, "Length", 5, 120, 1, unit="s")
    seed: Integer | None = param(None, "Seed", 0, MAX_SEED, 1)
    guidance_scale: Number = param(3.0, "Guidance", 1, 10, 0.5)
    temperature: Number = param(1.0, "Temperature", 0.1, 2, 0.05)
    top_k: Integer = param(250, "Top-k", 1, 2048, 1)

    _prompt_says_something = field_validator("prompt")(_says_something)


class Lyrics(Request):
    """Words for a song, written to a brief."""

    mode: ClassVar[str] = "lyrics"
    brief: str = param(..., "What it is about", lines=4, max_length=1000)
    structure: str = param(
        "verse, chorus, verse, chorus, bridge, chorus", "Sections", max_length=200
    )
    language: Literal[LANGUAGES] = param("en", "Language")
    tone: str = param("", "Tone", max_length=100)
    rhyme: Literal["free", "couplets", "alternate", "enclosed"] = param("couplets", "Rhyme")
    lines: Integer = param(4, "Lines a section", 2, 12, 1)
    seed: Integer | None = param(None, "Seed", 0, MAX_SEED, 1, group=WRITING)
    temperature: Number = param(0.8, "Temperature", 0, 2, 0.05, group=WRITING)
    top_p: Number = param(0.9, "Top-p", 0.05, 1, 0.05, group=WRITING)
    top_k: Integer = param(40, "Top-k", 0, 200, 1, group=WRITING)
    repetition_penalty: Number = param(1.05, "Repetition penalty", 1, 2, 0.05, group=WRITING)
    repair: str = param("", "Draft to repair", lines=8, max_length=8000, group=WRITING)

    @field_validator("brief")
    @classmethod
    def _brief_says_something(cls, brief: str) -> str:
        if not brief.strip():
            raise StudioError("brief-empty")
        return brief


class Inspire(Request):
    """A whole song thought up from one idea, or from none."""

    mode: ClassVar[str] = "inspire"
    idea: str = param("", "Idea", max_length=512)
    instrumental: bool = param(False, "Instrumental")
    vocal_language: Literal[LANGUAGES] = param("unknown", "Sung in")
    seed: Integer | None = param(None, "Seed", 0, MAX_SEED, 1)


class Rewrite(Request):
    """Style and lyrics brought into the form the model likes."""

    mode: ClassVar[str] = "rewrite"
    prompt: str = param("", "Style", lines=3, max_length=512)
    lyrics: str = param("", "Lyrics", lines=8, max_length=4096)
    vocal_language: Literal[LANGUAGES] = param("unknown", "Sung in")
    seed: Integer | None = param(None, "Seed", 0, MAX_SEED, 1)


class Listen(Request):
    """What is heard in a song: style, tempo, key, metre, language."""

    mode: ClassVar[str] = "listen"
    source: FilePath = param(..., "Song")
    transcribe: bool = param(False, "Write down the lyrics")
    seed: Integer | None = param(None, "Seed", 0, MAX_SEED, 1)


MODES: dict[str, type[SongRequest]] = {
    request.mode: request for request in (Generate, Cover, Extend, Edit)
}
"""The song modes of the page. `Lyrics` makes a draft."""


SONGS: dict[str, type[Request]] = {**MODES, Musicgen.mode: Musicgen}
"""All that makes a take."""


HELPERS: dict[str, type[Request]] = {
    request.mode: request for request in (Inspire, Rewrite, Listen)
}
"""What the planner alone answers, with an `Idea`."""


class Export(Request):
    """A take as a file of another kind."""

    mode: ClassVar[str] = "export"
    source: FilePath = param(..., "Take")
    format: Literal["wav", "flac", "mp3"] = param("mp3", "Format")
    settings: bool = param(True, "Settings inside")
    ai_generated: bool = param(True, "Tagged as AI-generated")


class Master(Export):
    """A take brought to a loudness, under a true-peak ceiling, as a file."""

    mode: ClassVar[str] = "master"
    target_lufs: Number = param(-14.0, "Loudness", -30, -8, 0.5, unit="LUFS")
    ceiling_dbtp: Number = param(-1.0, "Ceiling", -6, 0, 0.1, unit="dBTP")


class Stems(Request):
    """A take taken apart: vocals, drums, bass and the rest."""

    mode: ClassVar[str] = "stems"
    source: FilePath = param(..., "Take")


EXPORTS: dict[str, type[Request]] = {request.mode: request for request in (Export, Master, Stems)}
