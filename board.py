"""The half of a tab that answers: what is pressed, how far it is, what has come of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import telling
import theme
import tooltips as words
from compare import Compare
from desk import Studio, Update, watch
from doors import link_of
from errors import StudioError
from finish import Finish
from forms import unasked
from knobs import Request
from song import Cancelled, Card, Event, Failed, Progress, Take

REFRESH_S = 0.2
"""The page hears of progress within one stage at most this often."""

WAVEFORM = gr.WaveformOptions(
    waveform_color="#8A8A8A",
    waveform_progress_color=theme.INK,
    trim_region_color="#5A5A5A",
)


class Console:
    """The main button, Stop, and the line that says how far it is.

    Attributes:
        locked: further buttons that must not be pressed while a job runs.
        reader: where text appears while it is written.
    """

    def __init__(self, mode: str, able: bool = True) -> None:
        self.mode = mode
        self.locked: list[gr.Button] = []
        self.reader: gr.Textbox | None = None
        with gr.Column(elem_classes="console", min_width=0):
            with gr.Row(elem_classes="actions"):
                self.run = gr.Button(
                    words.BUTTONS.get(mode, words.MODES[mode]),
                    variant="primary",
                    interactive=able,
                    elem_id=f"{mode}-run",
                )
                self.stop = gr.Button(
                    words.STOP, variant="stop", interactive=False, elem_id=f"{mode}-stop"
                )
            self.status = gr.HTML(theme.status("idle", words.READY), elem_id=f"{mode}-status")
            self.said = gr.HTML("", elem_id=f"{mode}-said", elem_classes="said")

    def nothing_yet(self, title: str = words.NOTHING_YET) -> gr.HTML:
        """What stands where the answer will be."""
        tip = escape(words.NOTHING_YET_TIPS[self.mode])
        return gr.HTML(
            f"<p class='title'>{title}</p><p>{tip}</p>",
            elem_classes="empty-shelf",
            elem_id=f"{self.mode}-empty",
        )

    def parts(self) -> list[gr.blocks.Block]:
        """Everything that a job may change."""
        return [self.run, self.stop, self.status, self.said, *self.locked]

    def running(self, on: bool) -> Update:
        """Lock what must not be pressed twice, and the other way round."""
        return {
            **dict.fromkeys((self.run, *self.locked), gr.update(interactive=not on)),
            self.stop: gr.update(interactive=on, value=words.STOP),
        }

    def follow(
        self,
        studio: Studio,
        ask: Callable[[], Request],
        visitor: str,
        end: Callable[[Event], Update],
    ) -> Iterator[Update]:
        """Watch one job from the first click to its ending, which `end` shows.

        Blocks nowhere, least in `finally`.
        """
        yield {
            **self.running(True),
            self.status: theme.status("running", words.STARTING),
            self.said: words.STARTING,
        }
        heard, stage = 0.0, ""
        with closing(watch(studio, ask, visitor)) as events:
            for event in events:
                now = time.monotonic()
                if not isinstance(event, Progress):
                    yield {**self.running(False), **self._ended(event, end)}
                elif event.stage != stage:
                    heard, stage = now, event.stage
                    yield {**self._heard(event), self.said: words.stage(stage)}
                elif now - heard >= REFRESH_S:
                    heard = now
                    yield self._heard(event)

    def _heard(self, event: Progress) -> Update:
        told = {self.status: theme.progress(event)}
        return {**told, self.reader: event.text} if self.reader and event.text else told

    def _ended(self, event: Event, end: Callable[[Event], Update]) -> Update:
        if isinstance(event, Cancelled):
            return {
                self.status: theme.status("stopped", words.CANCELLED, words.clock(event.elapsed_s)),
                self.said: words.CANCELLED,
            }
        return self.failed(event) if isinstance(event, Failed) else end(event)

    def done(self, headline: str, *details: str, said: str = "") -> Update:
        """Something has ended well."""
        return {
            self.status: theme.status("done", headline, *details, fraction=1.0),
            self.said: escape(f"{headline}. {said}".strip()),
        }

    def failed(self, trouble: StudioError | Failed) -> Update:
        """Something could not be done."""
        theme.toast(trouble)
        return {
            self.status: theme.status("failed", trouble.message, trouble.action),
            self.said: "",  # the toast is announced already
        }


class Board(Console):
    """The console of a song with its latest take and the shelf of the others.

    Attributes:
        at_rest: what the form shows at first; captions leave it out.
        sends: the buttons that take the piece to another tab, by mode.
    """

    def __init__(self, mode: str, at_rest: dict[str, Any], card: Card) -> None:
        super().__init__(mode)
        self.at_rest = at_rest
        self.empty = self.nothing_yet()
        with gr.Column(visible=False, elem_classes="result", min_width=0) as self.result:
            self.player = gr.Audio(
                label=words.PLAYER,
                type="filepath",
                interactive=False,
                buttons=[],
                waveform_options=WAVEFORM,
                elem_id=f"{mode}-player",
            )
            with gr.Row(elem_classes="takings"):
                self.again = gr.Button(words.RETAKE, size="md", elem_id=f"{mode}-again")
                self.reuse = gr.Button(words.REUSE, size="md", elem_id=f"{mode}-reuse")
                self.wav = gr.DownloadButton(words.SAVE_WAV, size="md", elem_id=f"{mode}-wav")
                self.settings = gr.DownloadButton(
                    words.SAVE_JSON, size="md", elem_id=f"{mode}-json"
                )
                self.share = gr.HTML(
                    None,
                    html_template=(theme.ASSETS / "share.html").read_text("utf-8"),
                    js_on_load=f"const say = {json.dumps(words.SHARING)};\n"
                    + (theme.ASSETS / "share.js").read_text("utf-8"),
                    apply_default_css=False,
                    elem_id=f"{mode}-share",
                    elem_classes="share",
                    link="",
                )
                self.sends = {
                    to: gr.Button(called, size="md", elem_classes="send", elem_id=f"{mode}-to-{to}")
                    for to, called in words.SEND.items()
                }
            self.finish = Finish(mode, card)
            self.shelf = gr.Radio(
                [], label=words.SHELF, elem_id=f"{mode}-shelf", elem_classes="shelf", visible=False
            )
            self.compare = Compare(mode, at_rest)
            self.facts = gr.HTML("", elem_id=f"{mode}-facts")

        self.locked.extend((self.again, *self.finish.buttons.values()))

    def wire(self, studio: Studio) -> None:
        """Let the buttons under the player do what they say."""
        self.finish.wire(studio, self, self.shelf)
        self.compare.wire(studio)

    def parts(self) -> list[gr.blocks.Block]:
        """Everything that a job may change."""
        mine = (self.empty, self.result, self.player, self.wav, self.settings, self.share)
        under = (*self.finish.parts(), self.shelf, *self.compare.parts(), self.facts)
        return [*super().parts(), *mine, *under]

    def show(self, take: Take) -> Update:
        """Play `take` and say all that is known of it."""
        return {
            self.empty: gr.update(visible=False),
            self.result: gr.update(visible=True),
            self.player: take.path,
            self.wav: gr.update(value=take.path),
            self.settings: gr.update(value=str(Path(take.path).with_suffix(".json"))),
            self.share: gr.update(link=link_of(take)),
            **self.finish.blank(),
            self.facts: theme.particulars(take, unasked(take.mode, take.request)),
        }

    def finished(self, take: Take, takes: Iterable[Take]) -> Update:
        """A take has come: show it, put it on the shelf among the visitor's `takes`."""
        took = words.clock(sum(take.timings_s.values()))
        takes = list(takes)
        shelf = [(telling.caption(t, self.at_rest), t.id) for t in takes if t.mode == self.mode]
        return {
            **self.show(take),
            **self.done(words.DONE, took, said=telling.caption(take, self.at_rest)),
            self.shelf: gr.update(choices=shelf, value=take.id, visible=True),
            **self.compare.offer(takes),
        }
