"""The Lyrics tab: a brief, and the draft that the songwriter writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

import tooltips
from core.errors import StudioError
from core.requests import Lyrics
from core.results import Draft, ModelInfo, Take
from web import markup
from web.form import Form
from web.handlers import QUICK, WORK, Update
from web.job_controls import JobControls
from web.sessions import Sessions

MODE = Lyrics.mode
DRAFT = "draft"
"""Name of the draft in the browser's session storage."""


class LyricsTab:
    """The form of a `Lyrics` request beside the draft, which is shown while it is written."""

    def __init__(self, sessions: Sessions, info: ModelInfo) -> None:
        self.sessions, self.studio = sessions, sessions.studio
        able = bool(info.writer) and not info.no_writer
        with gr.Row(elem_classes="tab-body", equal_height=False):
            with gr.Column(elem_classes="form", min_width=0):
                if not able:
                    gr.HTML(
                        f"<p>{markup.with_commands(info.no_writer)}</p>",
                        elem_classes=["why", "missing"],
                    )
                self.form = Form(Lyrics, info)
            with gr.Column(elem_classes="output", min_width=0):
                self.controls = JobControls(MODE, able)
                self.empty = self.controls.empty_state(tooltips.NO_DRAFT)
                self._draw_result(info)
        self.controls.live_text = self.draft
        self._wire()

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
        self.controls.run.click(self.start, inputs, outputs, **WORK)
        self.repair.click(self.repair_draft, [self.draft, *inputs], outputs, **WORK)
        self.controls.stop.click(self.stop, None, [self.controls.stop], **QUICK)

    def start(self, caller: gr.Request, *values: Any) -> Iterator[Update]:
        """Write lyrics to the form's brief."""
        yield from self._write(caller, values)

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
        self.studio.stop(self.sessions.visitor(caller))
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
        return [*self.form.outputs(), self.empty, self.result, self.draft]

    def resume(self, stored: Mapping[str, Any], takes: tuple[Take, ...]) -> Update:  # noqa: ARG002
        """The update for a page that was reloaded, from the values that the browser kept."""
        values = self.form.stored_values(stored)
        update: Update = {self.form.fields[name]: value for name, value in values.items()}
        draft = stored.get(DRAFT)
        if isinstance(draft, str) and draft.strip():
            update |= {**self._show_draft(), self.draft: draft[:20_000]}
        return update
