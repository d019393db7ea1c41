"""A/B player: two takes at equal loudness, optionally as a blind test."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

import tooltips
from audio.loudness import matching_gains
from core.errors import StudioError
from core.results import Take
from web import markup, scripts, summaries
from web.handlers import WORK, Update, find_take, serve_file
from web.sessions import Sessions


class AbCompare:
    """The choice of two takes, and the player that switches between them.

    The player's `takes` property is [{name, url, gain_db, lufs}, the same for B]; `blind` hides
    names and loudness until one is voted for.
    """

    def __init__(self, mode: str, start_values: dict[str, Any]) -> None:
        self.start_values = start_values
        with gr.Accordion(
            tooltips.COMPARE,
            open=False,
            visible=False,
            elem_classes="ab-compare",
            elem_id=f"{mode}-two",
        ) as self.accordion:
            with gr.Row(elem_classes="params"):
                self.choices = [
                    gr.Dropdown([], label=label, elem_id=f"{mode}-{name}")
                    for name, label in tooltips.COMPARE_TAKES.items()
                ]
            self.blind = gr.Checkbox(
                False, label=tooltips.BLIND, info=tooltips.BLIND_HELP, elem_id=f"{mode}-blind"
            )
            self.start = gr.Button(tooltips.COMPARE_RUN, size="md", elem_id=f"{mode}-compare")
            self.player = gr.HTML(
                None,
                html_template=scripts.template("ab_compare"),
                js_on_load=scripts.on_load("ab_compare", text=tooltips.AB_PLAYER),
                apply_default_css=False,
                elem_id=f"{mode}-ab",
                takes=[],
                blind=False,
                turn="",
            )

    def wire(self, sessions: Sessions) -> None:
        """Connect the Compare button."""

        def compare(caller: gr.Request, one: str, other: str, blind: bool) -> Iterator[Update]:
            visitor = sessions.visitor(caller)
            try:
                if one == other:
                    raise StudioError("takes-same")
                takes = [find_take(sessions.studio, visitor, take_id) for take_id in (one, other)]
                if blind:
                    random.shuffle(takes)
                props = {"takes": self._matched(takes), "blind": bool(blind)}
                yield {self.player: gr.update(turn=uuid.uuid4().hex, **props)}
            except StudioError as error:
                markup.toast(error)
                yield gr.skip()

        self.start.click(compare, [*self.choices, self.blind], [self.player], **WORK)

    def outputs(self) -> list[gr.blocks.Block]:
        """The components that a new take changes."""
        return [self.accordion, *self.choices]

    def offer(self, takes: Iterable[Take]) -> Update:
        """Offer `takes`, newest first, with the newest two selected."""
        options = [(summaries.title(take, self.start_values), take.id) for take in takes]
        return {
            self.accordion: gr.update(visible=len(options) > 1),
            **{
                choice: gr.update(choices=options, value=options[min(i, len(options) - 1)][1])
                for i, choice in enumerate(self.choices)
            },
        }

    def _matched(self, takes: list[Take]) -> list[dict[str, Any]]:
        """The player's `takes` property: the louder take is turned down to the other."""
        lufs = [take.check.get("loudness_lufs") for take in takes]
        return [
            {
                "name": summaries.title(take, self.start_values),
                "url": serve_file(self.player, Path(take.path))[1],
                "gain_db": gain_db,
                "lufs": loudness,
            }
            for take, loudness, gain_db in zip(takes, lufs, matching_gains(lufs), strict=True)
        ]
