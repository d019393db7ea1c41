"""A song tab: the form of a request on one side, its takes on the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import tooltips
from core.errors import StudioError
from core.music import INSTRUMENTAL
from core.params import Request
from core.requests import HELPERS, MAX_SEED, REGION_EDITS
from core.results import Failed, Idea, ModelInfo, Take
from web import markup
from web.form import REGION, Form
from web.handlers import (
    QUICK,
    WORK,
    Update,
    find_take,
    inspect_upload,
    serve_file,
    uploaded_path,
)
from web.results import ResultPanel
from web.sessions import Sessions
from web.upload_preview import UploadPreview
from web.widgets import is_offered

HELPER_BELOW = {
    "generate": {"lyrics": "rewrite"},
    **{mode: {"source": "listen"} for mode in tooltips.SEND},
}
"""Which helper's button is below which field. That of `inspire` is above the form of Generate."""

EMPTY = ("", None, "unknown")
"""Values of a field that was left open."""


class SongTab:
    """The form of one song request, and its results."""

    def __init__(self, sessions: Sessions, info: ModelInfo, request: type[Request]) -> None:
        self.sessions, self.studio, self.info = sessions, sessions.studio, info
        self.mode = request.mode
        self.helpers: dict[str, gr.Button] = {}
        self.idea: gr.Textbox | None = None
        self.transcribe: gr.Checkbox | None = None
        with gr.Row(elem_classes="tab-body", equal_height=False):
            with gr.Column(elem_classes="form", min_width=0):
                if self.mode == "generate":
                    self._draw_helper("inspire")
                self.form = Form(request, info, self._draw_below)
            with gr.Column(elem_classes="output", min_width=0):
                self.results = ResultPanel(self.mode, self.form.start_values, info)
        if info.planner:
            self.results.locked.extend(self.helpers.values())
        self._wire()

    def _draw_below(self, field: str) -> None:
        if helper := HELPER_BELOW[self.mode].get(field):
            self._draw_helper(helper)

    def _draw_helper(self, helper: str) -> None:
        """A button that lets the planner fill in the form, with what it does or why it cannot."""
        able = bool(self.info.planner)
        text = tooltips.HELPER_HELP[helper] if able else self.info.no_planner
        with gr.Row(elem_classes="helper"):
            if helper == "inspire":
                param = HELPERS[helper].params()[0]
                self.idea = gr.Textbox(
                    label=tooltips.label(param),
                    info=text,
                    max_lines=1,
                    max_length=param.max_length,
                    placeholder=tooltips.PLACEHOLDERS[param.name],
                    interactive=able,
                    elem_id=f"{self.mode}-{param.name}",
                )
            else:
                gr.HTML(f"<p>{escape(text)}</p>")
            if helper == "listen":
                param = next(k for k in HELPERS[helper].params() if k.name == "transcribe")
                self.transcribe = gr.Checkbox(
                    param.default,
                    label=tooltips.label(param),
                    info=tooltips.description(helper, param),
                    interactive=able,
                    elem_id=f"{self.mode}-{param.name}",
                )
            self.helpers[helper] = gr.Button(
                tooltips.HELPERS[helper],
                interactive=able,
                size="md",
                elem_id=f"{self.mode}-{helper}",
            )

    def _wire(self) -> None:
        results, form = self.results, self.form
        results.wire(self.sessions)
        inputs, outputs = [*form.inputs.values()], results.outputs()
        results.run.click(self.start, inputs, outputs, **WORK)
        results.retake.click(self.retake, [results.takes], outputs, **WORK)
        results.stop.click(self.stop, None, [results.stop], **QUICK)
        results.takes.input(
            self.select_take, [results.takes], outputs, **{**WORK, "trigger_mode": "always_last"}
        )
        results.reuse.click(self.reuse_settings, [results.takes], form.outputs(), **WORK)
        for name, preview in form.previews.items():
            self._wire_upload(form.fields[name], preview)
        if form.adapter_picker:
            form.adapter_picker.wire(self.studio)
        controllers = form.controllers()
        for field in controllers.values():
            field.change(
                lambda *values: form.visibility(dict(zip(controllers, values, strict=True))),
                [*controllers.values()],
                form.outputs(),
                **QUICK,
            )
        for helper, button in self.helpers.items():
            button.click(
                self._helper_handler(helper),
                [*self._helper_inputs(helper).values(), *inputs],
                [*outputs, *form.outputs()],
                **WORK,
            )

    def _helper_inputs(self, helper: str) -> dict[str, gr.components.Component]:
        """The helper's own controls, by parameter."""
        own = {"inspire": {"idea": self.idea}, "listen": {"transcribe": self.transcribe}}
        return {name: field for name, field in own.get(helper, {}).items() if field is not None}

    def _wire_upload(self, box: Any, preview: UploadPreview) -> None:
        def read(value: Any, region: Any = None) -> Iterator[Update]:
            name = value.get("orig_name") if isinstance(value, dict) else None
            yield {preview.box: preview.reading(name or tooltips.A_FILE)}
            try:
                info = inspect_upload(self.studio, value)
                yield {preview.box: preview.show(info, value["url"], region)}
            except Exception as error:  # noqa: BLE001 - no exception may reach Gradio
                yield {box: None, preview.box: preview.refused(Failed.from_error(error))}

        uploaded = box.upload(
            read, [box, preview.box], [box, preview.box], **{**WORK, "trigger_mode": "multiple"}
        )
        box.clear(preview.clear, None, [preview.box], cancels=[uploaded], **QUICK)

    def start(self, caller: gr.Request, *values: Any) -> Iterator[Update]:
        """Run the request that the form makes."""
        try:
            request = self.form.read_request(values)
        except StudioError as error:
            yield self.results.failed(error)
            return
        yield from self._run(request, self.sessions.visitor(caller))

    def retake(self, caller: gr.Request, take_id: str) -> Iterator[Update]:
        """Run the selected take's request with another seed."""
        visitor = self.sessions.visitor(caller)
        try:
            take = find_take(self.studio, visitor, take_id)
            request = take.to_request(seed=_other_seed(take.request.get("seed")))
        except StudioError as error:
            yield self.results.failed(error)
            return
        yield from self._run(request, visitor)

    def _run(self, request: Request, visitor: str) -> Iterator[Update]:
        return self.results.follow(
            self.studio,
            request,
            visitor,
            lambda take: self.results.finished(take, self.studio.takes(visitor)),
        )

    def stop(self, caller: gr.Request) -> Any:
        """Cancel the visitor's jobs."""
        self.studio.stop(self.sessions.visitor(caller))
        return self.results.stopping()

    def select_take(self, caller: gr.Request, take_id: str) -> Update:
        """Show another take."""
        try:
            return self.results.show(self._take(caller, take_id))
        except StudioError as error:
            return self.results.show_error(error)

    def reuse_settings(self, caller: gr.Request, take_id: str) -> Update:
        """Put the settings of a take back into the form, and its files where they still exist."""
        try:
            return self.fill(self._take(caller, take_id).request)
        except StudioError as error:
            markup.toast(error)
            return gr.skip()

    def fill(
        self, values: dict[str, Any], missing: Mapping[str, StudioError] | None = None
    ) -> Update:
        """Fill in the form.

        Args:
            values: by parameter.
            missing: what to say, by parameter, where a file has to be chosen again. The rest of
                the form is shown as if the file were there.
        """
        form, missing = self.form, missing or {}
        update = {
            field: "" if values[name] is None else values[name]
            for name, field in form.inputs.items()
            if name in values
            and name not in form.previews
            and is_offered(form.params.get(name), values[name], self.info)
        }
        if values.get("instrumental"):
            del update[form.fields["lyrics"]]  # keep lyrics that the person has typed
        region = (
            [values.get(name) for name in REGION] if values.get("kind") in REGION_EDITS else None
        )
        for name, preview in form.previews.items():
            box = form.fields[name]
            update |= {box: None, preview.box: preview.clear()}
            own_region = region if name == "source" else None
            if name in missing:
                update[preview.box] = preview.refused(missing[name], own_region)
            elif values.get(name) is not None:
                update |= self._load_file(name, Path(values[name]), own_region)
            values = {**values, name: missing.get(name) or update[box]}
        if form.adapter_picker:
            adapters = values.get("adapters", ())
            update[form.adapter_picker.box] = form.adapter_picker.load(self.studio, adapters)
        return _merged(update, form.visibility(values))

    def _load_file(self, name: str, path: Path, region: Any = None) -> Update:
        """Load one of the studio's files into a field, as if it had been uploaded there."""
        box, preview = self.form.fields[name], self.form.previews[name]
        try:
            cached, url = serve_file(box, path)
            info = self.studio.inspect_audio(cached)
        except StudioError as error:
            return {box: None, preview.box: preview.refused(error)}
        return {box: str(cached), preview.box: preview.show(info, url, region)}

    def send_to(self, other: SongTab, tabs: gr.Tabs) -> None:
        """Let the button below the player send the take to another tab."""
        form = other.form
        preview = form.previews["source"]
        # Only what is sent: a preview on a tab that was never opened forgets its properties when an
        # update skips it.
        outputs = [tabs, *form.fields.values(), preview.box]

        def send(caller: gr.Request, take_id: str, *values: Any) -> Iterator[Update]:
            try:
                take = self._take(caller, take_id)
            except StudioError as error:
                markup.toast(error)
                yield gr.skip()  # yielding nothing would empty all outputs
                return
            yield {
                tabs: gr.update(selected=other.mode),
                preview.box: preview.reading(Path(take.path).name),
            }
            yield other.receive(take, dict(zip(form.inputs, values, strict=True)))

        inputs = [self.results.takes, *form.inputs.values()]
        self.results.send[other.mode].click(send, inputs, outputs, **WORK)

    def receive(self, take: Take, form: dict[str, Any]) -> Update:
        """`take` as this tab's source, with its style and lyrics where the form has none."""
        request, fields = take.request, self.form.fields
        copied = {
            name: request[name] for name in ("prompt", "lyrics") if request[name] and not form[name]
        }
        if request["instrumental"] and not form["lyrics"]:
            copied["instrumental"] = True
        if "source_prompt" in fields:
            copied |= {f"source_{name}": request[name] for name in ("prompt", "lyrics")}
        update = {fields[name]: value for name, value in copied.items()}
        update |= self._load_file("source", Path(take.path))
        source = update[fields["source"]]
        return _merged(update, self.form.visibility({**form, **copied, "source": source}))

    def _helper_handler(self, helper: str) -> Callable[..., Iterator[Update]]:
        """The handler of a helper's button: run the planner and fill in the form."""

        def handle(caller: gr.Request, *values: Any) -> Iterator[Update]:
            names = [*self._helper_inputs(helper)]
            extra = dict(zip(names, values, strict=False))
            values = values[len(names) :]
            try:
                request = self._helper_request(helper, values, extra)
            except StudioError as error:
                yield self.results.failed(error)
                return
            form = dict(zip(self.form.inputs, values, strict=True))
            yield from self.results.follow(
                self.studio,
                request,
                self.sessions.visitor(caller),
                lambda idea: self._fill_from_idea(helper, idea, form),
            )

        return handle

    def _helper_request(self, helper: str, values: Any, extra: dict[str, Any]) -> Request:
        request = HELPERS[helper]
        names = {param.name for param in request.params()} - {"seed"}
        form = {**self.form.read(values), **extra}
        if helper == "rewrite" and not (form["prompt"] or form.get("lyrics")):
            raise StudioError("prompt-empty")
        return request.of({name: value for name, value in form.items() if name in names})

    def _fill_from_idea(self, helper: str, idea: Idea, form: dict[str, Any]) -> Update:
        """The form with what the planner found.

        `inspire` sets every field, `rewrite` style and lyrics, `listen` only what was left open.
        """
        found = self._found(helper, idea, form)
        overwritten = {"inspire": tuple(found), "rewrite": ("prompt", "lyrics"), "listen": ()}
        may_empty = [*found] if helper == "inspire" else []
        filled = {
            name: "" if value is None else value
            for name, value in found.items()
            if name in form
            and (name in overwritten[helper] or form[name] in EMPTY)
            and (value not in EMPTY or (name in may_empty and name not in ("lyrics", "duration_s")))
        }
        labels = [
            tooltips.name_of(self.form.params[name])
            for name, value in filled.items()
            if value not in EMPTY
        ]
        text = tooltips.NOTHING_FILLED
        if labels:
            text = tooltips.FILLED.format(fields=", ".join(labels))
        update: Update = {self.form.fields[name]: value for name, value in filled.items()}
        update |= self.results.done(tooltips.DONE, text, announcement=text)
        return _merged(update, self.form.visibility({**form, **filled}))

    def _found(self, helper: str, idea: Idea, form: dict[str, Any]) -> dict[str, Any]:
        """The values of an idea, as this form would hold them."""
        found = idea.model_dump(exclude={"kind"})
        unsung = helper == "inspire" and not self.info.sings
        if unsung or found["lyrics"] == INSTRUMENTAL:
            found |= {"lyrics": "", "instrumental": True}
        if helper == "listen":
            found.pop("duration_s")
            if "source_prompt" in form:
                found |= {f"source_{name}": found[name] for name in ("prompt", "lyrics")}
                if form["kind"] == "morph":  # the new style is the person's to choose
                    del found["prompt"], found["lyrics"]
        elif found["duration_s"] is not None:
            slider = self.form.fields["duration_s"]
            found["duration_s"] = min(max(found["duration_s"], slider.minimum), slider.maximum)
        return found

    def _take(self, caller: gr.Request, take_id: str) -> Take:
        return find_take(self.studio, self.sessions.visitor(caller), take_id)

    def stored(self) -> dict[str, gr.components.Component]:
        """The components whose values the browser keeps over a reload, by name."""
        return {**self.form.inputs, **({"idea": self.idea} if self.idea else {})}

    def resume_outputs(self) -> list[gr.blocks.Block]:
        """The components that `resume` changes."""
        idea = [self.idea] if self.idea else []
        return [*self.form.outputs(), *idea, *self.results.outputs()]

    def resume(self, stored: Mapping[str, Any], takes: tuple[Take, ...]) -> Update:
        """The update for a page that was reloaded.

        Args:
            stored: the values that the browser kept, by the names of `stored`.
            takes: the visitor's takes, newest first.
        """
        form = self.form
        values = form.stored_values(stored)
        update: Update = {form.fields[name]: value for name, value in values.items()}
        for name in form.previews:
            try:
                path = uploaded_path(stored.get(name))
            except StudioError:
                continue  # it is gone, or was never uploaded here
            if path is not None:
                region = _region_of(stored) if name == "source" else None
                update |= self._load_file(name, path, region)
                values[name] = update[form.fields[name]]
        if self.idea and isinstance(idea := stored.get("idea"), str):
            update[self.idea] = idea[:1000]
        if values:
            current = {name: form.fields[name].value for name in form.controllers()}
            update = _merged(update, form.visibility({**current, **values}))
        return update | self.results.list_takes(takes)


def _region_of(stored: Mapping[str, Any]) -> list[float] | None:
    region = stored.get("region")
    if not isinstance(region, list) or len(region) != 2:
        return None
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in region)
    return region if numbers and 0 <= region[0] < region[1] else None


def _merged(update: Update, more: Update) -> Update:
    """Both updates, where one sets a component's value and the other its properties."""
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
