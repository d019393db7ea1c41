"""The whole page: one tab for each song mode, the Lyrics tab, and the API."""

from __future__ import annotations

from typing import Any

import gradio as gr

import tooltips as words
from core.requests import EXPORTS, HELPERS, MODES, Lyrics
from theme import ASSETS, head, theme
from web import markup
from web.api import misnamed, publish
from web.handlers import Studio, visitor_of
from web.lyrics_tab import LyricsTab
from web.restore import RestorePanel
from web.song_tab import SongTab


def build(studio: Studio) -> gr.Blocks:
    """The whole page. Launch it with `theme.launch_options()`."""
    card = studio.card()
    with gr.Blocks(
        title=words.TITLE,
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(1800, 6 * 3600),
    ) as demo:
        gr.HTML(markup.masthead(card), elem_id="masthead")
        if card.hint:
            gr.HTML(f"<p>{markup.with_commands(card.hint)}</p>", elem_id="hint")
        doors = RestorePanel()
        rooms = {}
        with gr.Tabs(elem_id="studio", overflow_behavior="wrap") as tabs:
            for mode, request in MODES.items():
                with gr.Tab(words.MODES[mode], id=mode, elem_id=f"t-{mode}"):
                    rooms[mode] = SongTab(studio, card, request)
            with gr.Tab(words.MODES[Lyrics.mode], id=Lyrics.mode, elem_id=f"t-{Lyrics.mode}"):
                writing = LyricsTab(studio, card)
        for room in rooms.values():
            for mode in words.SEND:
                room.sends_to(rooms[mode], tabs)
        writing.sends_to(rooms["generate"].form, tabs)
        doors.wire(card, tabs, {m: (room.fill, room.form.parts()) for m, room in rooms.items()})
        for request in (*MODES.values(), *HELPERS.values(), Lyrics, *EXPORTS.values()):
            publish(demo, studio, request)

        def leave(caller: gr.Request) -> None:
            studio.leave(visitor_of(caller))

        demo.unload(leave)
    return demo


def launch_options() -> dict[str, Any]:
    """All that `Blocks.launch` must be told about the look and the manners of the page."""
    return {
        "theme": theme(),
        "js": (ASSETS / "studio.js").read_text(encoding="utf-8"),
        "head": head(),
        "favicon_path": ASSETS / "icons" / "studio.svg",
        "footer_links": ["api"],
        "run_history": False,
        "pwa": False,
        "ssr_mode": False,
        "app_kwargs": {"exception_handlers": {TypeError: misnamed}},
        "share": False,
        "enable_monitoring": False,
    }
