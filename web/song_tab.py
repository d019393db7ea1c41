"""The page: a tab for each request, and what happens when its buttons are pressed.

Give it a `Studio` and it gives back Gradio blocks; a new request class becomes a new tab.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import tooltips as words
from core.errors import StudioError
from core.params import Request
from core.requests import HELPERS, INSTRUMENTAL, MAX_SEED
from core.results import Idea, ModelInfo, Take
from web import markup
from web.form import REGION, Form
from web.handlers import QUICK, WORK, Studio, Update, look, serve, take_of, visitor_of
from web.results import ResultPanel
from web.upload_preview import UploadPreview

BESIDE = {"generate": {"lyrics": "rewrite"}, **{mode: {"source": "listen"} for mode in words.SEND}}
"""Which helper stands under which field. `inspire` stands above all of Generate."""


OPEN = ("", None, "unknown")
"""What a field holds while it is left open."""


class SongTab:
    """One tab: the form of a request on one side, what comes of it on the other."""

    def __init__(self, studio: Studio, card: ModelInfo, request: type[Request]) -> None:
        self.studio, self.card, self.request, self.mode = studio, card, request, request.mode
        self.helpers: dict[str, gr.Button] = {}
        self.idea: gr.Textbox | None = None
        with gr.Row(elem_classes="room", equal_height=False):
            with gr.Column(elem_classes="form", min_width=0):
                if self.mode == "generate":
                    self._helper("inspire")
                self.form = Form(request, card, self._beside)
            with gr.Column(elem_classes="answer", min_width=0):
                self.board = ResultPanel(self.mode, self.form.at_rest, card)
        if card.planner:
            self.board.locked.extend(self.helpers.values())
        self._wire()

    def _beside(self, field: str) -> None:
        if helper := BESIDE[self.mode].get(field):
            self._helper(helper)

    def _helper(self, helper: str) -> None:
        """A button that lets the planner fill the form, and what it does or why it cannot."""
        able, told = bool(self.card.planner), words.HELPS[helper]
        told = told if able else self.card.no_planner
        with gr.Row(elem_classes="helper"):
            if helper == "inspire":
                param = HELPERS[helper].params()[0]
                self.idea = gr.Textbox(
                    label=words.label(param),
                    info=told,
                    max_lines=1,
                    max_length=param.max_length,
                    placeholder=words.PLACEHOLDERS[param.name],
                    interactive=able,
                    elem_id=f"{self.mode}-{param.name}",
                )
            else:
                gr.HTML(f"<p>{escape(told)}</p>")
            self.helpers[helper] = gr.Button(
                words.HELP[helper], interactive=able, size="md", elem_id=f"{self.mode}-{helper}"
            )

    def _wire(self) -> None:
        board, form = self.board, self.form
        board.wire(self.studio)
        inputs, parts, fields = [*form.inputs.values()], board.parts(), form.parts()
        board.run.click(self.start, inputs, parts, **WORK)
        board.again.click(self.retake, [board.shelf], parts, **WORK)
        board.stop.click(self.stop, None, [board.stop], **QUICK)
        board.shelf.input(
            self.pick, [board.shelf], parts, **{**WORK, "trigger_mode": "always_last"}
        )
        board.reuse.click(self.refill, [board.shelf], fields, **WORK)
        for name, picture in form.pictures.items():
            self._wire_file(form.fields[name], picture)
        form.rack.wire(self.studio)
        steering = form.steering()
        for field in steering.values():
            field.change(
                lambda *values: form.visible(dict(zip(steering, values, strict=True))),
                [*steering.values()],
                fields,
                **QUICK,
            )
        for helper, button in self.helpers.items():
            idea = [self.idea] if helper == "inspire" else []
            button.click(self.asks(helper), [*idea, *inputs], [*parts, *fields], **WORK)

    def _wire_file(self, box: gr.File, picture: UploadPreview) -> None:
        def read(given: Any, wanted: Any = None) -> Iterator[Update]:
            name = given.get("orig_name") if isinstance(given, dict) else None
            name = name or words.A_FILE
            yield {picture.box: picture.reading(name)}
            try:
                seen = look(self.studio, given)
                yield {picture.box: picture.show(seen, given["url"], wanted)}
            except StudioError as error:
                yield {box: None, picture.box: picture.refused(error)}

        seen = box.upload(
            read, [box, picture.box], [box, picture.box], **{**WORK, "trigger_mode": "multiple"}
        )
        box.clear(picture.blank, None, [picture.box], cancels=[seen], **QUICK)

    def start(self, caller: gr.Request, *values: Any) -> Iterator[Update]:
        yield from self._perform(
            lambda: self.request.of(self.form.given(values)), visitor_of(caller)
        )

    def retake(self, caller: gr.Request, chosen: str) -> Iterator[Update]:
        visitor = visitor_of(caller)

        def again() -> Request:
            take = self._take(visitor, chosen)
            return take.to_request(seed=_other_seed(take.request.get("seed")))

        yield from self._perform(again, visitor)

    def stop(self, caller: gr.Request) -> Any:
        self.studio.stop(visitor_of(caller))
        return gr.update(interactive=False, value=words.STOPPING)

    def pick(self, caller: gr.Request, chosen: str) -> Update:
        try:
            return self.board.show(self._take(visitor_of(caller), chosen))
        except StudioError as error:
            return self.board.failed(error)

    def refill(self, caller: gr.Request, chosen: str) -> Update:
        """Put the settings of a take back into the form, its files too where they still are."""
        try:
            return self.fill(self._take(visitor_of(caller), chosen).request)
        except StudioError as error:
            markup.toast(error)
            return gr.skip()

    def fill(
        self, asked: dict[str, Any], lacking: Mapping[str, StudioError] | None = None
    ) -> Update:
        """Put the values `asked` into the form.

        `lacking` says, by field, what is told where a file has to be chosen again. All else of the
        form is then as if it were there already.
        """
        form, lacking = self.form, lacking or {}
        update = {
            field: "" if asked[name] is None else asked[name]
            for name, field in form.inputs.items()
            if name in asked and name not in form.pictures
        }
        if asked.get("instrumental"):
            del update[form.fields["lyrics"]]  # nothing was sung: what stands there may be wanted
        region = [asked.get(name) for name in REGION] if asked.get("kind") == "repaint" else None
        for name, picture in form.pictures.items():
            box = form.fields[name]
            update |= {box: None, picture.box: picture.blank()}
            picked = region if name == "source" else None
            if name in lacking:
                update[picture.box] = picture.refused(lacking[name], picked)
            elif asked.get(name) is not None:
                update |= self._load(name, Path(asked[name]), picked)
            asked = {**asked, name: lacking.get(name) or update[box]}
        update[form.rack.box] = form.rack.again(self.studio, asked.get("adapters", ()))
        return _merged(update, form.visible(asked))

    def _load(self, name: str, path: Path, wanted: Any = None) -> Update:
        """Bring a file of the studio's own to a field, as if it had been dropped there."""
        box, picture = self.form.fields[name], self.form.pictures[name]
        try:
            kept, url = serve(box, path)
            seen = self.studio.look(kept)
        except StudioError as error:
            return {box: None, picture.box: picture.refused(error)}
        return {box: str(kept), picture.box: picture.show(seen, url, wanted)}

    def sends_to(self, other: SongTab, tabs: gr.Tabs) -> None:
        """Let the button under the player take the piece to another tab."""
        form = other.form
        values = [*form.inputs.values()]
        # Only what is sent: a picture on a tab not opened yet forgets itself when it is skipped.
        outputs = [tabs, *form.fields.values(), form.pictures["source"].box]

        def send(caller: gr.Request, chosen: str, *values: Any) -> Iterator[Update]:
            try:
                take = self._take(visitor_of(caller), chosen)
            except StudioError as error:
                markup.toast(error)
                yield gr.skip()  # yielding nothing would empty all outputs
                return
            picture = form.pictures["source"]
            yield {
                tabs: gr.update(selected=other.mode),
                picture.box: picture.reading(Path(take.path).name),
            }
            yield other.receive(take, dict(zip(form.inputs, values, strict=True)))

        self.board.sends[other.mode].click(send, [self.board.shelf, *values], outputs, **WORK)

    def receive(self, take: Take, form: dict[str, Any]) -> Update:
        """`take` as this tab's song, with its words where the form has none of its own."""
        asked, fields = take.request, self.form.fields
        carried = {
            name: asked[name] for name in ("prompt", "lyrics") if asked[name] and not form[name]
        }
        if asked["instrumental"] and not form["lyrics"]:
            carried["instrumental"] = True
        if "source_prompt" in fields:
            carried |= {f"source_{name}": asked[name] for name in ("prompt", "lyrics")}
        update = {fields[name]: value for name, value in carried.items()}
        update |= self._load("source", Path(take.path))
        source = update[fields["source"]]
        return _merged(update, self.form.visible({**form, **carried, "source": source}))

    def asks(self, helper: str) -> Callable[..., Iterator[Update]]:
        """What the button of `helper` does: ask the planner, and fill the form with its answer."""
        request = HELPERS[helper]
        names = {k.name for k in request.params()} - {"seed"}

        def ask(caller: gr.Request, *values: Any) -> Iterator[Update]:
            extra = {}
            if helper == "inspire":
                extra["idea"], *values = values

            def asked() -> Request:
                form = {**self.form.given(tuple(values)), **extra}
                if helper == "rewrite" and not (form["prompt"] or form.get("lyrics")):
                    raise StudioError("prompt-empty")
                return request.of({n: v for n, v in form.items() if n in names})

            form = dict(zip(self.form.inputs, values, strict=True))
            visitor = visitor_of(caller)
            yield from self.board.follow(
                self.studio, asked, visitor, lambda idea: self._fill(helper, idea, form)
            )

        return ask

    def _fill(self, helper: str, idea: Idea, form: dict[str, Any]) -> Update:
        """The form with what the planner found: all of it for a surprise, else what is open."""
        found = idea.model_dump(exclude={"kind"})
        if found["lyrics"] == INSTRUMENTAL:
            found |= {"lyrics": "", "instrumental": True}
        if helper == "listen":
            found.pop("duration_s")
            if "source_prompt" in form:
                found |= {f"source_{name}": found[name] for name in ("prompt", "lyrics")}
                if form["kind"] == "morph":  # where it goes is the musician's to say
                    del found["prompt"], found["lyrics"]
        elif found["duration_s"] is not None:
            slider = self.form.fields["duration_s"]
            found["duration_s"] = min(max(found["duration_s"], slider.minimum), slider.maximum)
        given = {"inspire": tuple(found), "rewrite": ("prompt", "lyrics"), "listen": ()}[helper]
        filled = {
            name: "" if value is None else value
            for name, value in found.items()
            if name in form and (name in given or form[name] in OPEN)
            if value not in OPEN or (helper == "inspire" and name not in ("lyrics", "duration_s"))
        }
        called = [words.called(self.form.params[n]) for n, v in filled.items() if v not in OPEN]
        told = words.FILLED.format(fields=", ".join(called)) if called else words.NOTHING_OPEN
        update = {self.form.fields[name]: value for name, value in filled.items()}
        update |= self.board.done(words.DONE, told, said=told)
        return _merged(update, self.form.visible({**form, **filled}))

    def _perform(self, ask: Callable[[], Request], visitor: str) -> Iterator[Update]:
        def end(take: Take) -> Update:
            return self.board.finished(take, self.studio.takes(visitor))

        yield from self.board.follow(self.studio, ask, visitor, end)

    def _take(self, visitor: str, chosen: str) -> Take:
        return take_of(self.studio, visitor, chosen)


def _merged(update: Update, more: Update) -> Update:
    """Both, where one sets a component's value and the other its properties."""
    merged = dict(update)
    for component, props in more.items():
        if component in merged:
            value = merged[component]
            known = value if isinstance(value, dict) and "__type__" in value else {"value": value}
            merged[component] = {**known, **props}
        else:
            merged[component] = props
    return merged


def _other_seed(seed: int | None) -> int:
    other = random.randrange(MAX_SEED)
    return other if seed is None or other < seed else other + 1
