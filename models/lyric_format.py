"""The format of lyrics: section names and tags, the songwriter's prompt, cleaning up its answer.

Without torch. Formatted lyrics have a tag such as `[verse]` on a line of its own before every
section, and otherwise only lines to be sung.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

from core.errors import StudioError
from core.music import LANGUAGE_NAMES
from core.requests import Lyrics

MAX_SECTIONS = 16


WORDLESS = frozenset("intro interlude break breakdown build drop solo inst outro".split())
"""Sections that may hold no words. Any other counts only with a line under its tag."""


_SPELLINGS = {
    "intro": "introduction introducción introdução einleitung вступление 前奏 イントロ 인트로",
    "verse": "verses strophe estrofa verso verset couplet strofa куплет 主歌 verse ヴァース 벌스",
    "pre-chorus": "prechorus pre-refrain pre-coro pre-estribillo pre-refrão 导歌 預副歌 预副歌",
    "chorus": "refrain estribillo coro refrão ritornello kehrreim refren припев 副歌 サビ 후렴",
    "post-chorus": "postchorus post-refrain",
    "hook": "",
    "bridge": "puente ponte pont brücke бридж 桥段 橋段 桥 ブリッジ 브릿지",
    "interlude": "interludio intermezzo 间奏 間奏 間奏",
    "break": "",
    "breakdown": "",
    "build": "build-up buildup",
    "drop": "",
    "solo": "",
    "inst": "instrumental instr",
    "spoken": "spoken-word",
    "rap": "",
    "outro": "coda final-coda 尾奏 アウトロ 아웃트로",
}


NAMES = {
    spelling: name for name, others in _SPELLINGS.items() for spelling in (name, *others.split())
}
"""Names of sections, by the spellings that songwriters use."""


_BARE_TAGS = frozenset("intro verse pre-chorus chorus post-chorus outro".split())
"""Names that are a tag even without brackets: on a line of their own they are never sung."""


_QUALIFIERS = frozenset(
    "final last repeat first second third one two three four i ii iii iv x guitar piano sax drum "
    "vocal instrumental short double".split()
)
"""What may stand beside a name outside square brackets: "(break it down)" is sung."""


_RHYMES = {
    "free": "none is needed",
    "couplets": "AABB, each line rhymes with the next",
    "alternate": "ABAB, every other line rhymes",
    "enclosed": "ABBA, the outer lines rhyme and the inner ones",
}


_COMMENT = re.compile(
    r"(?i)(note|notes|explanation)\b.*:|(let me know|feel free|(i )?hope (you|this|these)"
    r"|would you like|i('ve| have) (written|kept|made)|th(is|e|ese) (song|lyrics|version|draft)\b)"
)
"""How a paragraph begins that comments on the lyrics instead of being part of them."""


_HORIZONTAL_RULE = re.compile(r"\s*([-*_=~])(\s*\1){2,}\s*")


_EMPHASIS = re.compile(r"(\*{1,3}|_{1,3}|~~|`{1,3})(?=\S)(.*?)(?<=\S)\1")


_LINE_PREFIX = re.compile(r"\s*(#{1,6}\s+|>\s*|[-*•]\s+|\d{1,2}[.)]\s+|`{3,}\w*\s*$)")


_BRACKETED_TAG = re.compile(r"[\[【]\s*([^\[\]【】]{1,40}?)\s*[\]】]\s*[:：]?\s*(.*)")


_PARENTHESISED_TAG = re.compile(r"[(（]\s*([^()（）]{1,30}?)\s*[)）]\s*[:：]?")


_COLON_TAG = re.compile(r"([^:：]{1,30}?)\s*[:：]\s*(.*)")


_REPETITION = re.compile(r"\W*[x×]?\s*\d*\s*(times|repeat)?\W*", re.IGNORECASE)


_REMOVED = re.compile(r"<\|[^|<>]*\|>|<br\s*/?>|[\ufffd\u200b\ufeff\x00-\x08\x0b-\x1f\x7f]")


def section_name(words: str, others: Collection[str] = (), strict: bool = False) -> str:
    """The standard name of the section that `words` name, or "" if they name none.

    Numbers and qualifiers are dropped: "Verse 2" is a verse, "final chorus" a chorus.

    Args:
        others: names that count too, as `parse_structure` returns them.
        strict: nothing but names and qualifiers may be there.
    """
    plain = re.split(r"\s[-–—]\s|[:：(|,]", words.casefold())[0]
    plain = re.sub(r"\b(pre|post|build|spoken)[\s_-]+(?=\w)", r"\1-", plain)
    plain = " ".join(re.sub(r"[\d#.]+", " ", plain).split())
    if plain in others:
        return plain
    parts = plain.split()
    known = [NAMES[part] for part in parts if part in NAMES]
    fits = (
        all(part in NAMES or part in _QUALIFIERS for part in parts) if strict else len(parts) <= 3
    )
    return known[-1] if known and fits else ""


def parse_structure(structure: str) -> tuple[str, ...]:
    """The sections that a request names: "verse x2, Chorus" is ("verse", "verse", "chorus").

    An unknown name, such as "gospel choir", stays as it is written, in lower case.

    Raises:
        StudioError: `value-out-of-range`, for no section at all or more than `MAX_SECTIONS`.
    """
    found: list[str] = []
    for part in re.split(r"[,;/|\n>→+]+|\s-+\s", structure):
        times = re.search(r"(?:^|\s)[x×]\s*(\d+)|(\d+)\s*[x×](?:\s|$)", part)
        words = part.replace(times[0], " ") if times else part
        words = re.sub(r"[^\w\s'-]|\d", " ", words)
        name = section_name(words) or " ".join(words.casefold().split())[:30]
        count = int(times[1] or times[2]) if times else 1
        found += [name] * min(count, MAX_SECTIONS + 1) if name else []
    if not 0 < len(found) <= MAX_SECTIONS:
        problem = f"names {len(found)} sections, and 1 to {MAX_SECTIONS} fit"
        fix = "Write names such as: verse, chorus, verse, chorus"
        raise StudioError("value-out-of-range", label="Sections", problem=problem, fix=fix)
    return tuple(found)


def parse_sections(text: str, others: Collection[str] = ()) -> list[tuple[str, list[str]]]:
    """Each section of formatted lyrics: its name and the lines that are sung in it."""
    found: list[tuple[str, list[str]]] = []
    for line in text.split("\n"):
        tag = re.fullmatch(r"\[([^\[\]]+)\]", line)
        if tag and (name := section_name(tag[1], others)):
            found.append((name, []))
        elif found and line and not tag:
            found[-1][1].append(line)
    return found


def section_names(text: str, others: Collection[str] = ()) -> tuple[str, ...]:
    """The sections that formatted lyrics have. One without lines counts if it needs none.

    Args:
        others: names beyond the common ones, as `parse_structure` returns them.
    """
    return tuple(name for name, lines in parse_sections(text, others) if lines or name in WORDLESS)


def normalise(text: str, others: Collection[str] = ()) -> str:
    """A songwriter's answer as formatted lyrics: one kind of tag, no markdown, no comments.

    `[Verse 1]`, `(Chorus)`, `**Chorus:**`, `### Verse` and `Verse: line` all become a tag on a line
    of its own. Text before the first tag and comments after the last section are removed; without
    any tag all lines are kept. Applying it twice changes nothing more.

    Args:
        others: names beyond the common ones, as `parse_structure` returns them.
    """
    for _ in range(8):  # removing one mark may uncover another
        if (cleaned := _clean(text, others)) == text:
            break
        text = cleaned
    return text


def _clean(text: str, others: Collection[str]) -> str:
    kept: list[str] = []
    tags, ruled = 0, None
    for raw in _REMOVED.sub("", text.expandtabs(1)).split("\n"):
        if _HORIZONTAL_RULE.fullmatch(raw):
            ruled = len(kept)  # a comment follows, unless a tag comes
            continue
        line = _LINE_PREFIX.sub("", raw) if _LINE_PREFIX.match(raw) else raw
        bold = line.strip()
        line = _EMPHASIS.sub(r"\2", bold).strip()
        heading = bold.startswith(("**", "__")) or raw.lstrip().startswith("#")
        name, rest = _tag(line, others, heading)
        if name:
            kept = kept if tags else []
            tags, ruled = tags + 1, None
            while kept and not kept[-1]:
                kept.pop()
            if kept[-1:] != [f"[{name}]"]:
                kept += [""] * bool(kept) + [f"[{name}]"]
        if rest or (not name and not rest and kept and kept[-1] and kept[-1][0] != "["):
            kept.append(rest)
    if tags and ruled is not None:
        kept = kept[:ruled]
    while tags and (last := _last_paragraph(kept)) and _COMMENT.match(kept[last]):
        kept = kept[:last]
    return "\n".join(kept).strip("\n")


def _tag(line: str, others: Collection[str], heading: bool) -> tuple[str, str]:
    """(name of the section that the line opens or "", what is sung on the same line)."""
    if found := _BRACKETED_TAG.fullmatch(line):
        name, rest = section_name(found[1], others), found[2]
        if found[1].casefold() in ("end", "title"):
            return "", ""
        return (name, "" if _REPETITION.fullmatch(rest) else rest) if name else ("", line)
    if (found := _PARENTHESISED_TAG.fullmatch(line)) and (
        name := section_name(found[1], others, True)
    ):
        return name, ""
    found = _COLON_TAG.fullmatch(line)
    if found and (name := section_name(found[1], others, True)):
        rest = "" if _REPETITION.fullmatch(found[2]) else found[2]
        if heading or not rest or name in _BARE_TAGS or name in others:
            return name, rest
    if heading and (name := section_name(line, others, True)):
        return name, ""
    bare = NAMES.get("-".join(re.sub(r"\s*\d+$", "", line.casefold()).split()))
    return (bare, "") if bare in _BARE_TAGS else ("", line)


def _last_paragraph(lines: Sequence[str]) -> int:
    """Index of the first line of the last paragraph; 0 if it is the only one."""
    end = len(lines)
    while end and not lines[end - 1]:
        end -= 1
    while end and lines[end - 1]:
        end -= 1
    return end


def answer_prefix(requested: Sequence[str]) -> str:
    """How every answer begins: the first tag is given, so that no greeting can come before it."""
    return f"[{requested[0]}]\n"


def chat_messages(request: Lyrics) -> list[tuple[str, str]]:
    """The songwriter's prompt: (role, text) for each message of the conversation.

    Its words depend on the request alone, and on no text of the interface.

    Raises:
        StudioError: `value-out-of-range`, as `parse_structure`.
    """
    requested = parse_structure(request.structure)
    tags = "\n".join(f"[{name}]" for name in requested)
    lines = [
        "Write the lyrics of a song.",
        f"About: {' '.join(request.brief.split())}",
        f"Language: {_language(request.language)}",
        f"Tone: {' '.join(request.tone.split())}" if request.tone.strip() else "",
        f"Rhyme: {_RHYMES[request.rhyme]}",
        f"Lines in each section: {request.lines}",
        f"Sections, in this order, each under its tag:\n{tags}",
    ]
    system = (
        "You are a songwriter. You write words that are sung as they stand: short lines under "
        "section tags in square brackets, in English as given, with a blank line between sections. "
        "A chorus comes back with the same words, a verse with new ones. You write no title, no "
        "comment and no markdown."
    )
    return [("system", system), ("user", "\n".join(filter(None, lines)))]


def repair_messages(request: Lyrics, text: str) -> list[tuple[str, str]]:
    """The conversation that has a faulty draft written again: it, and what is wrong with it."""
    requested = parse_structure(request.structure)
    text = normalise(text, requested)
    problems = " ".join(structure_problems(requested, section_names(text, requested)))
    tags = "\n".join(f"[{name}]" for name in requested)
    correction = (
        f"{problems} Write the whole song again. Keep the lines that are good, and use exactly these "
        f"sections, in this order, each with {request.lines} lines under its tag:\n{tags}"
    )
    return [*chat_messages(request), ("assistant", text), ("user", correction.strip())]


def structure_problems(requested: Sequence[str], found: Sequence[str]) -> list[str]:
    """What is wrong with the sections of a draft, a sentence each; none if they are as requested."""
    missing, surplus = Counter(requested) - Counter(found), Counter(found) - Counter(requested)
    problems = []
    if missing:
        problems.append(f"These sections are missing: {_listed(missing)}.")
    if surplus:
        problems.append(f"Nobody asked for these sections: {_listed(surplus)}.")
    if not problems and tuple(requested) != tuple(found):
        problems.append(f"The sections are in another order: {', '.join(found)}.")
    return problems


def line_count_problem(text: str, lines: int, others: Collection[str] = ()) -> str:
    """A sentence about the sections that have another number of lines than `lines`, or ""."""
    wrong = [
        f"{name} has {len(sung)}"
        for name, sung in parse_sections(text, others)
        if sung and len(sung) != lines and name not in WORDLESS
    ]
    return f"{lines} lines a section were asked for: {', '.join(wrong)}." if wrong else ""


def _listed(names: Counter[str]) -> str:
    return ", ".join(f"{name} ({n} times)" if n > 1 else name for name, n in names.items())


def _language(code: str) -> str:
    if code == "unknown":
        return "that of the description"
    return LANGUAGE_NAMES[code]
