"""Text as people type it: normalised before it is used, cut without breaking characters apart."""

from __future__ import annotations

import re
import unicodedata

LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
"""Everything Unicode calls a line end (UAX 14), but for the line feed itself."""

BYTE_ORDER_MARK = "\ufeff"

JOINERS = "\u200c\u200d"
"""Zero-width non-joiner and joiner: spelling in Persian and Devanagari, glue in emoji."""

SPACELESS = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Characters of scripts that have no spaces between words. Korean has them."""


def normalize(text: str) -> str:
    """`text` with one spelling for what looks the same.

    Every line end becomes a line feed; byte order marks and control characters other than tab and
    line feed are removed; the rest is in Unicode normalisation form C. Idempotent.
    """
    kept = "".join(c for c in LINE_END.sub("\n", text) if _is_kept(c))
    # Last: what was removed may have stood between a letter and its accent.
    return unicodedata.normalize("NFC", kept)


def truncate(text: str, max_chars: int, max_bytes: int) -> str:
    """The longest beginning of `text` within both limits that ends between visible characters.

    Args:
        max_chars: code points.
        max_bytes: of UTF-8.
    """
    end = size = 0
    for index, char in enumerate(text):
        if not _continues(text, index):
            end = index
        size += len(char.encode("utf-8", "surrogatepass"))
        if index >= max_chars or size > max_bytes:
            # One visible character may be longer than the limit: then it is cut.
            return text[: end or index]
    return text


def one_line(text: str, longest: int = 200) -> str:
    """`text` as one line of printable characters, and of those that join letters and emoji."""
    words = "".join(c if c.isprintable() or c in JOINERS else " " for c in text).split()
    return " ".join(words)[:longest].strip()


def printable(text: str, max_chars: int = 80) -> str:
    """The last `max_chars` of `text`, with "?" for what would disturb a terminal or a page."""
    shown = "".join(c if c.isprintable() or c in JOINERS else "?" for c in text)[-max_chars:]
    # A cut may not leave a vowel sign or an accent without its letter.
    first = next(
        (i for i, c in enumerate(shown) if not is_mark(c) and c not in JOINERS), len(shown)
    )
    return shown[first:]


def describe_length(text: str, fraction: float = 1.0) -> str:
    """The length of a part of `text`, such as "120 words", or "300 characters" where most of its
    letters belong to a script without spaces between words (Chinese, Japanese, Thai, …).

    Args:
        fraction: 0 to 1, how large the part is.
    """
    spaceless = len(SPACELESS.findall(text))
    letters = sum(char.isalpha() or is_mark(char) for char in text)
    if 2 * spaceless > letters:
        count, unit = int(spaceless * fraction), "character"
    else:
        count, unit = int(len(text.split()) * fraction), "word"
    return f"{count:,} {unit}" + ("" if count == 1 else "s")


def is_mark(char: str) -> bool:
    """Whether `char` is a combining mark, such as a vowel sign in Devanagari or an accent."""
    return unicodedata.category(char).startswith("M")


def _is_kept(char: str) -> bool:
    return char in "\t\n" or (char != BYTE_ORDER_MARK and unicodedata.category(char) != "Cc")


def _continues(text: str, index: int) -> bool:
    """Whether the character at `index` belongs to the visible character before it."""
    if not index:
        return False
    char = text[index]
    skin_tone = "\U0001f3fb" <= char <= "\U0001f3ff"
    return is_mark(char) or char in JOINERS or skin_tone or text[index - 1] == "\u200d"
