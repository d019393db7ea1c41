"""Two takes side by side: equally loud, one button apart, and nameless until voted if wanted."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

import theme
import tooltips as words
from audio.loudness import matching_gains
from core.errors import StudioError
from core.results import Take
from web import markup, summaries
from web.handlers import WORK, Studio, Update, serve, take_of, visitor_of


class AbCompare:
    """Which two takes, and the player that switches between them in place.

    The player's `takes` are [{name, url, gain_db, lufs}, the same for B]; `blind` hides names and
    loudness until one is voted for. `at_rest` is what the form shows at first.
    """

    def __init__(self, mode: str, at_rest: dict[str, Any]) -> None:
        self.at_rest = at_rest
        with gr.Accordion(
            words.COMPARE, open=False, visible=False, elem_classes="compare", elem_id=f"{mode}-two"
        ) as self.fold:
            with gr.Row(elem_classes="knobs"):
                self.picks = [
                    gr.Dropdown([], label=label, elem_id=f"{mode}-{name}")
                    for name, label in words.PICKS.items()
                ]
            self.blind = gr.Checkbox(
                False, label=words.BLIND, info=words.BLIND_TIP, elem_id=f"{mode}-blind"
            )
            self.start = gr.Button(words.COMPARE_RUN, size="md", elem_id=f"{mode}-compare")
            self.box = gr.HTML(
                None,
                html_template=(theme.ASSETS / "compare.html").read_text("utf-8"),
                js_on_load=f"const say = {json.dumps(words.COMPARING)};\n"
                + (theme.ASSETS / "compare.js").read_text("utf-8"),
                apply_default_css=False,
                elem_id=f"{mode}-ab",
                takes=[],
                blind=False,
                turn="",
            )

    def wire(self, studio: Studio) -> None:
        def compare(caller: gr.Request, one: str, other: str, blind: bool) -> Iterator[Update]:
            visitor = visitor_of(caller)
            try:
                if one == other:
                    raise StudioError("takes-same")
                takes = [take_of(studio, visitor, chosen) for chosen in (one, other)]
                if blind:
                    random.shuffle(takes)
                told = {"takes": self._matched(takes), "blind": bool(blind)}
                yield {self.box: gr.update(turn=uuid.uuid4().hex, **told)}
            except StudioError as error:
                markup.toast(error)
                yield gr.skip()

        self.start.click(compare, [*self.picks, self.blind], [self.box], **WORK)

    def parts(self) -> list[gr.blocks.Block]:
        """What changes when there is another take."""
        return [self.fold, *self.picks]

    def offer(self, takes: Iterable[Take]) -> Update:
        """Let choose among `takes`, newest first; the newest two are chosen."""
        known = [(summaries.title(take, self.at_rest), take.id) for take in takes]
        return {
            self.fold: gr.update(visible=len(known) > 1),
            **{
                pick: gr.update(choices=known, value=known[min(i, len(known) - 1)][1])
                for i, pick in enumerate(self.picks)
            },
        }

    def _matched(self, takes: list[Take]) -> list[dict[str, Any]]:
        """The takes as the player wants them, the louder one turned down to the other."""
        lufs = [take.check.get("loudness_lufs") for take in takes]
        return [
            {
                "name": summaries.title(take, self.at_rest),
                "url": serve(self.box, Path(take.path))[1],
                "gain_db": gain_db,
                "lufs": loudness,
            }
            for take, loudness, gain_db in zip(takes, lufs, matching_gains(lufs), strict=True)
        ]
