"""The form of lyrics: sections and their tags, what a songwriter is asked, what its answer keeps.

No torch here. A text is in form when every section begins with a tag such as `[verse]` on a line
of its own and holds nothing but lines to be sung.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

from core.errors import StudioError
from core.music import LANGUAGE_NAMES
from core.requests import Lyrics

MOST_SECTIONS = 16


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
"""How sections are called, by the ways in which songwriters spell them."""


_BARE = frozenset("intro verse pre-chorus chorus post-chorus outro".split())
"""Names that are a tag even without brackets: nobody sings them alone on a line."""


_MANNERS = frozenset(
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


_OFFER = re.compile(
    r"(?i)(note|notes|explanation)\b.*:|(let me know|feel free|(i )?hope (you|this|these)"
    r"|would you like|i('ve| have) (written|kept|made)|th(is|e|ese) (song|lyrics|version|draft)\b)"
)
"""How a paragraph begins that speaks about the words instead of being some."""


_RULE = re.compile(r"\s*([-*_=~])(\s*\1){2,}\s*")


_MARKED = re.compile(r"(\*{1,3}|_{1,3}|~~|`{1,3})(?=\S)(.*?)(?<=\S)\1")


_LEADING = re.compile(r"\s*(#{1,6}\s+|>\s*|[-*•]\s+|\d{1,2}[.)]\s+|`{3,}\w*\s*$)")


_TAG = re.compile(r"[\[【]\s*([^\[\]【】]{1,40}?)\s*[\]】]\s*[:：]?\s*(.*)")


_ASIDE = re.compile(r"[(（]\s*([^()（）]{1,30}?)\s*[)）]\s*[:：]?")


_COLON = re.compile(r"([^:：]{1,30}?)\s*[:：]\s*(.*)")


_TIMES = re.compile(r"\W*[x×]?\s*\d*\s*(times|repeat)?\W*", re.IGNORECASE)


_LOST = re.compile(r"<\|[^|<>]*\|>|<br\s*/?>|[\ufffd\u200b\ufeff\x00-\x08\x0b-\x1f\x7f]")


def section(words: str, others: Collection[str] = (), strict: bool = False) -> str:
    """The one name of a section that is called `words`, or "" if none is known by them.

    Numbers and manners go: "Verse 2", "final chorus", "Chorus - softly" are a verse and choruses.

    Args:
        others: names that count too, as `asked` returns them.
        strict: nothing but names and manners may be there.
    """
    plain = re.split(r"\s[-–—]\s|[:：(|,]", words.casefold())[0]
    plain = re.sub(r"\b(pre|post|build|spoken)[\s_-]+(?=\w)", r"\1-", plain)
    plain = " ".join(re.sub(r"[\d#.]+", " ", plain).split())
    if plain in others:
        return plain
    parts = plain.split()
    known = [NAMES[part] for part in parts if part in NAMES]
    fits = all(part in NAMES or part in _MANNERS for part in parts) if strict else len(parts) <= 3
    return known[-1] if known and fits else ""


def asked(structure: str) -> tuple[str, ...]:
    """The sections that a request names: "verse x2, Chorus" is ("verse", "verse", "chorus").

    A name that nobody knows, such as "gospel choir", stays as it is written, in small letters.

    Raises:
        StudioError: `value-out-of-range`, for no section at all or more than `MOST_SECTIONS`.
    """
    found: list[str] = []
    for part in re.split(r"[,;/|\n>→+]+|\s-+\s", structure):
        times = re.search(r"(?:^|\s)[x×]\s*(\d+)|(\d+)\s*[x×](?:\s|$)", part)
        words = part.replace(times[0], " ") if times else part
        words = re.sub(r"[^\w\s'-]|\d", " ", words)
        name = section(words) or " ".join(words.casefold().split())[:30]
        count = int(times[1] or times[2]) if times else 1
        found += [name] * min(count, MOST_SECTIONS + 1) if name else []
    if not 0 < len(found) <= MOST_SECTIONS:
        problem = f"names {len(found)} sections, and 1 to {MOST_SECTIONS} fit"
        fix = "Write names such as: verse, chorus, verse, chorus"
        raise StudioError("value-out-of-range", label="Sections", problem=problem, fix=fix)
    return tuple(found)


def parts(text: str, others: Collection[str] = ()) -> list[tuple[str, list[str]]]:
    """Each section of a text in form with the lines that are sung in it."""
    found: list[tuple[str, list[str]]] = []
    for line in text.split("\n"):
        tag = re.fullmatch(r"\[([^\[\]]+)\]", line)
        if tag and (name := section(tag[1], others)):
            found.append((name, []))
        elif found and line and not tag:
            found[-1][1].append(line)
    return found


def sections(text: str, others: Collection[str] = ()) -> tuple[str, ...]:
    """The sections that a text in form really has. A tag without words counts if it needs none.

    Args:
        others: names beyond the common ones, as `asked` returns them.
    """
    return tuple(name for name, lines in parts(text, others) if lines or name in WORDLESS)


def normalise(text: str, others: Collection[str] = ()) -> str:
    """A songwriter's answer in form: one kind of tag, no markdown, no word about the words.

    `[Verse 1]`, `(Chorus)`, `**Chorus:**`, `### Verse` and `Verse: line` all become a tag of its
    own line. What stands before the first tag or speaks about the song after the last is left out;
    without any tag all lines are kept. Applying it twice changes nothing more.

    Args:
        others: names beyond the common ones, as `asked` returns them.
    """
    for _ in range(8):  # taking one mark off may uncover another
        if (mended := _mended(text, others)) == text:
            break
        text = mended
    return text


def _mended(text: str, others: Collection[str]) -> str:
    kept: list[str] = []
    tags, ruled = 0, None
    for raw in _LOST.sub("", text.expandtabs(1)).split("\n"):
        if _RULE.fullmatch(raw):
            ruled = len(kept)  # what follows is about the song, unless a tag comes
            continue
        line = _LEADING.sub("", raw) if _LEADING.match(raw) else raw
        bold = line.strip()
        line = _MARKED.sub(r"\2", bold).strip()
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
    while tags and (last := _last_paragraph(kept)) and _OFFER.match(kept[last]):
        kept = kept[:last]
    return "\n".join(kept).strip("\n")


def _tag(line: str, others: Collection[str], heading: bool) -> tuple[str, str]:
    """(name of the section that the line opens or "", what is to be sung on the same line)."""
    if found := _TAG.fullmatch(line):
        name, rest = section(found[1], others), found[2]
        if found[1].casefold() in ("end", "title"):
            return "", ""
        return (name, "" if _TIMES.fullmatch(rest) else rest) if name else ("", line)
    if (found := _ASIDE.fullmatch(line)) and (name := section(found[1], others, True)):
        return name, ""
    found = _COLON.fullmatch(line)
    if found and (name := section(found[1], others, True)):
        rest = "" if _TIMES.fullmatch(found[2]) else found[2]
        if heading or not rest or name in _BARE or name in others:
            return name, rest
    if heading and (name := section(line, others, True)):
        return name, ""
    bare = NAMES.get("-".join(re.sub(r"\s*\d+$", "", line.casefold()).split()))
    return (bare, "") if bare in _BARE else ("", line)


def _last_paragraph(lines: Sequence[str]) -> int:
    """Where the last paragraph begins behind a blank line; 0 if there is none but the first."""
    end = len(lines)
    while end and not lines[end - 1]:
        end -= 1
    while end and lines[end - 1]:
        end -= 1
    return end


def opening(wanted: Sequence[str]) -> str:
    """How every answer begins: the first tag is ours, so that no greeting can come before it."""
    return f"[{wanted[0]}]\n"


def turns(request: Lyrics) -> list[tuple[str, str]]:
    """What a songwriter is asked: (role, text) for each turn of the conversation.

    Raises:
        StudioError: `value-out-of-range`, as `asked`.
    """
    wanted = asked(request.structure)
    tags = "\n".join(f"[{name}]" for name in wanted)
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


def repair_turns(request: Lyrics, text: str) -> list[tuple[str, str]]:
    """The conversation that gives a broken draft back, with what is wrong with it."""
    wanted = asked(request.structure)
    text = normalise(text, wanted)
    wrong = " ".join(faults(wanted, sections(text, wanted)))
    tags = "\n".join(f"[{name}]" for name in wanted)
    plea = (
        f"{wrong} Write the whole song again. Keep the lines that are good, and use exactly these "
        f"sections, in this order, each with {request.lines} lines under its tag:\n{tags}"
    )
    return [*turns(request), ("assistant", text), ("user", plea.strip())]


def faults(wanted: Sequence[str], got: Sequence[str]) -> list[str]:
    """What is wrong with the sections of a draft, a sentence each; nothing if they are as asked."""
    lacking, surplus = Counter(wanted) - Counter(got), Counter(got) - Counter(wanted)
    said = []
    if lacking:
        said.append(f"These sections are missing: {_listed(lacking)}.")
    if surplus:
        said.append(f"Nobody asked for these sections: {_listed(surplus)}.")
    if not said and tuple(wanted) != tuple(got):
        said.append(f"The sections are in another order: {', '.join(got)}.")
    return said


def uneven(text: str, lines: int, others: Collection[str] = ()) -> str:
    """A sentence about sung sections with another number of lines than `lines`, or ""."""
    off = [
        f"{name} has {len(sung)}"
        for name, sung in parts(text, others)
        if sung and len(sung) != lines and name not in WORDLESS
    ]
    return f"{lines} lines a section were asked for: {', '.join(off)}." if off else ""


def _listed(names: Counter[str]) -> str:
    return ", ".join(f"{name} ({n} times)" if n > 1 else name for name, n in names.items())


def _language(code: str) -> str:
    if code == "unknown":
        return "that of the description"
    return LANGUAGE_NAMES[code]
