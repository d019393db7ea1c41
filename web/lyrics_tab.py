"""The tab that writes words: a brief on one side, a draft that grows on the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

import tooltips as words
from core.params import Request
from core.requests import Lyrics
from core.results import Draft, ModelInfo
from web import markup
from web.form import Form
from web.handlers import QUICK, WORK, Studio, Update, visitor_of
from web.job_controls import JobControls

MODE = Lyrics.mode


class LyricsTab:
    """Brief, structure and manner; the draft as it is written; what to do with it."""

    def __init__(self, studio: Studio, card: ModelInfo) -> None:
        self.studio, able = studio, bool(card.writer) and not card.no_writer
        with gr.Row(elem_classes="room", equal_height=False):
            with gr.Column(elem_classes="form", min_width=0):
                if not able:
                    gr.HTML(
                        f"<p>{markup.with_commands(card.no_writer)}</p>",
                        elem_classes=["why", "missing"],
                    )
                self.form = Form(Lyrics, card)
            with gr.Column(elem_classes="answer", min_width=0):
                self.console = JobControls(MODE, able)
                self.empty = self.console.nothing_yet(words.NOTHING_WRITTEN)
                with gr.Column(visible=False, elem_classes="result", min_width=0) as self.result:
                    self.draft = gr.Textbox(
                        label=words.DRAFT,
                        info=words.DRAFT_TIP,
                        lines=16,
                        max_lines=40,
                        elem_id=f"{MODE}-draft",
                    )
                    with gr.Row(elem_classes="takings"):
                        self.use = gr.Button(words.USE_WORDS, size="md", elem_id=f"{MODE}-use")
                        self.repair = gr.Button(words.REPAIR, size="md", elem_id=f"{MODE}-repair")
                    self.facts = gr.HTML("", elem_id=f"{MODE}-facts")
        self.console.reader = self.draft
        self._wire()

    def _wire(self) -> None:
        inputs = [*self.form.inputs.values()]
        parts = [
            *self.console.parts(),
            self.empty,
            self.result,
            self.draft,
            self.repair,
            self.facts,
        ]
        self.console.run.click(self.start, inputs, parts, **WORK)
        self.repair.click(self.mend, [self.draft, *inputs], parts, **WORK)
        self.console.stop.click(self.stop, None, [self.console.stop], **QUICK)

    def start(self, caller: gr.Request, *values: Any) -> Iterator[Update]:
        yield from self._write(lambda: Lyrics.of(self.form.given(values)), caller)

    def mend(self, caller: gr.Request, draft: str, *values: Any) -> Iterator[Update]:
        yield from self._write(
            lambda: Lyrics.of({**self.form.given(values), "repair": draft}), caller
        )

    def _write(self, ask: Callable[[], Request], caller: gr.Request) -> Iterator[Update]:
        def asked() -> Request:
            request = ask()
            begun.append(request)
            return request

        begun: list[Request] = []
        for update in self.console.follow(self.studio, asked, visitor_of(caller), self._end):
            if begun:
                update = {
                    self.empty: gr.update(visible=False),
                    self.result: gr.update(visible=True),
                    self.repair: gr.update(interactive=False),
                    **update,
                }
            yield update

    def _end(self, draft: Draft) -> Update:
        took = words.clock(sum(draft.timings_s.values()))
        told = f"{len(draft.got)} of {len(draft.asked)} sections"
        return {
            **self.console.done(words.DONE, took, f"{told}, {words.SECTIONS[draft.as_asked]}"),
            self.draft: draft.text,
            self.repair: gr.update(interactive=not draft.matches_request),
            self.facts: markup.draft(draft),
        }

    def stop(self, caller: gr.Request) -> Any:
        self.studio.stop(visitor_of(caller))
        return gr.update(interactive=False, value=words.STOPPING)

    def sends_to(self, song: Form, tabs: gr.Tabs) -> None:
        """Let "Use in Generate" carry the draft there, with its language."""
        lyrics, sung_in, silent = (
            song.fields[name] for name in ("lyrics", "vocal_language", "instrumental")
        )

        def use(draft: str, language: str) -> Update:
            return {
                tabs: gr.update(selected=song.mode),
                lyrics: gr.update(value=draft, visible=True),
                sung_in: language,
                silent: False,
            }

        self.use.click(
            use,
            [self.draft, self.form.fields["language"]],
            [tabs, lyrics, sung_in, silent],
            **QUICK,
        )
