"""The Lyrics tab: a brief, and the draft that the songwriter writes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

import tooltips
from core.errors import StudioError
from core.requests import Lyrics
from core.results import Draft, ModelEntry, ModelInfo, Take
from web import markup
from web.form import Form
from web.handlers import QUICK, WORK, Update
from web.job_controls import JobControls
from web.sessions import Sessions

MODE = Lyrics.mode
DRAFT = "draft"
"""Name of the draft in the browser's session storage."""


POLL_S = 0.3
"""How often a download is looked at."""


class LyricsTab:
    """The form of a `Lyrics` request beside the draft, which is shown while it is written."""

    def __init__(self, sessions: Sessions, info: ModelInfo) -> None:
        self.sessions, self.studio = sessions, sessions.studio
        self.writer: gr.Radio | None = None
        self.fetching: dict[str, str] = {}  # visitor to the songwriter they wait for
        able = bool(info.writer) and not info.no_writer
        offered = [] if able else self._songwriters()
        with gr.Row(elem_classes="tab-body", equal_height=False):
            with gr.Column(elem_classes="form", min_width=0):
                if offered:
                    self._offer(offered, info)
                elif not able:
                    gr.HTML(
                        f"<p>{markup.with_commands(info.no_writer)}</p>",
                        elem_classes=["why", "missing"],
                    )
                self.form = Form(Lyrics, info)
            with gr.Column(elem_classes="output", min_width=0):
                self.controls = JobControls(MODE, able or bool(offered))
                if offered:
                    self.controls.run.value = tooltips.DOWNLOAD_AND_WRITE
                self.empty = self.controls.empty_state(tooltips.NO_DRAFT)
                self._draw_result(info)
        self.controls.live_text = self.draft
        self._wire()

    def _songwriters(self) -> list[ModelEntry]:
        """Those that fit this computer and may be downloaded to it."""
        return [
            entry
            for entry in self.studio.models()
            if entry.kind == "songwriter" and entry.fits and (entry.can_fetch or entry.on_disk)
        ]

    def _offer(self, songwriters: list[ModelEntry], info: ModelInfo) -> None:
        """Which songwriter the button downloads before it writes."""
        with gr.Column(elem_classes="missing", min_width=0) as self.offer:
            gr.HTML(f"<p>{tooltips.FETCH_SONGWRITER}</p>", elem_classes="why")
            names = [entry.name for entry in songwriters]
            first = next((e.name for e in songwriters if e.title == info.writer), names[0])
            self.writer = gr.Radio(
                [(f"{entry.title} ({entry.size})", entry.name) for entry in songwriters],
                value=first,
                label=tooltips.SONGWRITER,
                info=tooltips.SONGWRITER_HELP,
                elem_id=f"{MODE}-writer",
            )

    def _draw_result(self, info: ModelInfo) -> None:
        no_vocals = tooltips.NO_VOCALS.format(model=info.title)
        with gr.Column(visible=False, elem_classes="result", min_width=0) as self.result:
            self.draft = gr.Textbox(
                label=tooltips.DRAFT,
                info=tooltips.DRAFT_HELP if info.sings else no_vocals,
                lines=16,
                max_lines=40,
                elem_id=f"{MODE}-draft",
            )
            with gr.Row(elem_classes="take-actions"):
                self.use = gr.Button(
                    tooltips.USE_DRAFT, size="md", interactive=info.sings, elem_id=f"{MODE}-use"
                )
                self.repair = gr.Button(tooltips.REPAIR, size="md", elem_id=f"{MODE}-repair")
            self.details = gr.HTML("", elem_id=f"{MODE}-facts")

    def _wire(self) -> None:
        inputs = [*self.form.inputs.values()]
        outputs = [
            *self.controls.outputs(),
            *(self.empty, self.result, self.draft, self.repair, self.details),
        ]
        if self.writer:
            wanted, drawn = [self.writer, *inputs], [self.offer, *outputs]
            self.controls.run.click(self.fetch_and_start, wanted, drawn, **WORK)
        else:
            self.controls.run.click(self.start, inputs, outputs, **WORK)
        self.repair.click(self.repair_draft, [self.draft, *inputs], outputs, **WORK)
        self.controls.stop.click(self.stop, None, [self.controls.stop], **QUICK)

    def start(self, caller: gr.Request, *values: Any) -> Iterator[Update]:
        """Write lyrics to the form's brief."""
        yield from self._write(caller, values)

    def fetch_and_start(self, caller: gr.Request, name: str, *values: Any) -> Iterator[Update]:
        """Download the songwriter if it is not on disk, then write lyrics to the form's brief."""
        visitor = self.sessions.visitor(caller)
        try:
            self.form.read_request(values)  # before gigabytes are fetched for it
            entry = self._entry(name)
            if not entry.on_disk:
                self.studio.fetch(name)
                self.fetching[visitor] = name
            while not entry.on_disk:
                entry = self._entry(name)
                state = entry.download
                if state is None or state.state not in ("running", "stopping"):
                    break
                status = markup.download(entry.title, state)
                yield {**self.controls.running(True), self.controls.status: status}
                time.sleep(POLL_S)
            if not entry.on_disk:
                yield self._not_fetched(entry)
                return
            if not entry.in_use:
                self.studio.use(name)
        except StudioError as error:
            yield self.controls.failed(error)
            return
        finally:
            self.fetching.pop(visitor, None)
        yield self._fetched()
        yield from self._write(caller, values)

    def _entry(self, name: str) -> ModelEntry:
        for entry in self._songwriters():
            if entry.name == name:
                return entry
        raise StudioError("model-unknown", name=name[:80], known="")

    def _not_fetched(self, entry: ModelEntry) -> Update:
        failed = entry.download.failed if entry.download else None
        if failed:
            return self.controls.failed(failed)
        stopped = markup.status("stopped", tooltips.DOWNLOAD_STOPPED)
        return {
            **self.controls.running(False),
            self.controls.status: stopped,
            self.controls.announcement: tooltips.DOWNLOAD_STOPPED,
        }

    def _fetched(self) -> Update:
        """The tab once a songwriter is on disk."""
        return {
            self.offer: gr.update(visible=False),
            self.controls.run: gr.update(value=tooltips.BUTTONS[MODE]),
        }

    def repair_draft(self, caller: gr.Request, draft: str, *values: Any) -> Iterator[Update]:
        """Rewrite the draft so that it has the requested sections."""
        yield from self._write(caller, values, repair=draft)

    def _write(self, caller: gr.Request, values: tuple[Any, ...], **more: Any) -> Iterator[Update]:
        try:
            request = self.form.read_request(values, **more)
        except StudioError as error:
            yield self.controls.failed(error)
            return
        visitor = self.sessions.visitor(caller)
        for update in self.controls.follow(self.studio, request, visitor, self._end):
            yield {**self._show_draft(), self.repair: gr.update(interactive=False), **update}

    def _show_draft(self) -> Update:
        return {self.empty: gr.update(visible=False), self.result: gr.update(visible=True)}

    def _end(self, draft: Draft) -> Update:
        duration = tooltips.elapsed(sum(draft.timings_s.values()))
        count = tooltips.SECTIONS_WRITTEN.format(got=len(draft.got), asked=len(draft.asked))
        return {
            **self.controls.done(
                tooltips.DONE, duration, f"{count}, {tooltips.SECTIONS[draft.matches_request]}"
            ),
            self.draft: draft.text,
            self.repair: gr.update(interactive=not draft.matches_request),
            self.details: markup.draft_details(draft),
        }

    def stop(self, caller: gr.Request) -> Any:
        """Cancel the visitor's jobs."""
        visitor = self.sessions.visitor(caller)
        self.studio.stop(visitor)
        if name := self.fetching.get(visitor):
            self.studio.stop_fetch(name)
        return self.controls.stopping()

    def send_to(self, song: Form, tabs: gr.Tabs) -> None:
        """Let "Use in Generate" copy the draft and its language to a song form."""
        lyrics, language_field, instrumental = (
            song.fields[name] for name in ("lyrics", "vocal_language", "instrumental")
        )

        def use(draft: str, language: str) -> Update:
            return {
                tabs: gr.update(selected=song.mode),
                lyrics: gr.update(value=draft, visible=True),
                language_field: language,
                instrumental: False,
            }

        self.use.click(
            use,
            [self.draft, self.form.fields["language"]],
            [tabs, lyrics, language_field, instrumental],
            **QUICK,
        )

    def stored(self) -> dict[str, gr.components.Component]:
        """The components whose values the browser keeps over a reload, by name."""
        return {**self.form.inputs, DRAFT: self.draft}

    def resume_outputs(self) -> list[gr.blocks.Block]:
        """The components that `resume` changes."""
        offer = [self.offer, self.controls.run] if self.writer else []
        return [*self.form.outputs(), self.empty, self.result, self.draft, *offer]

    def resume(self, stored: Mapping[str, Any], takes: tuple[Take, ...]) -> Update:  # noqa: ARG002
        """The update for a page that was reloaded, from the values that the browser kept."""
        values = self.form.stored_values(stored)
        update: Update = {self.form.fields[name]: value for name, value in values.items()}
        if self.writer and any(entry.on_disk and entry.in_use for entry in self._songwriters()):
            update |= self._fetched()
        draft = stored.get(DRAFT)
        if isinstance(draft, str) and draft.strip():
            update |= {**self._show_draft(), self.draft: draft[:20_000]}
        return update
