"""The sentences of the interface: help texts, statuses, buttons, and labels of choices.

Labels of parameters are declared with them, in `core/requests.py`.

Used by the page, the command line and the API. No range or default is written here: `help_text`
reads them from the parameter.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from core.music import LANGUAGE_NAMES

if TYPE_CHECKING:
    from core.params import Param
    from core.results import Progress

HELP: dict[str, str] = {
    "prompt": "Genre, instruments, mood, tempo and voice, as you would describe them to a band.",
    "cover.prompt": "Style of the cover. Leave empty to keep the style detected in the song.",
    "extend.prompt": "Style of the new part. Leave empty to keep the style detected in the song.",
    "edit.prompt": "Style after the edit. For a repaint, leave empty to keep the detected style.",
    "instrumental": "Whether the song has vocals.",
    "lyrics": "One sung line per line, with tags such as [verse]. Leave empty for an instrumental.",
    "extend.lyrics": "Lyrics of the new part. Leave empty for an instrumental part.",
    "edit.lyrics": "Lyrics of the whole song after the edit, unchanged lines included.",
    "duration_s": "Length of the song.",
    "cover.duration_s": "Length of the new song. With a source song, its length is used instead.",
    "source": "The song to start from, in any common audio format.",
    "reference": "A recording whose voice, instruments and room sound are imitated.",
    "follow": "What the cover keeps: melody and rhythm, or the recording itself, which is closer.",
    "strength": "Share of the steps that follow the song. Higher is more similar.",
    "noise": "Starts from the song's own sound instead of noise. Higher values keep more of it.",
    "before_s": "Length of the new music before the song.",
    "after_s": "Length of the new music after the song.",
    "kind": "Repaint replaces one region. Morph changes the whole song to another style.",
    "track": "The track to add to the song, or to extract from it.",
    "tracks": "Tracks that accompany the song, separated by commas. Empty lets the model choose.",
    "start_s": "Start of the region.",
    "end_s": "End of the region. Leave empty for the end of the song.",
    "repaint_mode": "How closely the new part follows the music around it.",
    "repaint_strength": "For balanced repaints. Higher values let the new part differ more.",
    "source_prompt": "Style of the song before the edit. Leave empty to use the detected style.",
    "source_lyrics": "Lyrics of the song before the edit. Leave empty if it has no vocals.",
    "n_max": "Upper noise level of the edit. Higher changes the song more; zero changes nothing.",
    "n_min": "Lower noise level of the edit. Below it, only the new style guides the result.",
    "n_avg": "Noise samples averaged at each step. More is steadier and slower.",
    "inference_steps": "Number of denoising steps. More steps give finer detail and take longer.",
    "fast_preview": "Estimates more than half of the steps: faster, a little less exact. ODE only.",
    "guidance_scale": "How closely the song follows style and lyrics. High values can sound harsh.",
    "infer_method": "ODE is steady, SDE adds noise at each step, Heun is slower and more exact.",
    "seed": "The same seed and settings give the same song.",
    "cfg_interval_start": "Noise level below which guidance is off. Zero keeps it on to the end.",
    "cfg_interval_end": "Noise level above which guidance is off. One has it on from the start.",
    "shift": "Higher values spend more steps on structure and fewer on detail.",
    "use_adg": "Guides by angle instead of distance. Try it when strong guidance sounds harsh.",
    "thinking": "Whether a language model analyses your song first.",
    "generate.thinking": "Whether a language model plans the song first.",
    "use_cot_caption": "Uses the style detected in the song when Style is empty.",
    "generate.use_cot_caption": "Lets the planner rewrite the style.",
    "use_cot_metas": "Lets the planner set tempo, key and time signature where you left them open.",
    "use_cot_lyrics": "Writes down the lyrics of the song where Lyrics is empty. Takes longer.",
    "use_cot_language": "Lets the planner detect the language of the lyrics.",
    "lm_temperature": "Randomness of the planner. At zero it always takes the most likely choice.",
    "lm_top_p": "Keeps the planner to the likeliest choices up to this total probability.",
    "lm_top_k": "Keeps the planner to this many of the likeliest choices. Zero means no limit.",
    "lm_cfg_scale": "How closely the planner follows style and lyrics.",
    "lm_negative_prompt": "What the planner should avoid.",
    "bpm": "Tempo in beats per minute.",
    "keyscale": "Key of the song.",
    "timesignature": "Number of beats in a bar.",
    "vocal_language": "Language of the lyrics.",
    "adapters": "LoRA or LoKr files made for this model, each with its own strength.",
    "brief": "What the lyrics are about: a story, a mood, an image.",
    "structure": "Sections in order, separated by commas.",
    "language": "Language of the lyrics.",
    "tone": "For example tender, defiant or dry. Leave empty to let the brief decide.",
    "rhyme": "Which lines rhyme with each other.",
    "lines": "Lines in each section.",
    "lyrics.seed": "The same seed and settings give the same lyrics.",
    "temperature": "Randomness of the wording. At zero the most likely word is always taken.",
    "top_p": "Keeps to the likeliest words up to this total probability. Lower is safer.",
    "top_k": "Keeps to this many of the likeliest words. Zero means no limit.",
    "repetition_penalty": "Higher values avoid repeating words.",
    "musicgen.temperature": "Randomness of the music. Lower values are more predictable.",
    "musicgen.top_k": "Keeps to this many of the likeliest tokens.",
    "repair": "A draft whose sections are not the requested ones. It is rewritten to fit.",
    "transcribe": "Also writes down the lyrics. Takes longer and can be wrong.",
    "idea": "One line is enough. Leave empty for a complete surprise.",
    "export.source": "The take to export.",
    "master.source": "The take to master.",
    "stems.source": "The take to split into stems.",
    "format": "WAV and FLAC are lossless. Compressed files are smaller.",
    "settings": "Stores the settings in the file, so that the song can be made again from it.",
    "ai_generated": "Marks the file as generated by AI.",
    "target_lufs": "Integrated loudness of the file, as streaming services measure it.",
    "ceiling_dbtp": "Highest true peak, also between samples.",
}
"""What each parameter does, by field name; `mode.field` comes first where a mode differs."""

LABELS: dict[str, str] = {"instrumental": "Vocals"}
"""Labels that differ from the parameter's own, because its widget offers named choices."""

CHOICES: dict[str, dict[Any, str]] = {
    "instrumental": {False: "With vocals", True: "Instrumental"},
    "infer_method": {"ode": "ODE", "sde": "SDE", "heun": "Heun"},
    "thinking": {True: "Yes", False: "No"},
    "format": {"wav": "WAV", "flac": "FLAC", "mp3": "MP3"},
    "kind": {
        "repaint": "Repaint",
        "morph": "Morph",
        "add_track": "Add a track",
        "accompany": "Accompany",
        "extract": "Extract a track",
    },
    "follow": {"codes": "Melody and rhythm", "latents": "Recording"},
    "rhyme": {
        "free": "None",
        "couplets": "Couplets (AABB)",
        "alternate": "Alternate (ABAB)",
        "enclosed": "Enclosed (ABBA)",
    },
    "repaint_mode": {
        "conservative": "Conservative",
        "balanced": "Balanced",
        "aggressive": "Aggressive",
    },
    "timesignature": {"2": "2/4", "3": "3/4", "4": "4/4", "6": "6/8"},
}
"""Labels of choices, by field and value. A choice that is missing here is shown as its value."""

LANGUAGES = ("vocal_language", "language")
"""Fields whose choices are languages."""

for field in LANGUAGES:
    CHOICES[field] = dict(LANGUAGE_NAMES)

AUTO = "Auto"
"""Label of the empty choice and of the language "unknown"."""

QUALITY = "Quality"
QUALITY_HELP = "Sets Steps. You can still change Steps afterwards."
QUALITIES = {"draft": "Draft", "standard": "Standard", "best": "Best"}
QUALITY_CHOICE = "{name} ({steps} steps)"

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
    "Composing": "Composing",
    "Composing codes": "Composing audio codes",
    "Listening": "Analysing the song",
    "Thinking of a song": "Inventing a song",
    "Rewriting": "Formatting the lyrics",
    "Reading the file": "Reading the file",
    "Encoding": "Encoding audio",
    "Reading adapters": "Loading adapters",
    "Reading the words": "Encoding text",
    "Loading the songwriter": "Loading the songwriter",
    "Writing the words": "Writing lyrics",
    "Denoising": "Generating audio",
    "Decoding": "Decoding audio",
    "Decoding the tokens": "Decoding audio",
    "Timing the lyrics": "Timing the lyrics",
    "Writing": "Saving the file",
    "Setting the loudness": "Mastering",
    "Splitting into stems": "Splitting into stems",
    "Writing the stems": "Saving the stems",
}
"""Stages of a job as they are displayed. The keys are stored in takes and rates and never change;
a stage that is missing here is displayed by its key."""

STAGE_UNITS: dict[str, str] = {
    "Denoising": "step",
    "Decoding": "part",
    "Composing": "token",
    "Splitting into stems": "part",
}
"""What is counted while a stage runs, where the count is useful to a person."""

TITLE = "ACE Music Studio"
SKIP = "Skip to the studio"
STOP = "Stop"
STOPPING = "Stopping"
RETAKE = "Retake"
REUSE = "Use these settings"
ADVANCED = "Advanced"
PLAYER = "Take"
TAKES = "Takes"
SAVE_WAV = "WAV"
SAVE_JSON = "Settings (JSON)"
LYRIC_LINES = {
    "title": "Lyrics",
    "help": "Choose a line to move the player there. The arrow keys go from line to line.",
    "unsung": "probably not sung",
}
READY = "Ready"
STARTING = "Starting"
BUTTONS = {"lyrics": "Write lyrics"}
"""Start buttons that are not called like their tab."""

NO_TAKES = "No takes yet"
NO_DRAFT = "No draft yet"
GETTING_STARTED = {
    "generate": "Describe a style and press Generate, or Ctrl+Enter (Cmd+Enter on a Mac).",
    "cover": "Choose a song or a reference, describe a style, and press Cover.",
    "extend": "Choose a song, set how much to add, and press Extend.",
    "edit": "Choose a song, select a region, and press Edit.",
    "lyrics": "Describe what the lyrics are about and press Write lyrics.",
}
DONE = "Done"
CANCELLED = "Stopped"
FAILED = "Failed"
MEASURING = "estimating time left"
PROGRESS = "Progress"
ON, OFF = "on", "off"
SILENCE = "silence"
NOT_WHILE_ANALYSING = "Has no effect here: the planner only analyses the song."
NO_VOCALS = "{model} was not trained on vocals. For sung songs choose a larger model."
NO_GUIDANCE = "Has no effect: guidance is built into {model}."
NO_PREVIEW = "Has no effect: {model} takes few steps as it is."
MAY_SELL = {
    True: "commercial use allowed",
    False: "non-commercial use only",
    None: "check the licence before commercial use",
}

EXPORT_PANEL = "Export, master, stems"
EXPORTS = {"export": "Export", "master": "Master", "stems": "Split into stems"}
EXPORT_HELP = {
    "export": "Saves the take as a file.",
    "master": "Sets the loudness, limits the peaks, and saves the take in the format above.",
    "stems": "Saves vocals, drums, bass and other instruments as separate files.",
}
"""What each export button does."""

FILES = "Files"
NOT_MASTERED = "The take is silent and was not changed."
NOT_REACHED = "The target of {target} was not reached: the limiter would distort the peaks."
CHECK = "Measurements"
CHECK_HELP = "Tempo and key are estimates and can be wrong."
CHECK_COLUMNS = ("Property", "Requested", "Measured")
NONE = "none"
NOT_SET = "not set"
VERDICTS = {
    "as asked": "as requested",
    "double": "double",
    "half": "half",
    "relative": "relative key",
    "other": "different",
    "not sure": "uncertain",
    "silence": "silence",
    "not asked": "",
}
"""How a measured tempo or key compares with the requested one, by the key in the take."""

COMPARE = "Compare two takes"
COMPARE_TAKES = {"one": "First take", "other": "Second take"}
BLIND = "Blind test"
BLIND_HELP = "Hides which take is A and which is B until you vote."
COMPARE_RUN = "Compare"
AB_PLAYER = {
    "group": "Compare two takes at equal loudness",
    "play": "Play",
    "stop": "Stop",
    "position": "Position",
    "help": "Switch during playback with the buttons or the keys A and B.",
    "vote": "{letter} is better",
    "chosen": "You chose",
    "blind": "Both play at equal loudness. Which is better?",
    "silent": "silence",
    "down": "turned down by",
    "loading": "Loading both takes",
    "gone": "A take could not be loaded. Press Compare again.",
}
SHARE = {
    "share": "Share",
    "link": "Link to these settings",
    "copied": "Link copied. It contains the settings, not the audio.",
    "copy": "Copy this link. It contains the settings, not the audio.",
}
RESTORE = {
    "open": "Open a song file",
    "reading": "Reading {name}",
    "not_uploaded": "{name} could not be uploaded. Try again.",
}
RESTORE_HELP = (
    "Or drop a WAV, FLAC, MP3 or JSON file made by this studio anywhere to load its settings."
)
THE_LINK = "the link"
RESTORED = "Settings from {name} loaded into {tab}."
MASTERED = "The file was mastered to {target_lufs:g} LUFS. Press Master after generating."
OTHER_MODEL = "The file was made with {then}. With {now} the result will differ."
MISSING_ADAPTERS = "Made with {names}. Add these adapters under Advanced to get the same result."

SEND = {"cover": "Cover this", "extend": "Extend this", "edit": "Edit this"}
"""Buttons that send a take to another tab, by the tab."""

HELPERS = {"inspire": "Surprise me", "rewrite": "Format lyrics", "listen": "Analyse"}
HELPER_HELP = {
    "inspire": "The planner invents a song and fills in the form.",
    "rewrite": "The planner formats style and lyrics for the model.",
    "listen": "The planner analyses the song and fills in empty fields.",
}
"""Buttons that let the planner fill in the form, and what each does."""

SONGWRITER = "Songwriter"
SONGWRITER_HELP = "Writes the lyrics on this computer. Larger ones write better and take longer."
DOWNLOAD_AND_WRITE = "Download and write lyrics"
FETCH_SONGWRITER = "No songwriter is on this computer yet. The button downloads one, then writes."
DOWNLOADING = "Downloading {title}"
DOWNLOAD_STOPPED = "Download stopped. Press the button to resume it."
MODELS = {
    "open": "Models",
    "title": "Models",
    "close": "Close",
    "fetch": "Download",
    "resume": "Resume",
    "stop": "Stop",
    "use": "Use",
    "on_disk": "on this computer",
    "missing": "not downloaded",
    "in_use": "in use",
    "fits": "fits",
    "does_not_fit": "does not fit",
    "progress": "Download of",
    "running": "{done:,.0f} of {total:,.0f} MB",
    "rate": "{rate:.1f} MB/s",
    "stopping": "stopping",
    "stopped": "stopped at {done:,.0f} MB",
    "done": "downloaded",
}
"""Texts of the list of models, which the badge at the top of the page opens."""

MODEL_KINDS = {
    "model": "Music",
    "planner": "Planners",
    "songwriter": "Songwriters",
    "stems": "Stem separation",
    "musicgen": "Other",
}
MODELS_HELP = "Another music model is chosen at the start: python app.py --model NAME"
MODELS_HELP_SPACE = "This Space runs one model. On your own computer you can choose."
REPAIR = "Repair"
USE_DRAFT = "Use in Generate"
DRAFT = "Draft"
DRAFT_HELP = "You can edit the draft before using it."
SECTIONS_WRITTEN = "{got} of {asked} sections"
SECTIONS = {True: "as requested", False: "not as requested"}

FILLED = "Filled in: {fields}."
NOTHING_FILLED = "Nothing was filled in."
RETURNS_SONG = "The song as a WAV file, and the take: the request as run, the model, the device."
RETURNS_FILES = "The files, and what was measured."
RETURNS_DRAFT = "The lyrics, the requested sections and the written ones."
RETURNS_IDEA = "Style, lyrics, tempo, key, time signature, language and length."
TOO_FEW_VALUES = "takes {needed} values, and {given} were sent"
SEND_BY_NAME = "Send all values in order, or send them by name to /call/v2/{name}"

ADAPTER_ROW = {"strength": "Strength", "remove": "Remove", "removed": "Removed"}
READING_ADAPTERS = "Reading the adapter"
ADDED = "Added {name}"
CONFIG_ALONE = "Choose adapter_config.json together with its adapter file."
CHOOSE = "Choose a file, or drop it here"
A_FILE = "your file"
READING_FILE = "Reading {name}"
PREVIEW = {
    "play": "Play",
    "play_region": "Play region",
    "stop": "Stop",
    "from": "From",
    "to": "To",
    "waveform": "Waveform of",
    "help": "Drag across the waveform, or move the ends with the arrow keys (Shift: larger steps).",
    "unplayable": "This browser cannot play the file, but the studio can use it.",
}
"""Texts of the preview of an uploaded file."""

PLANNED = {"generate": "Plan"}
DETECTED = "Detected in the song"
PRESERVED = "Preserved audio"
NOTES = "Notes"
AS_RUN = "Settings used"
MADE_WITH = "Made with"
ADAPTER_USED = "{name} at {strength:g} (rank {rank}, {modules} layers, sha256 {short})"


def help_text(mode: str, param: Param) -> str:
    """What a parameter does, followed by its range and default."""
    return f"{description(mode, param)} {value_range(param)}".rstrip()


def description(mode: str, param: Param) -> str:
    """What a parameter does in `mode`, in a sentence or two."""
    return HELP.get(f"{mode}.{param.name}") or HELP[param.name]


def value_range(param: Param) -> str:
    """Accepted values, such as "5 to 240 s, default 30."; empty for parameters with choices."""
    unit = f" {param.unit}" if param.unit else ""
    if param.max_length:
        return f"Up to {param.max_length:,} characters."
    if param.low is None:
        return ""
    default = "automatic" if param.default is None else f"{param.default:g}"
    return f"{param.low:,.10g} to {param.high:,.10g}{unit}, default {default}."


def name_of(param: Param) -> str:
    """A parameter's label without its unit."""
    return LABELS.get(param.name, param.label)


def label(param: Param) -> str:
    """A parameter's label with its unit."""
    return f"{name_of(param)} ({param.unit})" if param.unit else name_of(param)


def choice_label(name: str, value: Any) -> str:
    """The label of one choice of the parameter `name`. Languages keep their code behind it."""
    if value in ("", "unknown"):
        return AUTO
    text = CHOICES.get(name, {}).get(value, str(value))
    return f"{text} ({value})" if name in LANGUAGES else text


def stage_label(stage: str) -> str:
    """The displayed text of a stage."""
    return STAGES.get(stage, stage)


def progress_count(event: Progress) -> str:
    """How far a stage is, such as "step 3 of 27"; empty where nothing is counted."""
    if event.stage == "Waiting":
        return f"{event.step} ahead of you" if event.step else ""
    if event.stage.startswith("Fetching"):
        return f"{event.step:,} of {event.steps:,} MB"
    if event.steps < 2 or event.stage not in STAGE_UNITS:
        return ""
    return f"{STAGE_UNITS[event.stage]} {event.step} of {event.steps}"


def elapsed(seconds: float) -> str:
    """A duration as 0:07 or 1:02:03."""
    whole = max(0, int(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def time_left(span_s: tuple[float, float] | None) -> str:
    """The time left as a range rounded outwards, never a single optimistic number.

    Args:
        span_s: seconds (soonest, latest), or None while nothing is known.
    """
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
    """One line of progress: stage, count, time elapsed, time left."""
    parts = (
        stage_label(event.stage),
        progress_count(event),
        elapsed(event.elapsed_s),
        time_left(event.left_s),
    )
    return " · ".join(part for part in parts if part)
