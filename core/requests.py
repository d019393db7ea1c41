"""Requests: what a person can ask of the studio, one frozen model per mode."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, field_validator, model_validator

from core import music
from core.errors import StudioError
from core.params import (
    ADAPTERS,
    DIFFUSION,
    MUSIC,
    PLANNER,
    SCHEDULE,
    AdapterRef,
    AutoInteger,
    AutoNumber,
    AutoSwitch,
    FilePath,
    Integer,
    LowerCase,
    Number,
    Request,
    Seed,
    Tempo,
    Text,
    param,
)

WRITING = "Writing"
"""The group of the songwriter's parameters."""

SAMPLE_RATE = 48_000
"""Hz. All audio that leaves the studio is 48 kHz stereo."""

AUDIO_FIELDS = ("source", "reference")
"""The fields of requests that are audio files."""

MAX_SEED = 2**31 - 1

LONGEST_S = 600
"""The longest song that ACE-Step was trained for, in seconds. Source: the authors' range."""

REGION_EDITS = ("repaint", "add_track")
"""The kinds of edit that change a region."""

TRACK_EDITS = ("add_track", "accompany", "extract")
"""The kinds of edit that only a base model was trained for."""

TRACKS = (
    *("vocals", "backing_vocals", "drums", "bass", "guitar", "keyboard", "strings", "synth"),
    *("brass", "woodwinds", "percussion", "fx"),
)
"""The tracks that base models know. Source: the authors' list."""

EDITION = 2
"""The rules by which a request becomes what the models read. A take records them, and a file of an
older edition is replayed by its own.

1: the transformer read empty lyrics as they stood, without the timbre token of XL; a cover's
   strength was a share of all steps, whatever its noise; plans had keys in ASCII only, captions of at
   most 100 words, and no language for a song marked as instrumental.
2: empty lyrics mean an instrumental for the planner and the transformer alike; XL has its timbre
   token; a cover's strength is a share of the steps that its noise leaves; the planner may
   spell keys with sharp and flat signs, its captions are not shortened, every plan may have a
   language.
"""

NO_LYRICS = "No lyrics were given: the song was made as an instrumental."

Key = Annotated[Literal[("", *music.KEYS)], BeforeValidator(music.parse_key)]
TimeSignature = Annotated[
    Literal[("", *music.TIME_SIGNATURES)], BeforeValidator(music.parse_time_signature)
]
Language = Annotated[Literal[music.LANGUAGES], BeforeValidator(music.parse_language)]


class SongRequest(Request):
    """The parameters that every song mode has."""

    prompt: Text = param("", "Style", lines=3, max_length=1000)
    lyrics: Text = param("", "Lyrics", lines=8, max_length=4096)
    instrumental: bool = param(False, "Instrumental")
    inference_steps: AutoInteger = param(None, "Steps", 1, 200, 1, group=DIFFUSION)
    guidance_scale: AutoNumber = param(None, "Guidance", 1, 30, 0.5, group=DIFFUSION)
    infer_method: Annotated[Literal["ode", "sde", "heun"], LowerCase] = param(
        "ode", "Sampler", group=DIFFUSION
    )
    seed: Seed = param(None, "Seed", 0, MAX_SEED, 1, group=DIFFUSION)
    cfg_interval_start: Number = param(0.0, "CFG interval start", 0, 1, 0.05, group=SCHEDULE)
    cfg_interval_end: Number = param(1.0, "CFG interval end", 0, 1, 0.05, group=SCHEDULE)
    shift: AutoNumber = param(None, "Shift", 0.5, 5, 0.1, group=SCHEDULE)
    use_adg: bool = param(False, "Angle guidance (ADG)", group=SCHEDULE)
    thinking: AutoSwitch = param(None, "Use planner", group=PLANNER)
    use_cot_caption: bool = param(True, "Detect style", group=PLANNER)
    use_cot_metas: bool = param(True, "Fill in tempo, key and time signature", group=PLANNER)
    use_cot_language: bool = param(True, "Fill in vocal language", group=PLANNER)
    lm_temperature: Number = param(0.85, "Temperature", 0, 2, 0.05, group=PLANNER)
    lm_top_p: Number = param(0.9, "Top-p", 0.05, 1, 0.05, group=PLANNER)
    lm_top_k: Integer = param(0, "Top-k", 0, 200, 1, group=PLANNER)
    lm_cfg_scale: Number = param(2.0, "Planner guidance", 1, 5, 0.1, group=PLANNER)
    lm_negative_prompt: Text = param("", "Negative prompt", lines=2, max_length=512, group=PLANNER)
    bpm: Tempo = param(None, "Tempo", 30, 300, 1, group=MUSIC, unit="bpm")
    keyscale: Key = param("", "Key", group=MUSIC)
    timesignature: TimeSignature = param("", "Time signature", group=MUSIC)
    vocal_language: Language = param("unknown", "Vocal language", group=MUSIC)
    adapters: tuple[AdapterRef, ...] = param((), "Adapters", group=ADAPTERS)
    fast_preview: bool = param(False, "Fast preview", group=DIFFUSION)

    @field_validator("cfg_interval_end")
    @classmethod
    def _interval_is_not_reversed(cls, end: float, info: Any) -> float:
        start = info.data.get("cfg_interval_start", 0.0)
        if end < start:
            raise ValueError(f"is {end:g}, below CFG interval start ({start:g})")
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
        return music.INSTRUMENTAL
    return request.lyrics


def lyrics_note(request: SongRequest, edition: int = EDITION) -> str:
    """What to tell a person where the lyrics are not read as written, or ""."""
    blank = not request.lyrics.strip()
    if request.instrumental:
        return "" if blank else "Instrumental: the lyrics were left out."
    return NO_LYRICS if blank and edition >= 2 else ""


def _not_blank(prompt: str) -> str:
    if not prompt.strip():
        raise StudioError("prompt-empty")
    return prompt


def _track_name(value: Any) -> Any:
    return "_".join(value.lower().split()) if isinstance(value, str) else value


def _track_list(value: str) -> str:
    """The names of tracks as they stand in `TRACKS`, each once, joined by ", "."""
    names = dict.fromkeys(_track_name(part) for part in re.split(r"[,|]", value) if part.strip())
    if unknown := [name for name in names if name not in TRACKS]:
        raise ValueError(f"has {unknown[0][:40]!r}, and the tracks are {', '.join(TRACKS)}")
    return ", ".join(names)


def _samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)


class Generate(SongRequest):
    """A new song from a style and lyrics."""

    mode: ClassVar[str] = "generate"
    prompt: Text = param(..., "Style", lines=3, max_length=1000)
    duration_s: Number = param(30.0, "Length", 5, LONGEST_S, 1, unit="s")
    reference: FilePath | None = param(None, "Reference audio")
    use_cot_caption: bool = param(False, "Rewrite style", group=PLANNER)

    _prompt_is_not_blank = field_validator("prompt")(_not_blank)


class Cover(SongRequest):
    """An existing song in another style, or a new song that sounds like a reference."""

    mode: ClassVar[str] = "cover"
    source: FilePath | None = param(None, "Source audio")
    reference: FilePath | None = param(None, "Reference audio")
    follow: Annotated[Literal["codes", "latents"], LowerCase] = param("codes", "Follow")
    strength: Number = param(1.0, "Source strength", 0, 1, 0.05)
    noise: Number = param(0.0, "Start from source", 0, 1, 0.05)
    use_cot_lyrics: bool = param(False, "Detect lyrics", group=PLANNER)
    duration_s: Number = param(30.0, "Length without source", 5, LONGEST_S, 1, unit="s")

    @model_validator(mode="after")
    def _has_a_file(self) -> Self:
        if self.source is None and self.reference is None:
            raise StudioError("source-needed", label="Source audio")
        if self.source is None and self.noise > 0:
            raise StudioError("noise-needs-source")
        return self


class Extend(SongRequest):
    """An existing song with new music before its beginning, after its end, or both."""

    mode: ClassVar[str] = "extend"
    source: FilePath = param(..., "Source audio")
    before_s: Number = param(0.0, "Add before", 0, LONGEST_S - 5, 1, unit="s")
    after_s: Number = param(20.0, "Add after", 0, LONGEST_S - 5, 1, unit="s")

    @model_validator(mode="after")
    def _adds_a_sample(self) -> Self:
        if not _samples(self.before_s) and not _samples(self.after_s):
            raise StudioError("nothing-to-add")
        return self


class Edit(SongRequest):
    """An existing song with one region regenerated, or morphed as a whole to another style.

    A base model can also add a track, accompany what is there, or extract a track.
    """

    mode: ClassVar[str] = "edit"
    source: FilePath = param(..., "Source audio")
    kind: Annotated[Literal["repaint", "morph", "add_track", "accompany", "extract"], LowerCase] = (
        param("repaint", "Edit type")
    )
    track: Annotated[Literal[TRACKS], BeforeValidator(_track_name)] = param("drums", "Track")
    tracks: Annotated[Text, AfterValidator(_track_list)] = param("", "Tracks", max_length=200)
    start_s: Number = param(0.0, "From", 0, LONGEST_S, 0.1, unit="s")
    end_s: AutoNumber = param(None, "To", 0, LONGEST_S, 0.1, unit="s")
    repaint_mode: Annotated[Literal["conservative", "balanced", "aggressive"], LowerCase] = param(
        "balanced", "Repaint mode"
    )
    repaint_strength: Number = param(0.5, "Repaint strength", 0, 1, 0.05)
    source_prompt: Text = param("", "Source style", lines=2, max_length=512)
    source_lyrics: Text = param("", "Source lyrics", lines=4, max_length=4096)
    n_min: Number = param(0.0, "Edit start", 0, 1, 0.05)
    n_max: Number = param(1.0, "Edit end", 0, 1, 0.05)
    n_avg: Integer = param(1, "Noise samples averaged", 1, 8, 1)
    use_cot_lyrics: bool = param(False, "Detect lyrics", group=PLANNER)

    @model_validator(mode="after")
    def _ranges_are_not_reversed(self) -> Self:
        if self.kind in REGION_EDITS and self.end_s is not None:
            # Counted in samples, as the repaint is: less than one is an empty region.
            if _samples(self.end_s) <= _samples(self.start_s):
                raise StudioError("region-empty", start=self.start_s, end=self.end_s)
        elif self.kind == "morph":
            _not_blank(self.prompt)
            if self.n_max < self.n_min:
                raise StudioError("morph-backwards", low=self.n_min, high=self.n_max)
        return self


class Musicgen(Request):
    """A piece without vocals by MusicGen, whose weights are not for commercial use."""

    mode: ClassVar[str] = "musicgen"
    prompt: Text = param(..., "Style", lines=3, max_length=1000)
    duration_s: Number = param(30.0, "Length", 5, 120, 1, unit="s")
    seed: Seed = param(None, "Seed", 0, MAX_SEED, 1)
    guidance_scale: Number = param(3.0, "Guidance", 1, 10, 0.5)
    temperature: Number = param(1.0, "Temperature", 0.1, 2, 0.05)
    top_k: Integer = param(250, "Top-k", 1, 2048, 1)

    _prompt_is_not_blank = field_validator("prompt")(_not_blank)


class Lyrics(Request):
    """Lyrics for a song, written to a brief."""

    mode: ClassVar[str] = "lyrics"
    brief: Text = param(..., "Brief", lines=4, max_length=1000)
    structure: Text = param(
        "verse, chorus, verse, chorus, bridge, chorus", "Sections", max_length=200
    )
    language: Language = param("en", "Language")
    tone: Text = param("", "Tone", max_length=100)
    rhyme: Annotated[Literal["free", "couplets", "alternate", "enclosed"], LowerCase] = param(
        "couplets", "Rhyme scheme"
    )
    lines: Integer = param(4, "Lines per section", 2, 12, 1)
    seed: Seed = param(None, "Seed", 0, MAX_SEED, 1, group=WRITING)
    temperature: Number = param(0.8, "Temperature", 0, 2, 0.05, group=WRITING)
    top_p: Number = param(0.9, "Top-p", 0.05, 1, 0.05, group=WRITING)
    top_k: Integer = param(40, "Top-k", 0, 200, 1, group=WRITING)
    repetition_penalty: Number = param(1.05, "Repetition penalty", 1, 2, 0.05, group=WRITING)
    repair: Text = param("", "Draft to repair", lines=8, max_length=8000, group=WRITING)

    @field_validator("brief")
    @classmethod
    def _brief_is_not_blank(cls, brief: str) -> str:
        if not brief.strip():
            raise StudioError("brief-empty")
        return brief


class Inspire(Request):
    """Style, lyrics and settings for a whole song, from one idea or from none."""

    mode: ClassVar[str] = "inspire"
    idea: Text = param("", "Idea", max_length=512)
    instrumental: bool = param(False, "Instrumental")
    vocal_language: Language = param("unknown", "Vocal language")
    seed: Seed = param(None, "Seed", 0, MAX_SEED, 1)


class Rewrite(Request):
    """Style and lyrics rewritten in the form that the model was trained on."""

    mode: ClassVar[str] = "rewrite"
    prompt: Text = param("", "Style", lines=3, max_length=512)
    lyrics: Text = param("", "Lyrics", lines=8, max_length=4096)
    vocal_language: Language = param("unknown", "Vocal language")
    seed: Seed = param(None, "Seed", 0, MAX_SEED, 1)


class Listen(Request):
    """What the planner detects in a song: style, tempo, key, time signature, language, lyrics."""

    mode: ClassVar[str] = "listen"
    source: FilePath = param(..., "Source audio")
    transcribe: bool = param(False, "Transcribe lyrics")
    seed: Seed = param(None, "Seed", 0, MAX_SEED, 1)


MODES: dict[str, type[SongRequest]] = {
    request.mode: request for request in (Generate, Cover, Extend, Edit)
}
"""The song modes of the page, by name."""

SONGS: dict[str, type[Request]] = {**MODES, Musicgen.mode: Musicgen}
"""The requests that end in a `Take`."""

HELPERS: dict[str, type[Request]] = {
    request.mode: request for request in (Inspire, Rewrite, Listen)
}
"""The requests that the planner answers alone, with an `Idea`."""


class Export(Request):
    """A take as a file in another format."""

    mode: ClassVar[str] = "export"
    source: FilePath = param(..., "Take")
    format: Annotated[Literal["wav", "flac", "mp3"], LowerCase] = param("mp3", "Format")
    settings: bool = param(True, "Include settings")
    ai_generated: bool = param(True, "Tag as AI-generated")


class Master(Export):
    """A take brought to a target loudness under a true-peak ceiling, as a file."""

    mode: ClassVar[str] = "master"
    target_lufs: Number = param(-14.0, "Target loudness", -30, -8, 0.5, unit="LUFS")
    ceiling_dbtp: Number = param(-1.0, "True-peak ceiling", -6, 0, 0.1, unit="dBTP")


class Stems(Request):
    """A take split into vocals, drums, bass and other."""

    mode: ClassVar[str] = "stems"
    source: FilePath = param(..., "Take")


EXPORTS: dict[str, type[Request]] = {request.mode: request for request in (Export, Master, Stems)}
"""The requests that end in `ExportedFiles`."""
