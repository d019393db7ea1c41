"""How a song comes in as settings: a file of the studio's that is dropped, a link that is opened.

And how it goes out as a link. All that comes in may claim anything: it is checked as a whole, and
either fills a form or changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import gradio as gr

import theme
import tooltips as words
from audio import settings
from core.errors import StudioError
from core.requests import MODES, Lyrics
from core.results import ModelInfo, Take
from web import markup
from web.handlers import WORK, Update, brought

LONGEST_LINK, MOST_VALUES = 100_000, 100
"""Characters of a link and values in it. The longest lyrics, in Chinese, make 37,000."""


FILES = "files"
"""What a link says of files that went in: which fields they were for, not what they were."""


PLAIN = (str, bool, int, float)


Restore = Callable[[dict[str, Any], Mapping[str, StudioError]], Update]
"""Fill a tab's form: the values asked for, and what to say where a file has to be chosen again."""


def link_of(take: Take) -> str:
    """A link with the settings of `take`, without the address of the page, its sound or its files.

    The settings stand behind the #, which browsers keep to themselves.
    """
    request = take.to_request()
    told = {n: v for n, v in request.non_defaults().items() if isinstance(v, PLAIN)}
    files = [k.name for k in request.params() if k.type is Path and getattr(request, k.name)]
    told |= {FILES: ",".join(files)} if files else {}
    return f"?tab={take.mode}#" + urlencode(told, quote_via=quote)


def read_link(link: str) -> tuple[str, dict[str, Any], tuple[str, ...]] | None:
    """The settings in a link's query and fragment: mode, values, fields that were files.

    None where the link only names a tab, or nothing. Names that begin with two underscores are
    those of the page's host.

    Raises:
        StudioError: `link-unreadable`.
    """
    query, _, fragment = link.removeprefix("?").partition("#")
    parts = [part for part in (query, fragment) if "=" in part]
    if len(link) > LONGEST_LINK:
        raise StudioError("link-unreadable", problem="it is too long")
    try:
        pairs = parse_qsl(
            "&".join(parts), True, strict_parsing=True, errors="strict", max_num_fields=MOST_VALUES
        )
    except ValueError as error:
        raise StudioError("link-unreadable", problem="it is damaged") from error
    given = {name: value for name, value in pairs if not name.startswith("__")}
    if len(given) < len([name for name, _ in pairs if not name.startswith("__")]):
        raise StudioError("link-unreadable", problem="it says something twice")
    mode = given.pop("tab", next(iter(MODES)))
    if mode not in MODES and not (mode == Lyrics.mode and not given):
        name = "".join(c if c.isprintable() else "?" for c in mode[:40])
        raise StudioError("link-unreadable", problem=f"there are no settings for {name!r}")
    if not given:
        return None
    return mode, *_checked(mode, given)


def _checked(mode: str, given: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All values of the mode's request, as `given` would have them, and which fields were files."""
    request = MODES[mode]
    paths = {k.name: k for k in request.params() if k.type is Path}
    files = tuple(filter(None, given.pop(FILES, "").split(",")))
    plain = {k.name for k in request.params() if k.type in PLAIN}
    closed = given.keys() & {k.name for k in request.params()} - plain
    if closed or not paths.keys() >= {*files}:
        raise StudioError("link-unreadable", problem="it names a file")
    needed = (n for n, k in paths.items() if k.required or (n == "source" and not files))
    files = files or (tuple(needed) if mode != "generate" else ())
    try:
        asked = request.of({**given, **dict.fromkeys(files, "a file")})
    except StudioError as error:
        raise StudioError("link-unreadable", problem=error.message.removesuffix(".")) from error
    told = asked.model_dump(mode="json")
    return {name: told[name] for name in plain}, files


class RestorePanel:
    """The line that takes a file of the studio's, dropped anywhere on the page, or a link.

    Its value is what came: {file: what the upload returned} or {link: query and fragment}.
    """

    def __init__(self) -> None:
        self.box = gr.HTML(
            None,
            html_template=(theme.ASSETS / "doors.html").read_text("utf-8"),
            js_on_load=f"const say = {json.dumps(words.DOORS)};\n"
            + (theme.ASSETS / "doors.js").read_text("utf-8"),
            apply_default_css=False,
            elem_id="doors",
            state="empty",
            told=words.DOORS_TIP,
            notes=[],
        )

    def wire(
        self, card: ModelInfo, tabs: gr.Tabs, rooms: Mapping[str, tuple[Restore, list]]
    ) -> None:
        """Let what comes in fill the form of its mode: how, and which components that changes."""

        def come(given: Any) -> Iterator[Update]:
            try:
                found = _found(given, card)
            except StudioError as error:
                markup.toast(error)
                yield {self.box: self._says("refused", error.message, [error.action])}
                return
            if found is None:
                yield gr.skip()  # yielding nothing would empty all outputs
                return
            mode, asked, lacking, name, notes = found
            # A picture on a tab not opened yet forgets what it is told before.
            yield {tabs: gr.update(selected=mode), self.box: self._says("reading", name)}
            told = words.RESTORED.format(name=name, tab=words.MODES[mode])
            notes = [*notes, *(str(trouble) for trouble in lacking.values())]
            restore, _ = rooms[mode]
            yield {**restore(asked, lacking), self.box: self._says("ready", told, notes)}

        outputs = [tabs, self.box, *dict.fromkeys(b for _, parts in rooms.values() for b in parts)]
        self.box.come(come, [self.box], outputs, **WORK)

    def _says(self, state: str, told: str, notes: list[str] | None = None) -> Any:
        return gr.update(state=state, told=told, notes=notes or [])


def _found(
    given: Any, card: ModelInfo
) -> tuple[str, dict, dict[str, StudioError], str, list[str]] | None:
    """What came in: mode, values, what to say where a file is lacking, its name, what to know."""
    given = given if isinstance(given, dict) else {}
    if isinstance(link := given.get("link"), str):
        read = read_link(link)
        if read is None:
            return None
        mode, asked, files = read
        labels = {k.name: k.label for k in MODES[mode].params()}
        lacking = {n: StudioError("link-needs-file", label=labels[n]) for n in files}
        return mode, asked, lacking, words.THE_LINK, []
    path = brought(given.get("file"))
    if path is None:
        raise StudioError("source-missing", name=words.A_FILE)
    told = settings.read_settings(path)
    if told is None:
        raise StudioError("settings-missing", name=path.name)
    if told["mode"] not in MODES:
        raise StudioError("settings-elsewhere", name=path.name, model=told["model"]["name"])
    labels = {k.name: k.label for k in MODES[told["mode"]].params()}
    lacking = {
        field: StudioError("settings-need-file", name=name, label=labels[field])
        for field, name in told["names"].items()
    }
    made_with = told["model"]["name"]
    played = ", ".join(f"{a['name']} ({a['strength']:g})" for a in told["adapters"])
    notes = [words.LACKING_ADAPTERS.format(names=played)] if played else []
    notes += [words.MASTERED.format(**done) for done in told["mastered"]]
    notes += (
        [] if made_with == card.name else [words.OTHER_MODEL.format(then=made_with, now=card.title)]
    )
    return told["mode"], told["request"], lacking, path.name, notes
