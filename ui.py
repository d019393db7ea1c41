"""The page: widgets and handlers made from requests. No rule about music lives here.

Give it a `Studio` and it gives back Gradio blocks; a new request class becomes a new tab.
"""

from __future__ import annotations

import theme  # first: it sets what Gradio reads at import  # isort: skip

import inspect
import random
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal, Protocol

import gradio as gr

import tooltips as words
from errors import StudioError
from knobs import SONG, Knob, Request
from song import MAX_SEED, MODES, Cancelled, Card, Event, Failed, Progress, Take

ORDER = ("prompt", "instrumental", "lyrics", "duration_s")
"""How the knobs of a song follow each other on the form. Others come after these."""

CARD: dict[str, str] = {
    "inference_steps": "steps",
    "guidance_scale": "guidance",
    "shift": "shift",
}
"""Knobs that start at the model's own value, and where the card says it."""

GUIDANCE = ("guidance_scale", "cfg_interval_start", "cfg_interval_end", "use_adg")
"""Knobs that steer nothing in a model that takes no guidance."""

REFRESH_S = 0.2
"""The page hears of progress within one stage at most this often."""

WAVEFORM = gr.WaveformOptions(
    waveform_color="#8A8A8A",
    waveform_progress_color=theme.INK,
    trim_region_color="#5A5A5A",
)


class Studio(Protocol):
    """What the page needs to know of the backend."""

    def card(self) -> Card:
        """The model that is playing, its device and its defaults."""

    def run(self, request: Request, visitor: str) -> Iterator[Event]:
        """Make a song: progress at least once a second, then one ending. Closing it cancels."""

    def stop(self, visitor: str) -> None:
        """Let the visitor's running jobs end as `Cancelled`."""

    def takes(self, visitor: str) -> tuple[Take, ...]:
        """The visitor's takes, newest first."""

    def leave(self, visitor: str) -> None:
        """The visitor is gone: cancel and clean up."""


Update = dict[Any, Any]  # by component; what is not in it stays as it is


def build(studio: Studio) -> gr.Blocks:
    """The whole page. Launch it with `theme.launch_options()`."""
    card = studio.card()
    with gr.Blocks(
        title=words.TITLE,
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(1800, 6 * 3600),
    ) as demo:
        gr.HTML(theme.masthead(card), elem_id="masthead")
        if card.hint:
            gr.HTML(f"<p>{escape(card.hint)}</p>", elem_id="hint")
        with gr.Tabs(elem_id="studio", overflow_behavior="wrap"):
            for mode, request in MODES.items():
                with gr.Tab(words.MODES[mode], id=mode, elem_id=f"t-{mode}"):
                    _Room(studio, card, request)
        for request in MODES.values():
            event = gr.api(endpoint(studio, request), api_name=request.mode, concurrency_limit=None)
            for knob, box in zip(request.knobs(), demo.fns[event["id"]].inputs, strict=True):
                box.label = words.label(knob)
                box._api_info |= {"additional_description": _told(request.mode, knob)}

        def leave(caller: gr.Request) -> None:
            studio.leave(_visitor(caller))

        demo.unload(leave)
    return demo


def widget(knob: Knob, mode: str, card: Card) -> gr.components.Component:
    """The control for one knob, from its declaration alone."""
    deaf = knob.name in GUIDANCE and not card.takes_guidance
    start = starting_value(knob, card)
    # Where a slider shows its ends, or a box takes any words, the range would be said twice.
    info = words.tip(mode, knob) if start is None else words.does(mode, knob)
    common = {
        "label": words.label(knob),
        "info": words.NO_GUIDANCE.format(model=card.title) if deaf else info,
        "interactive": not deaf,
        "elem_id": f"{mode}-{knob.name}",
    }
    if knob.type is bool and knob.name in words.CHOICES:
        return gr.Radio(_choices(knob, (False, True)), value=start, **common)
    if knob.type is bool:
        return gr.Checkbox(value=start, **common)
    if knob.choices:
        make = gr.Radio if len(knob.choices) <= 3 else gr.Dropdown
        return make(_choices(knob, knob.choices), value=start, **common)
    if knob.type is str:
        return gr.Textbox(
            value=start,
            lines=knob.lines,
            max_lines=max(knob.lines, 16),
            placeholder=words.PLACEHOLDERS.get(knob.name),
            **common,
        )
    high = min(knob.high, card.longest_s) if knob.name == "duration_s" else knob.high
    if start is None:
        # Not gr.Number: unfolding its accordion turns an empty one into 0 (Gradio 6.31).
        return gr.Textbox(
            value="",
            placeholder=words.PLACEHOLDERS.get(knob.name),
            html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
            elem_classes="digits",
            **common,
        )
    return gr.Slider(knob.low, high, value=start, step=knob.step, **common)


def starting_value(knob: Knob, card: Card) -> Any:
    """What a control shows at first: the model's own value where there is one."""
    if knob.name in CARD:
        return min(max(getattr(card, CARD[knob.name]), knob.low), knob.high)
    if knob.required:
        return ""
    if knob.name == "duration_s":
        return min(knob.default, card.longest_s)
    return knob.default


def _choices(knob: Knob, values: tuple[Any, ...]) -> list[tuple[str, Any]]:
    named = [(words.choice(knob.name, value), value) for value in values]
    if knob.name == "vocal_language":
        named.sort(key=lambda pair: (pair[0] != words.AUTO, pair[0]))
    return named


def endpoint(studio: Studio, request: type[Request]) -> Callable[..., Any]:
    """The API's face of a mode: the request's own names, types and defaults.

    It yields what is going on as its second value until the song is there.
    """
    knobs = request.knobs()

    def answer(*values: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        visitor = f"api-{uuid.uuid4().hex}"
        given = {k.name: v for k, v in zip(knobs, values, strict=True)}
        try:
            with closing(_watch(studio, lambda: request.of(given), visitor)) as events:
                for event in events:
                    if isinstance(event, Failed):
                        raise _spoken(event)
                    if isinstance(event, Cancelled):
                        raise gr.Error(words.CANCELLED, print_exception=False)
                    if isinstance(event, Take):
                        file = gr.FileData(path=event.path, orig_name=Path(event.path).name)
                        # A client takes whatever has a "path" for a file to fetch.
                        yield file.model_dump(), event.model_dump(mode="json", exclude={"path"})
                    else:
                        yield None, event.model_dump(mode="json")
        finally:
            # The file has been copied for the caller by now, so nothing needs to stay.
            studio.leave(visitor)

    hints = {k.name: _hint(k) for k in knobs}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    answer.__name__ = request.mode
    answer.__annotations__ = hints
    answer.__signature__ = inspect.Signature(
        [
            inspect.Parameter(
                k.name,
                kind,
                default=inspect.Parameter.empty if k.required else k.default,
                annotation=hints[k.name],
            )
            for k in knobs
        ],
        return_annotation=tuple[gr.FileData, dict[str, Any]],
    )
    answer.__doc__ = "\n".join(
        [
            (request.__doc__ or "").strip(),
            "",
            "Args:",
            *(f"    {k.name}: {_told(request.mode, k)}" for k in knobs),
            "",
            "Returns:",
            "    The song as a WAV file, and its take: the request as really run, model and device.",
        ]
    )
    return answer


def _hint(knob: Knob) -> Any:
    kind = Literal[knob.choices] if knob.choices else knob.type
    return kind | None if knob.optional else kind


def _told(mode: str, knob: Knob) -> str:
    options = f" One of: {', '.join(map(repr, knob.choices))}." if knob.choices else ""
    return words.tip(mode, knob) + options


def _spoken(trouble: Failed) -> gr.Error:
    return gr.Error(
        f"{trouble.message} {trouble.action}", title=words.FAILED, print_exception=False
    )


def _visitor(caller: gr.Request | None) -> str:
    return getattr(caller, "session_hash", None) or f"nobody-{uuid.uuid4().hex}"


@dataclass
class _Board:
    """The half of a tab that answers."""

    run: gr.Button
    stop: gr.Button
    status: gr.HTML
    said: gr.HTML
    empty: gr.HTML
    result: gr.Column
    player: gr.Audio
    again: gr.Button
    reuse: gr.Button
    wav: gr.DownloadButton
    settings: gr.DownloadButton
    facts: gr.HTML
    shelf: gr.Radio

    def running(self, on: bool) -> Update:
        """Lock what must not be pressed twice, and the other way round."""
        return {
            self.run: gr.update(interactive=not on),
            self.stop: gr.update(interactive=on, value=words.STOP),
            self.again: gr.update(interactive=not on),
        }


class _Room:
    """One tab: the form of a request on one side, what comes of it on the other."""

    def __init__(self, studio: Studio, card: Card, request: type[Request]) -> None:
        self.studio, self.card, self.request = studio, card, request
        mode = request.mode
        with gr.Row(elem_classes="room", equal_height=False):
            with gr.Column(elem_classes="form", min_width=0):
                self.widgets = _form(request, card)
            with gr.Column(elem_classes="answer", min_width=0):
                self.board = _board(mode)
        self.asked = [k for k in request.knobs() if self.widgets[k.name].interactive]
        self.at_rest = {k.name: starting_value(k, card) for k in request.knobs()}
        self._wire()

    def _wire(self) -> None:
        board, parts = self.board, [*vars(self.board).values()]
        glue = {"api_visibility": "private", "show_progress": "hidden"}
        quick = {**glue, "queue": False}
        # Raw values: the request checks them and names the knob, Gradio's widgets would not.
        work = {**glue, "preprocess": False, "concurrency_limit": None, "trigger_mode": "once"}
        inputs = [self.widgets[k.name] for k in self.asked]
        board.run.click(self.start, inputs, parts, **work)
        board.again.click(self.retake, [board.shelf], parts, **work)
        board.stop.click(self.stop, None, [board.stop], **quick)
        board.shelf.input(
            self.pick, [board.shelf], parts, **{**work, "trigger_mode": "always_last"}
        )
        board.reuse.click(self.refill, [board.shelf], inputs, **work)
        if "instrumental" in self.widgets and "lyrics" in self.widgets:
            self.widgets["instrumental"].change(
                lambda silent: gr.update(visible=not silent),
                [self.widgets["instrumental"]],
                [self.widgets["lyrics"]],
                preprocess=False,
                **quick,
            )

    def start(self, caller: gr.Request, *values: Any) -> Iterator[Update]:
        given = {
            k.name: None if k.optional and v == "" else v
            for k, v in zip(self.asked, values, strict=True)
        }
        if given.get("instrumental") and "lyrics" in given:
            given["lyrics"] = ""  # that box is hidden: what stands in it is not asked for
        yield from self._perform(lambda: self.request.of(given), _visitor(caller))

    def retake(self, caller: gr.Request, chosen: str) -> Iterator[Update]:
        visitor = _visitor(caller)

        def again() -> Request:
            take = self._take(visitor, chosen)
            return take.again(seed=_other_seed(take.request.get("seed")))

        yield from self._perform(again, visitor)

    def stop(self, caller: gr.Request) -> Any:
        self.studio.stop(_visitor(caller))
        return gr.update(interactive=False, value=words.STOPPING)

    def pick(self, caller: gr.Request, chosen: str) -> Update:
        try:
            return self._show(self._take(_visitor(caller), chosen))
        except StudioError as error:
            return self._fail(error)

    def refill(self, caller: gr.Request, chosen: str) -> list[Any]:
        try:
            take = self._take(_visitor(caller), chosen)
        except StudioError as error:
            _toast(error)
            return [gr.skip()] * len(self.asked)
        filled = {
            k.name: "" if take.request[k.name] is None else take.request[k.name] for k in self.asked
        }
        if filled.get("instrumental"):
            filled["lyrics"] = gr.skip()  # nothing was sung: what stands there may be wanted yet
        return list(filled.values())

    def _perform(self, ask: Callable[[], Request], visitor: str) -> Iterator[Update]:
        """Watch one job from the first click to its ending. Blocks nowhere, least in `finally`."""
        board = self.board
        yield {
            **board.running(True),
            board.status: theme.status("running", words.STARTING),
            board.said: words.STARTING,
        }
        heard, stage = 0.0, ""
        with closing(_watch(self.studio, ask, visitor)) as events:
            for event in events:
                now = time.monotonic()
                if not isinstance(event, Progress):
                    yield {**board.running(False), **self._end(event, visitor)}
                elif event.stage != stage:
                    heard, stage = now, event.stage
                    yield {board.status: theme.progress(event), board.said: words.stage(stage)}
                elif now - heard >= REFRESH_S:
                    heard = now
                    yield {board.status: theme.progress(event)}

    def _end(self, event: Event, visitor: str) -> Update:
        board = self.board
        if isinstance(event, Take):
            took = words.clock(sum(event.timings_s.values()))
            return {
                **self._show(event),
                board.shelf: self._shelved(visitor, event.id),
                board.status: theme.status("done", words.DONE, took, fraction=1.0),
                board.said: f"{words.DONE}. {words.caption(event, self.at_rest)}",
            }
        if isinstance(event, Cancelled):
            return {
                board.status: theme.status(
                    "stopped", words.CANCELLED, words.clock(event.elapsed_s)
                ),
                board.said: words.CANCELLED,
            }
        return self._fail(event)

    def _fail(self, trouble: StudioError | Failed) -> Update:
        _toast(trouble)
        return {
            self.board.status: theme.status("failed", trouble.message, trouble.action),
            self.board.said: "",  # the toast is announced already
        }

    def _show(self, take: Take) -> Update:
        board = self.board
        return {
            board.empty: gr.update(visible=False),
            board.result: gr.update(visible=True),
            board.player: take.path,
            board.wav: gr.update(value=take.path),
            board.settings: gr.update(value=str(Path(take.path).with_suffix(".json"))),
            board.facts: theme.particulars(take),
        }

    def _shelved(self, visitor: str, chosen: str) -> Any:
        takes = [t for t in self.studio.takes(visitor) if t.mode == self.request.mode]
        return gr.update(
            choices=[(words.caption(t, self.at_rest), t.id) for t in takes],
            value=chosen,
            visible=True,
        )

    def _take(self, visitor: str, chosen: str) -> Take:
        for take in self.studio.takes(visitor):
            if take.id == chosen:
                return take
        raise StudioError("take-gone")


def _form(request: type[Request], card: Card) -> dict[str, gr.components.Component]:
    """The request's own knobs, then what it shares in groups under one fold."""
    mode, knobs = request.mode, request.knobs()
    made = {}
    own = [k for k in knobs if k.group == SONG]
    for knob in sorted(own, key=lambda k: ORDER.index(k.name) if k.name in ORDER else len(ORDER)):
        made[knob.name] = widget(knob, mode, card)
    groups = dict.fromkeys(k.group for k in knobs if k.group != SONG)
    if groups:
        with gr.Accordion(words.ADVANCED, open=False, elem_classes="advanced"):
            for group in groups:
                gr.HTML(f"<h2>{escape(group)}</h2>")
                with gr.Row(elem_classes="knobs"):
                    for knob in (k for k in knobs if k.group == group):
                        made[knob.name] = widget(knob, mode, card)
    return made


def _board(mode: str) -> _Board:
    with gr.Column(elem_classes="console", min_width=0):
        with gr.Row(elem_classes="actions"):
            run = gr.Button(words.MODES[mode], variant="primary", elem_id=f"{mode}-run")
            stop = gr.Button(words.STOP, variant="stop", interactive=False, elem_id=f"{mode}-stop")
        status = gr.HTML(theme.status("idle", words.READY), elem_id=f"{mode}-status")
        said = gr.HTML("", elem_id=f"{mode}-said", elem_classes="said")
    empty = gr.HTML(
        f"<p class='title'>{words.NOTHING_YET}</p><p>{words.NOTHING_YET_TIP}</p>",
        elem_classes="empty-shelf",
        elem_id=f"{mode}-empty",
    )
    with gr.Column(visible=False, elem_classes="result", min_width=0) as result:
        player = gr.Audio(
            label=words.PLAYER,
            type="filepath",
            interactive=False,
            buttons=[],
            waveform_options=WAVEFORM,
            elem_id=f"{mode}-player",
        )
        with gr.Row(elem_classes="takings"):
            again = gr.Button(words.RETAKE, size="md", elem_id=f"{mode}-again")
            reuse = gr.Button(words.REUSE, size="md", elem_id=f"{mode}-reuse")
            wav = gr.DownloadButton(words.SAVE_WAV, size="md", elem_id=f"{mode}-wav")
            settings = gr.DownloadButton(words.SAVE_JSON, size="md", elem_id=f"{mode}-json")
        shelf = gr.Radio(
            [], label=words.SHELF, elem_id=f"{mode}-shelf", elem_classes="shelf", visible=False
        )
        facts = gr.HTML("", elem_id=f"{mode}-facts")
    return _Board(
        run, stop, status, said, empty, result, player, again, reuse, wav, settings, facts, shelf
    )


def _watch(studio: Studio, ask: Callable[[], Request], visitor: str) -> Iterator[Event]:
    """Run what `ask` asks for. Whatever goes wrong comes out as an event, not as an exception."""
    try:
        with closing(studio.run(ask(), visitor)) as events:
            yield from events
    except StudioError as error:
        yield Failed.by(error)
    except Exception as error:  # noqa: BLE001 - the page is a face of the studio
        traceback.print_exc()
        yield Failed.by(StudioError("internal", kind=type(error).__name__))


def _other_seed(seed: int | None) -> int:
    other = random.randrange(MAX_SEED)
    return other if seed is None or other < seed else other + 1


def _toast(trouble: StudioError | Failed) -> None:
    gr.Warning(escape(f"{trouble.message} {trouble.action}"), title=words.FAILED, duration=8)
