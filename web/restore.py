"""Settings from a song file, a link or the browser's session storage back into a form; links out.

Whatever comes in may claim anything: it is checked as a whole, and fills in a form or changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl, quote, urlencode

import gradio as gr

import tooltips
from audio import settings
from core.errors import StudioError
from core.requests import MODES, Lyrics
from core.results import ModelInfo, Take
from core.text import printable
from web import markup, scripts
from web.handlers import WORK, Update, uploaded_path
from web.sessions import Sessions

MAX_LINK_LENGTH, MAX_LINK_VALUES = 100_000, 100
"""Characters of a link and values in it. The longest lyrics, in Chinese, make 37,000."""

FILES = "files"
"""The key in a link that names the fields with files, without naming the files."""

PLAIN = (str, bool, int, float)
"""Types of the parameters that a link contains."""


class Tab(Protocol):
    """What restoring needs from a tab."""

    def stored(self) -> dict[str, gr.components.Component]:
        """The components whose values the browser keeps over a reload, by name."""
        ...

    def resume(self, stored: Mapping[str, Any], takes: tuple[Take, ...]) -> Update:
        """The update for a page that was reloaded."""
        ...

    def resume_outputs(self) -> list[gr.blocks.Block]:
        """The components that `resume` changes."""
        ...


class FormTab(Tab, Protocol):
    """A tab whose form a file or a link can fill in."""

    form: Any

    def fill(self, values: dict[str, Any], missing: Mapping[str, StudioError]) -> Update:
        """Fill in the form, with what to say where a file has to be chosen again."""
        ...


class Restored(NamedTuple):
    """Settings that were found."""

    mode: str
    values: dict[str, Any]
    missing: dict[str, StudioError]
    """What to say, by parameter, where a file has to be chosen again."""
    name: str
    """Of the file, or "the link"."""
    notes: list[str]


def link_to(take: Take) -> str:
    """A link with the settings of `take`, without the page's address, the audio and the files.

    The settings are in the fragment, behind the #, which browsers do not send to servers.
    """
    request = take.to_request()
    values = {n: v for n, v in request.non_defaults().items() if isinstance(v, PLAIN)}
    files = [k.name for k in request.params() if k.type is Path and getattr(request, k.name)]
    values |= {FILES: ",".join(files)} if files else {}
    return f"?tab={take.mode}#" + urlencode(values, quote_via=quote)


def read_link(link: str) -> tuple[str, dict[str, Any], tuple[str, ...]] | None:
    """The settings in a link's query and fragment: mode, values, fields that had files.

    Returns:
        None where the link only names a tab, or nothing. Names that begin with two underscores
        belong to the page's host and are ignored.

    Raises:
        StudioError: `link-unreadable`.
    """
    query, _, fragment = link.removeprefix("?").partition("#")
    parts = [part for part in (query, fragment) if "=" in part]
    if len(link) > MAX_LINK_LENGTH:
        raise StudioError("link-unreadable", problem="it is too long")
    try:
        pairs = parse_qsl(
            "&".join(parts),
            True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=MAX_LINK_VALUES,
        )
    except ValueError as error:
        raise StudioError("link-unreadable", problem="it is damaged") from error
    given = {name: value for name, value in pairs if not name.startswith("__")}
    if len(given) < len([name for name, _ in pairs if not name.startswith("__")]):
        raise StudioError("link-unreadable", problem="it sets a parameter twice")
    mode = given.pop("tab", next(iter(MODES)))
    if mode not in MODES and not (mode == Lyrics.mode and not given):
        name = printable(mode[:40])
        raise StudioError("link-unreadable", problem=f"there are no settings for {name!r}")
    if not given:
        return None
    return mode, *_checked(mode, given)


def _checked(mode: str, given: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All values of the mode's request with those `given`, and which fields had files."""
    request = MODES[mode]
    paths = {k.name: k for k in request.params() if k.type is Path}
    files = tuple(filter(None, given.pop(FILES, "").split(",")))
    plain = {k.name for k in request.params() if k.type in PLAIN}
    forbidden = given.keys() & {k.name for k in request.params()} - plain
    if forbidden or not paths.keys() >= {*files}:
        raise StudioError("link-unreadable", problem="it names a file")
    needed = (n for n, k in paths.items() if k.required or (n == "source" and not files))
    files = files or (tuple(needed) if mode != "generate" else ())
    try:
        checked = request.of({**given, **dict.fromkeys(files, "a file")})
    except StudioError as error:
        raise StudioError("link-unreadable", problem=error.message.removesuffix(".")) from error
    values = checked.model_dump(mode="json")
    return {name: values[name] for name in plain}, files


class RestorePanel:
    """The line at the top of the page that takes a song file, dropped anywhere, or a link.

    Its value is what came in: {file: what the upload returned}, or at page load {session: what the
    browser kept, link: query and fragment, or nothing}.
    """

    def __init__(self) -> None:
        self.box = gr.HTML(
            None,
            html_template=scripts.template("restore"),
            js_on_load=scripts.on_load("restore", text=tooltips.RESTORE),
            apply_default_css=False,
            elem_id="doors",
            state="empty",
            message=tooltips.RESTORE_HELP,
            notes=[],
            token="",
        )

    def wire(
        self,
        sessions: Sessions,
        info: ModelInfo,
        tabs: gr.Tabs,
        forms: Mapping[str, FormTab],
        others: Mapping[str, Tab],
    ) -> None:
        """Connect what comes in with the tabs.

        Args:
            forms: the song tabs by mode.
            others: further tabs, which only resume after a reload.
        """

        def load(value: Any) -> Iterator[Update]:
            try:
                found = _find_settings(value, info)
            except StudioError as error:
                markup.toast(error)
                yield {self.box: self._show("refused", error.message, [error.action])}
                return
            if found is None:
                yield gr.skip()  # yielding nothing would empty all outputs
                return
            # First the tab: on one that was never opened, a preview forgets earlier updates.
            yield {
                tabs: gr.update(selected=found.mode),
                self.box: self._show("reading", found.name),
            }
            message = tooltips.RESTORED.format(name=found.name, tab=tooltips.MODES[found.mode])
            notes = [*found.notes, *(str(error) for error in found.missing.values())]
            update = forms[found.mode].fill(found.values, found.missing)
            yield {**update, self.box: self._show("ready", message, notes)}

        def resume(caller: gr.Request, value: Any) -> Update:
            session = value.get("session") if isinstance(value, dict) else None
            session = session if isinstance(session, dict) else {}
            token = sessions.resume(caller, session.get("token"))
            update: Update = {self.box: gr.update(token=token)}
            stored, takes = session.get("forms"), sessions.takes(caller)
            for mode, tab in {**forms, **others}.items():
                values = stored.get(mode) if isinstance(stored, dict) else None
                update |= tab.resume(values if isinstance(values, dict) else {}, takes)
            return update

        every = {**forms, **others}
        form_outputs = [part for tab in forms.values() for part in tab.form.outputs()]
        outputs = [tabs, self.box, *dict.fromkeys(form_outputs)]
        resumed = [part for tab in every.values() for part in tab.resume_outputs()]
        self.box.come(load, [self.box], outputs, **WORK)
        self.box.resume(resume, [self.box], [self.box, *dict.fromkeys(resumed)], **WORK).then(
            load, [self.box], outputs, **WORK
        )

    def _show(self, state: str, message: str, notes: list[str] | None = None) -> Any:
        return gr.update(state=state, message=message, notes=notes or [])


def _find_settings(value: Any, info: ModelInfo) -> Restored | None:
    """The settings in what came in; None for a page that was opened without any.

    Raises:
        StudioError: `link-unreadable`, `source-missing`, `file-not-uploaded`, and `settings-…`.
    """
    value = value if isinstance(value, dict) else {}
    if "file" not in value:
        return _from_link(value.get("link"))
    path = uploaded_path(value["file"])
    if path is None:
        raise StudioError("source-missing", name=tooltips.A_FILE)
    found = settings.read_settings(path)
    if found is None:
        raise StudioError("settings-missing", name=path.name)
    if found["mode"] not in MODES:
        raise StudioError("settings-elsewhere", name=path.name, model=found["model"]["name"])
    labels = {k.name: k.label for k in MODES[found["mode"]].params()}
    missing = {
        field: StudioError("settings-need-file", name=name, label=labels[field])
        for field, name in found["names"].items()
    }
    return Restored(found["mode"], found["request"], missing, path.name, _file_notes(found, info))


def _from_link(link: Any) -> Restored | None:
    read = read_link(link) if isinstance(link, str) else None
    if read is None:
        return None
    mode, values, files = read
    labels = {k.name: k.label for k in MODES[mode].params()}
    missing = {n: StudioError("link-needs-file", label=labels[n]) for n in files}
    return Restored(mode, values, missing, tooltips.THE_LINK, [])


def _file_notes(found: Mapping[str, Any], info: ModelInfo) -> list[str]:
    """What would make a song from these settings differ from the file."""
    adapters = ", ".join(f"{a['name']} ({a['strength']:g})" for a in found["adapters"])
    notes = [tooltips.MISSING_ADAPTERS.format(names=adapters)] if adapters else []
    notes += [tooltips.MASTERED.format(**master) for master in found["mastered"]]
    made_with = found["model"]["name"]
    if made_with != info.name:
        notes.append(tooltips.OTHER_MODEL.format(then=made_with, now=info.title))
    return notes
