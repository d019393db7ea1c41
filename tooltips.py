"""The words of the page, the command line and the API: one voice, no numbers of their own.

Ranges and defaults are never typed here; `tip` reads them from the knob.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.requests import LANGUAGE_NAMES

if TYPE_CHECKING:
    from core.params import Param
    from core.results import AdapterInfo, AudioInfo, Progress

TIPS: dict[str, str] = {
    "prompt": "Genre, instruments, mood, tempo, voice: whatever you would tell a band.",
    "cover.prompt": "What it is to become. Left empty, the style heard in the song is used.",
    "extend.prompt": "How it goes on. Left empty, the style heard in the song is used.",
    "edit.prompt": "What it is to become. A repaint may be left empty: it keeps the style heard.",
    "instrumental": "Whether anybody sings.",
    "lyrics": "One line for each sung line. Tags such as [verse] and [chorus] shape the song.",
    "extend.lyrics": "What is sung in the new part, one line for each sung line.",
    "edit.lyrics": "The lyrics of the song as it is to be, the new lines in their place.",
    "duration_s": "How long the song is, to the sample.",
    "cover.duration_s": "How long the new song is. With a song to cover, its length is kept.",
    "source": "The song to start from, in any common format.",
    "reference": "A recording whose sound is taken on: its voice, its instruments, its room.",
    "strength": "For how much of the way the song leads. After that the style alone does.",
    "noise": "Starts from the song itself instead of from noise. More keeps more of its sound.",
    "before_s": "How much new music comes before the song.",
    "after_s": "How much new music comes after the song.",
    "kind": "Repaint makes one region anew. Morph carries the whole song to another style.",
    "start_s": "Where the region begins.",
    "end_s": "Where the region ends. Left open, at the end of the song.",
    "repaint_mode": "How firmly the new part holds on to what stands around it.",
    "repaint_strength": "How loosely a balanced repaint holds on. More lets it wander further.",
    "source_prompt": "How the song sounds now. Left empty, the style heard in it is used.",
    "source_lyrics": "What is sung in the song now. Left empty, nobody sings.",
    "n_max": "How far the song is carried. None: it stays as it is. All: it may change entirely.",
    "n_min": "When to let go of the song: what is left of the way follows the new style alone.",
    "n_avg": "How many tries each step is the middle of. More is steadier and slower.",
    "inference_steps": "How often the sound is refined. More is finer and slower.",
    "guidance_scale": "How strictly the style is followed. Too much sounds harsh.",
    "infer_method": "The solver. ODE is steady, SDE adds fresh grain, Heun is exact and slower.",
    "seed": "The same seed with the same settings gives the same song.",
    "cfg_interval_start": "How much noise is left when guidance lets go. None: it stays to the end.",
    "cfg_interval_end": "How much noise is left when guidance sets in. All: it is there from the start.",
    "shift": "Spends more of the steps on the outline of the song than on its detail.",
    "use_adg": "Steers by angle instead of by distance. Try it when strong guidance sounds harsh.",
    "thinking": "Whether the planner goes first: to plan a new song, or to listen to yours.",
    "use_cot_caption": "Takes the style that is heard where you give none.",
    "generate.use_cot_caption": "Lets the planner put the style into its own words.",
    "use_cot_lyrics": "Writes down the lyrics of the song, where you give none. Takes longer.",
    "transcribe": "Whether the lyrics are written down too. That takes longer, and may be wrong.",
    "use_cot_metas": "Lets the planner find tempo, key and beats per bar where you left them open.",
    "use_cot_language": "Lets the planner find the language of the lyrics.",
    "lm_temperature": "How daring the planner is. At zero it always does what is likeliest.",
    "lm_top_p": "How much of what is possible the planner considers. Less is safer.",
    "lm_top_k": "How many possibilities the planner considers. Zero: all of them.",
    "lm_cfg_scale": "How strictly the planner keeps to your words.",
    "lm_negative_prompt": "What the planner steers away from.",
    "bpm": "Beats per minute.",
    "keyscale": "The key the song is in.",
    "timesignature": "How each bar is counted.",
    "vocal_language": "The language of the lyrics.",
    "adapters": "LoRA or LoKr files made for this model, each as strong as you like.",
    "brief": "The story, the mood, an image: whatever the words are to be about.",
    "structure": "The sections in their order, set apart by commas.",
    "language": "The language the words are written in.",
    "tone": "How it speaks: tender, defiant, dry. Left empty, the brief decides.",
    "rhyme": "Which lines rhyme with each other.",
    "lines": "How many lines each section has.",
    "lyrics.seed": "The same seed with the same brief gives the same words.",
    "temperature": "How daring the words are. At zero the likeliest word is always taken.",
    "top_p": "How much of what is possible is considered for each word. Less is safer.",
    "top_k": "How many words are considered for each place. Zero: all of them.",
    "repetition_penalty": "How much words that stand there already are avoided.",
    "musicgen.temperature": "How daring the piece is. Less keeps to what is likeliest.",
    "musicgen.top_k": "How many tokens are considered for each place.",
    "repair": "A draft that broke the structure: it is written again to fit.",
    "idea": "One line is enough. Left empty, it is a surprise altogether.",
    "export.source": "The take to write.",
    "master.source": "The take to set the loudness of.",
    "stems.source": "The take to take apart.",
    "format": "Whether every sample is kept, or the file is small enough to send.",
    "settings": "Whether the file carries all that makes the song again.",
    "ai_generated": "Whether the file says that a model made it.",
    "target_lufs": "How loud the whole is, as broadcasters and streaming services measure it.",
    "ceiling_dbtp": "What no peak exceeds, measured between the samples too.",
}
"""What each knob does, by field name; `mode.field` wins where one mode means it differently."""

LABELS: dict[str, str] = {"instrumental": "Voice"}
"""Labels that differ from the knob's own because its widget asks the question differently."""

CHOICES: dict[str, dict[Any, str]] = {
    "instrumental": {False: "With vocals", True: "Instrumental"},
    "infer_method": {"ode": "ODE", "sde": "SDE", "heun": "Heun"},
    "thinking": {True: "Yes", False: "No"},
    "format": {"wav": "WAV", "flac": "FLAC", "mp3": "MP3"},
    "kind": {"repaint": "Repaint", "morph": "Morph"},
    "rhyme": {
        "free": "Free",
        "couplets": "Couplets (aabb)",
        "alternate": "Alternate (abab)",
        "enclosed": "Enclosed (abba)",
    },
    "repaint_mode": {
        "conservative": "Conservative",
        "balanced": "Balanced",
        "aggressive": "Aggressive",
    },
    "timesignature": {"2": "2/4", "3": "3/4", "4": "4/4", "6": "6/8"},
}
"""How a choice is called, by field and value. A choice that is not here is called by its value."""

LANGUAGES = ("vocal_language", "language")
"""Fields whose choices are languages."""

for field in LANGUAGES:
    CHOICES[field] = dict(LANGUAGE_NAMES)

AUTO = "Auto"
"""What the empty choice and the language "unknown" are called."""

PLACEHOLDERS: dict[str, str] = {
    "prompt": "Dusty boom-bap, upright bass, brushed drums, late at night",
    "lyrics": "[verse]\nStreetlights hum a tune I know\n\n[chorus]\nCarry me home, carry me slow",
    "idea": "A night train home, slow and warm",
    "brief": "Leaving a small town at dawn, without telling anyone",
    "tone": "Tender, a little dry",
    "seed": AUTO,
    "bpm": AUTO,
}

MODES: dict[str, str] = {
    "generate": "Generate",
    "cover": "Cover",
    "extend": "Extend",
    "edit": "Edit",
    "lyrics": "Lyrics",
}
"""Tabs, and the button that starts each."""

STAGES: dict[str, str] = {
    "Waiting": "Waiting for the device",
    "Loading": "Loading the model",
    "Loading the planner": "Loading the planner",
    "Planning": "Planning the song",
    "Composing codes": "Sketching the song",
    "Listening": "Listening to the song",
    "Thinking of a song": "Thinking of a song",
    "Rewriting": "Putting the words in order",
    "Reading the file": "Reading your file",
    "Encoding": "Taking the song in",
    "Reading adapters": "Loading the adapters",
    "Reading the words": "Reading the words",
    "Loading the songwriter": "Loading the songwriter",
    "Writing the words": "Writing the words",
    "Denoising": "Shaping the sound",
    "Decoding": "Rendering the sound",
    "Decoding the tokens": "Rendering the sound",
    "Writing": "Writing the file",
}
"""What a stage is called while it lasts. Others are called by their own name."""

COUNTED: dict[str, str] = {
    "Denoising": "step",
    "Decoding": "part",
    "Composing": "token",
    "Splitting into stems": "part",
}
"""What one unit of a stage is called, where counting them tells a person something."""

TITLE = "ACE Music Studio"
SKIP = "Skip to the studio"
STOP = "Stop"
STOPPING = "Stopping"
RETAKE = "Retake"
REUSE = "Use these settings"
ADVANCED = "Advanced"
PLAYER = "Take"
SHELF = "Your takes"
SAVE_WAV = "WAV"
SAVE_JSON = "Settings (JSON)"
READY = "Ready"
STARTING = "Starting"
BUTTONS = {"lyrics": "Write"}
"""What starts a tab where its name alone would not say it."""

NOTHING_YET = "Nothing recorded yet"
NOTHING_WRITTEN = "Nothing written yet"
NOTHING_YET_TIPS = {
    "generate": "Describe a style and press Generate. Ctrl or Cmd with Enter does the same.",
    "cover": "Choose a song or a sound, describe a style, and press Cover.",
    "extend": "Choose a song, say how much to add, and press Extend.",
    "edit": "Choose a song, pick a region of it, and press Edit.",
    "lyrics": "Say what the words are to be about, and press Write.",
}
DONE = "Done"
CANCELLED = "Stopped"
FAILED = "No song this time"
MEASURING = "measuring the time left"
PROGRESS = "Progress of the song"
ON, OFF = "on", "off"
NO_SOUND = "silence"
LISTENS = "Listening follows the song: there is nothing to guide."
NO_GUIDANCE = "{model} has its guidance built in, so this has nothing to steer."
MAY_SELL = {True: "free to sell", False: "not for sale", None: "ask before selling"}

FINISH = "Export, loudness, stems"
EXPORTS = {"export": "Export", "master": "Master", "stems": "Split into stems"}
FINISHED_AS = {
    "export": "The take as a file of your choice.",
    "master": "As loud as you say, no peak above the ceiling, in the format chosen above.",
    "stems": "Vocals, drums, bass and the rest, each as a file.",
}
"""The ways to finish a take: their buttons, and what each does."""

MADE = "Files"
STAYS_SILENT = "Silence stays as it is."
NOT_REACHED = "short of {target}, since more would squash its peaks"
CHECK = "Check"
CHECK_TIP = "Tempo and key are hints: measured in the sound, and not always right."
CHECK_COLUMNS = ("Property", "Asked for", "Measured")
NONE = "none"
OPEN = "left open"
VERDICTS = {
    "as asked": "as asked",
    "double": "double",
    "half": "half",
    "relative": "which has the same tones",
    "other": "another",
    "not sure": "not sure",
    "not asked": "",
}
"""How a tempo or a key that was measured lies to the one asked for."""

COMPARE = "Compare two takes"
PICKS = {"one": "One take", "other": "Another"}
BLIND = "Blind"
BLIND_TIP = "The two change places at random, and stay nameless until you choose."
COMPARE_RUN = "Compare"
COMPARING = {
    "group": "Two takes, equally loud",
    "play": "Play both",
    "stop": "Stop",
    "position": "Position",
    "how": "A and B switch while they play, as buttons and as keys.",
    "vote": "{letter} is better",
    "chosen": "You chose",
    "blind": "Equally loud. Which is better?",
    "silent": "silence",
    "down": "turned down by",
    "loading": "Loading both takes",
    "gone": "A take cannot be played. Press Compare once more.",
}
SHARING = {
    "share": "Share",
    "link": "Link with the settings",
    "copied": "The link is copied. It holds the settings, not the sound.",
    "copy": "Copy the link from here. It holds the settings, not the sound.",
}
DOORS = {
    "open": "Open a song file",
    "reading": "Reading {name}",
    "not_uploaded": "{name} could not be uploaded. Try again.",
}
DOORS_TIP = "Or drop a WAV, FLAC, MP3 or JSON of this studio anywhere: all its settings come back."
THE_LINK = "The link"
RESTORED = "{name}: its settings are in {tab}."
MASTERED = "Its sound was mastered to {target_lufs:g} LUFS: press Master once the take is there."
OTHER_MODEL = "It was made with {then}. {now} is playing here, so it will be another song."
LACKING_ADAPTERS = "Played with {names}. Choose them under Advanced, or it will be another song."

SEND = {"cover": "Cover this", "extend": "Extend this", "edit": "Edit this"}
"""What takes a piece to another tab, by the tab."""

HELP = {"inspire": "Surprise me", "rewrite": "Format my lyrics", "listen": "Listen"}
HELPS = {
    "inspire": "The planner thinks of a whole song and fills the form.",
    "rewrite": "The planner brings style and lyrics into the form the model likes.",
    "listen": "The planner listens to the song and fills what you left open.",
}
"""The helpers' buttons, and what each does."""

REPAIR = "Repair"
USE_WORDS = "Use in Generate"
DRAFT = "Draft"
DRAFT_TIP = "Yours to change before you use it."
SECTIONS = {True: "as asked", False: "not as asked"}

FILLED = "Filled in: {fields}."
NOTHING_OPEN = "Nothing was left open."
RETURNS_SONG = "The song as a WAV file, and its take: the request as really run, model and device."
RETURNS_FILES = "The files, and what was measured of them."
RETURNS_DRAFT = "The words, the sections asked for and those that came."
RETURNS_IDEA = "What was found: style, lyrics, tempo, key, beats per bar, language and length."

RACK = {"strength": "Strength", "remove": "Remove", "removed": "Removed"}
"""What stands beside an adapter."""

READING_ADAPTERS = "Reading the adapter"
ADDED = "Added {name}"
SETTINGS_ALONE = "Choose adapter_config.json together with the file it belongs to."
CHOOSE = "Choose a file, or drop it here"
A_FILE = "your file"
READING_FILE = "Reading {name}"
PICTURE = {
    "play": "Play",
    "play_region": "Play region",
    "stop": "Stop playing",
    "from": "From",
    "to": "To",
    "waveform": "Waveform of",
    "how": "Drag over the waveform, or move the ends with the arrow keys. Shift makes larger steps.",
    "mute": "This browser cannot play the file. The studio can use it all the same.",
}
"""What stands beside a waveform."""

PLANNED = {"generate": "As planned"}
HEARD = "As heard"
KEPT = "What was kept"
NOTES = "Notes"
AS_RUN = "Settings as run"
MADE_WITH = "Made with"
ADAPTED = "{name} at {strength:g} (rank {rank}, {modules} layers, sha256 {short})"


def tip(mode: str, param: Param) -> str:
    """What a knob does, with its range and its default read from the knob itself."""
    return f"{does(mode, param)} {span(param)}".rstrip()


def does(mode: str, param: Param) -> str:
    """What a knob does, in a sentence or two."""
    return TIPS.get(f"{mode}.{param.name}") or TIPS[param.name]


def span(param: Param) -> str:
    """The values a knob takes, such as "From 10 to 240 s, normally 30." Empty for choices."""
    unit = f" {param.unit}" if param.unit else ""
    if param.max_length:
        return f"Up to {param.max_length:,} characters."
    if param.low is None:
        return ""
    usual = "automatic unless set" if param.default is None else f"normally {param.default:g}"
    return f"From {param.low:,.10g} to {param.high:,.10g}{unit}, {usual}."


def called(param: Param) -> str:
    """What a knob is called."""
    return LABELS.get(param.name, param.label)


def label(param: Param) -> str:
    """A knob's label with its unit."""
    return f"{called(param)} ({param.unit})" if param.unit else called(param)


def choice(name: str, value: Any) -> str:
    """How one choice of the knob `name` is called. Codes stay visible behind languages."""
    if value in ("", "unknown"):
        return AUTO
    called = CHOICES.get(name, {}).get(value, str(value))
    return f"{called} ({value})" if name in LANGUAGES else called


def stage(name: str) -> str:
    """What a stage is called on the page."""
    return STAGES.get(name, name)


def count(event: Progress) -> str:
    """How far a stage is, such as "step 3 of 27", or nothing where there is nothing to count."""
    if event.stage == "Waiting":
        return f"{event.step} ahead of you" if event.step else ""
    if event.stage.startswith("Fetching"):
        return f"{event.step:,} of {event.steps:,} MB"
    if event.steps < 2 or event.stage not in COUNTED:
        return ""
    return f"{COUNTED[event.stage]} {event.step} of {event.steps}"


def clock(seconds: float) -> str:
    """A time that has passed: 0:07, 1:02:03."""
    whole = max(0, int(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def left(span_s: tuple[float, float] | None) -> str:
    """The time that is left, as a range that errs outwards, never as one number too good."""
    if span_s is None:
        return MEASURING
    soonest, latest = max(0.0, span_s[0]), max(0.0, span_s[1])
    unit, seconds = ("min", 60) if latest > 100 else ("s", 1)
    grain = seconds * (1 if unit == "min" or latest <= 20 else 5)
    low = math.floor(soonest / grain) * grain // seconds
    high = max(1, math.ceil(latest / grain) * grain // seconds)
    if low <= 0:
        return f"up to {high} {unit} left"
    return f"about {high} {unit} left" if low == high else f"about {low} to {high} {unit} left"


def progress_line(event: Progress) -> str:
    """One line of progress: stage, count, time passed, time left."""
    parts = (stage(event.stage), count(event), clock(event.elapsed_s), left(event.left_s))
    return " · ".join(part for part in parts if part)


def shown(param: Param, value: Any) -> str:
    """A knob's value as a person would write it."""
    if param.choices or param.name in CHOICES:
        return choice(param.name, value)
    if isinstance(value, bool):
        return ON if value else OFF
    if param.type is Path:
        return Path(value).name
    if param.name == "adapters":
        return ", ".join(f"{Path(worn['file']).name} {worn['strength']:g}" for worn in value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text} {param.unit}" if param.unit else text


def seen(look: AudioInfo) -> str:
    """What a file holds, such as "0:42.5 · 44.1 kHz · stereo"."""
    minutes, seconds = divmod(look.seconds, 60)
    wide = {1: "mono", 2: "stereo"}.get(look.channels, f"{look.channels} channels")
    return f"{minutes:.0f}:{seconds:04.1f} · {look.rate / 1000:g} kHz · {wide}"


def fitted(seen: AdapterInfo) -> str:
    """What an adapter is, such as "rank 16 · 192 layers · 12.3 MB"."""
    layers = "1 layer" if seen.modules == 1 else f"{seen.modules} layers"
    size = (
        f"{seen.size_bytes / 1e6:.1f} MB"
        if seen.size_bytes >= 1e6
        else (f"{math.ceil(seen.size_bytes / 1000)} kB")
    )
    return f"rank {seen.rank} · {layers} · {size}"
