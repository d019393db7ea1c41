"""The whole page: a tab for each song mode, the Lyrics tab, and the API."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

import tooltips
from core.requests import MODES, Lyrics
from theme import ASSETS, GROUND, theme
from web import markup, openai_api, scripts
from web.api import REQUESTS, Blocks, UnpackErrors, publish, wrong_names
from web.handlers import PRIVATE, Studio
from web.lyrics_tab import LyricsTab
from web.models_panel import models_panel
from web.page_cache import PageCache
from web.restore import RestorePanel, Tab
from web.sessions import Sessions
from web.song_tab import SongTab


def build(studio: Studio) -> gr.Blocks:
    """The page for a studio. Launch it with `launch_options()`."""
    info = studio.model_info()
    sessions = Sessions(studio)
    with Blocks(
        title=tooltips.TITLE,
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(1800, 6 * 3600),
    ) as demo:
        demo.studio = studio
        gr.HTML(markup.masthead(info), elem_id="masthead")
        models_panel(studio)
        if info.hint:
            gr.HTML(f"<p>{markup.with_commands(info.hint)}</p>", elem_id="hint")
        restore = RestorePanel()
        songs: dict[str, SongTab] = {}
        with gr.Tabs(elem_id="studio", overflow_behavior="wrap") as tabs:
            for mode, request in MODES.items():
                with gr.Tab(tooltips.MODES[mode], id=mode, elem_id=f"t-{mode}"):
                    songs[mode] = SongTab(sessions, info, request)
            mode = Lyrics.mode
            with gr.Tab(tooltips.MODES[mode], id=mode, elem_id=f"t-{mode}"):
                lyrics = LyricsTab(sessions, info)
        for tab in songs.values():
            for mode in tooltips.SEND:
                tab.send_to(songs[mode], tabs)
        lyrics.send_to(songs["generate"].form, tabs)
        restore.wire(sessions, info, tabs, songs, {Lyrics.mode: lyrics})
        for mode, tab in {**songs, Lyrics.mode: lyrics}.items():
            _store(mode, tab)
        for request in REQUESTS.values():
            publish(demo, studio, request)

        def close(caller: gr.Request) -> None:
            sessions.close(caller)

        demo.unload(close)
    return demo


def _store(mode: str, tab: Tab) -> None:
    """Keep the values of a tab's controls in the browser's session storage, at every change."""
    parts = tab.stored()
    gr.on(
        [part.change for part in parts.values()],
        None,
        [*parts.values()],
        None,
        js=f"(...values) => {{ studioSession.store({json.dumps(mode)},"
        f" {json.dumps([*parts])}, values); return []; }}",
        **{**PRIVATE, "queue": False},
    )


def launch_options() -> dict[str, Any]:
    """The arguments of `Blocks.launch` that decide how the page looks and behaves."""
    return {
        "theme": theme(),
        "js": (ASSETS / "studio.js").read_text(encoding="utf-8"),
        "head": _head(),
        "favicon_path": ASSETS / "icons" / "studio.svg",
        "footer_links": ["api"],
        "run_history": False,
        "pwa": False,
        "ssr_mode": False,
        "app_kwargs": {
            "routes": openai_api.routes(),
            "exception_handlers": {TypeError: wrong_names},
            "middleware": [Middleware(PageCache), Middleware(UnpackErrors)],
        },
        "mcp_server": mcp_is_installed(),
        "share": False,
        "enable_monitoring": False,
    }


def mcp_is_installed() -> bool:
    """Whether the endpoints can be offered as tools over MCP: Gradio 6.31 needs version 1."""
    try:
        return metadata.version("mcp").startswith("1.")
    except metadata.PackageNotFoundError:
        return False


def _head() -> str:
    """What must be set before the first paint, and the session storage before any component."""
    return (
        f"<meta name='theme-color' content='{GROUND}'>"
        "<meta name='color-scheme' content='dark'>"
        # Gradio's address of the manifest, and a browser's own of the icon, ignore a path prefix.
        "<link rel='icon' href='favicon.ico'>"
        f"<style>html,body{{background:{GROUND};color-scheme:dark}}</style>"
        "<script>document.documentElement.lang='en';"
        "document.documentElement.classList.add('dark');"
        "addEventListener('DOMContentLoaded',"
        "()=>document.querySelector('link[rel=manifest]')?.remove());\n"
        f"{(ASSETS / 'session.js').read_text('utf-8')}{scripts.shared()}</script>"
    )
