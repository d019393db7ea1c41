"""Musical terms: keys, time signatures and languages, and every unambiguous way to spell them."""

from __future__ import annotations

import re
from typing import Any

from core.params import is_auto

NOTES = ("C", "D", "E", "F", "G", "A", "B")

KEYS = tuple(
    f"{note}{sign} {mode}"
    for mode in ("major", "minor")
    for note in NOTES
    for sign in ("", "#", "b")
)
"""The keys the planner knows, spelt as it spells them."""

TIME_SIGNATURE_NAMES = {"2": "2/4", "3": "3/4", "4": "4/4", "6": "6/8"}
"""How musicians write the time signatures, by the beats per bar that the planner knows them by."""

TIME_SIGNATURES = tuple(TIME_SIGNATURE_NAMES)

INSTRUMENTAL = "[Instrumental]"
"""Lyrics of a piece without vocals, spelt as the models were trained on them."""

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
"""Languages of lyrics by ISO 639 code, with the English names that the prompts use."""

UNKNOWN_LANGUAGE = "unknown"

LANGUAGES = (*LANGUAGE_NAMES, UNKNOWN_LANGUAGE)

_LANGUAGE_ALIASES = {
    **{name.lower(): code for code, name in LANGUAGE_NAMES.items()},
    "nb": "no",
    "nn": "no",
    "fil": "tl",
    "iw": "he",
    "cmn": "zh",
    "mandarin": "zh",
    "filipino": "tl",
    "farsi": "fa",
}

_KEY = re.compile(
    r"(?P<note>[A-Ga-g])"
    r"(?:[\s_-]*(?P<sign>[#bB]|(?i:sharp|flat)))?"
    r"(?:[\s_:-]*(?P<mode>(?i:major|maj|dur|minor|min|moll)|m|M))?"
)
_SIGNS = {"sharp": "#", "flat": "b"}
_MAJOR = ("major", "maj", "dur", "M")


def parse_key(value: Any) -> Any:
    """The spelling in `KEYS` of a key however it is written; "" for "auto".

    Accepts "Am", "C Minor", "c# minor", "Bbmaj", "F♯ minor", "E-flat major" and "A:min".
    A capital letter alone is a major key. A small letter alone could be either, and comes back as
    it is, like everything else that is not a key.
    """
    if value is None or is_auto(value):
        return ""
    if not isinstance(value, str):
        return value
    plain = value.strip().translate({0x266F: "#", 0xFF03: "#", 0x266D: "b"})
    found = _KEY.fullmatch(plain)
    if found is None or (found["mode"] is None and found["note"].islower()):
        return value
    sign = (found["sign"] or "").lower()
    mode = found["mode"] or "M"
    major = mode == "M" or mode.lower() in _MAJOR
    return f"{found['note'].upper()}{_SIGNS.get(sign, sign)} {'major' if major else 'minor'}"


def parse_time_signature(value: Any) -> Any:
    """One of `TIME_SIGNATURES` for 4, 4.0, "4" or "4/4"; "" for "auto"."""
    if value is None or is_auto(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return value
    plain = re.sub(r"\s", "", value)
    return {name: beats for beats, name in TIME_SIGNATURE_NAMES.items()}.get(plain, plain)


def parse_language(value: Any) -> Any:
    """A code of `LANGUAGES` for a code or an English name in any case; "unknown" for "auto".

    The region of a code such as "pt-BR" is left out, and so is a code behind a name, as in
    "German (de)".
    """
    if value is None or is_auto(value):
        return UNKNOWN_LANGUAGE
    if not isinstance(value, str):
        return value
    plain = re.sub(r"\s*\(\w+\)$", "", value.strip()).lower()
    for spelling in (plain, re.split(r"[-_]", plain)[0]):
        code = _LANGUAGE_ALIASES.get(spelling, spelling)
        if code in LANGUAGES:
            return code
    return value
