"""The page against a studio at the far wall: what is turned arrives, what comes back is shown."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from conftest import ROOT
from fake_studio import CARD, IDEA, FakeStudio, write_tone

import theme  # first: it sets what Gradio reads at import  # isort: skip

import gradio as gr
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import forms
import tooltips as words
import ui
from knobs import PLANNER, Knob, Request
from song import HELPERS, MODES, Generate, Idea

KNOBS = {k.name: k for k in Generate.knobs()}
LISTENERS = tuple(mode for mode in MODES if mode != "generate")


def caller(name: str = "one") -> Any:
    return SimpleNamespace(session_hash=name)


class Page:
    """The page without a browser: its widgets, and the handlers behind its buttons."""

    def __init__(self, studio: FakeStudio) -> None:
        self.studio = studio
        self.demo = ui.build(studio)
        self.blocks = {
            b.elem_id: b for b in self.demo.blocks.values() if getattr(b, "elem_id", None)
        }

    def event(self, elem_id: str, does: str | None = None) -> Any:
        """What happens when the component is used."""
        wanted = self.blocks[elem_id]._id
        (found,) = (
            f
            for f in self.demo.fns.values()
            if any(t[0] == wanted and does in (None, t[1]) for t in f.targets)
        )
        return found

    def inputs(self, mode: str) -> dict[str, Any]:
        """What a run is asked with, by knob; the region is picked on the song's picture."""
        found = {b.elem_id.removeprefix(f"{mode}-"): b for b in self.event(f"{mode}-run").inputs}
        return {name.replace("source-look", "region"): b for name, b in found.items()}

    def form(self, mode: str = "generate", **changes: Any) -> dict[str, Any]:
        """What the form holds, as the browser would send it: name to value."""
        at_first = {name: b.value for name, b in self.inputs(mode).items()}
        assert changes.keys() <= at_first.keys()
        return {**at_first, **changes}

    def press(self, elem_id: str, *values: Any, by: str = "one", does: str | None = None) -> Any:
        """Every update that pressing the component makes, by elem_id."""
        fn = self.event(elem_id, does).fn
        answer = fn(*values) if does else fn(caller(by), *values)
        updates = list(answer) if isinstance(answer, Iterator) else [answer]
        return [
            {block.elem_id: value for block, value in update.items()}
            if isinstance(update, dict) and all(hasattr(k, "_id") for k in update)
            else update
            for update in updates
        ]

    def make(self, mode: str, by: str = "one", **changes: Any) -> list[dict[Any, Any]]:
        return self.press(f"{mode}-run", *self.form(mode, **changes).values(), by=by)

    def generate(self, by: str = "one", **changes: Any) -> list[dict[Any, Any]]:
        return self.make("generate", by, **{"prompt": "a waltz", **changes})

    def ask(self, mode: str, **changes: Any) -> Request:
        """What the studio is asked for. The job is given up as soon as it is known."""
        already = len(self.studio.asked)
        running = self.event(f"{mode}-run").fn(caller(), *self.form(mode, **changes).values())
        for update in running:
            if len(self.studio.asked) > already:
                running.close()
                return self.studio.asked[-1]
        raise AssertionError(update)


@pytest.fixture(autouse=True)
def upload_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if "GRADIO_TEMP_DIR" not in os.environ:  # the served page has set its own
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page"))
    return Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.fixture
def page(tmp_path: Path, upload_folder: Path) -> Page:
    return Page(FakeStudio(folder=tmp_path))


@pytest.fixture
def brought(upload_folder: Path) -> Callable[..., dict[str, Any]]:
    """A file as the browser holds it once it is uploaded."""

    def bring(name: str = "tune.wav", seconds: float = 9) -> dict[str, Any]:
        path = upload_folder / "abc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tone(path, round(seconds * 48_000), 330)
        return {
            "path": str(path),
            "orig_name": name,
            "url": f"/gradio_api/file={path}",
            "meta": {"_type": "gradio.FileData"},
        }

    return bring


@pytest.fixture(autouse=True)
def toasts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: said.append(text))
    return said


def wait_for(done: Callable[[], bool], timeout_s: float = 10) -> None:
    until = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def another(knob: Knob) -> Any:
    """A value of the knob that differs from what the form shows at first."""
    if knob.name == "instrumental":
        return True
    if knob.type is bool:
        return not knob.default
    if knob.choices:
        return next(c for c in reversed(knob.choices) if c != knob.default)
    if knob.type is str:
        return "something else"
    if forms.starting_value(knob, CARD) is None:
        return str(int(knob.low) + 5)  # a box of digits sends text
    return {"cfg_interval_end": 0.5}.get(knob.name, knob.low + knob.step)


ALSO = {("edit", "kind"): {"start_s", "end_s"}}
"""Knobs that a steering one takes along: nobody asks for a region in a morph."""


@pytest.mark.parametrize("mode", MODES)
def test_every_knob_is_on_the_page(page: Page, mode: str):
    knobs = {k.name: k for k in MODES[mode].knobs()}
    there = {name for name in knobs if f"{mode}-{name}" in page.blocks}
    assert knobs.keys() - there == set(forms.REGION) & knobs.keys()
    mute = set(forms.COMPOSING) if mode in LISTENERS else set()
    asked = [name for name in knobs if name in there - mute]
    assert list(page.inputs(mode)) == [*asked, *(["region"] if mode == "edit" else [])]


@pytest.mark.parametrize("mode", MODES)
def test_a_knob_turned_arrives_in_the_request_and_nothing_else_does(
    page: Page, mode: str, brought: Callable[..., dict[str, Any]]
):
    song = brought()
    for knob in MODES[mode].knobs():
        base: dict[str, Any] = {"prompt": "a waltz"}
        base |= {"source": song} if mode in LISTENERS else {}
        base |= {"region": [1.0, 2.0]} if mode == "edit" else {}
        base |= {"kind": "morph"} if knob.name.startswith(("n_", "source_")) else {}
        if mode == "cover" and knob.name == "duration_s":
            base |= {"source": None, "reference": song}
        turned = {knob.name: another(knob)} if knob.type is not Path else {}
        if knob.type is Path:
            turned = {knob.name: brought("other.wav")}
        elif knob.name in forms.REGION:
            turned = {"region": [1.5, 2.0] if knob.name == "start_s" else [1.0, 2.5]}
        elif knob.name in forms.COMPOSING and mode in LISTENERS:
            continue
        before = page.ask(mode, **base).model_dump()
        after = page.ask(mode, **{**base, **turned}).model_dump()
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {knob.name} | ALSO.get((mode, knob.name), set())


def plain(mode: str, update: dict[str, Any]) -> dict[str, Any]:
    """The values among an update of a form's fields, by knob."""
    values = {}
    for elem_id, new in update.items():
        is_props = isinstance(new, dict) and "__type__" in new
        if elem_id.startswith(f"{mode}-") and (not is_props or "value" in new):
            name = elem_id.removeprefix(f"{mode}-").replace("source-look", "region")
            values[name] = new["value"] if is_props else new
    return {n: v for n, v in values.items() if not n.endswith("-look")}


def test_the_form_starts_at_what_suits_the_model(page: Page):
    form = page.form()
    assert (form["inference_steps"], form["guidance_scale"], form["shift"]) == (12, 4.0, 1.0)
    page.generate()
    asked = page.studio.asked[0]
    assert (asked.inference_steps, asked.guidance_scale, asked.shift) == (12, 4.0, 1.0)
    assert asked.seed is None
    assert asked.bpm is None


def test_a_widget_says_what_its_knob_declares(page: Page):
    for name, knob in KNOBS.items():
        block = page.blocks[f"generate-{name}"]
        assert block.label == words.label(knob)
        if knob.type is Path:
            continue
        assert words.does("generate", knob) in block.info
        if isinstance(block, gr.Slider):
            assert (block.minimum, block.maximum, block.step) == (knob.low, knob.high, knob.step)
        if isinstance(block, (gr.Dropdown, gr.Radio)) and knob.choices:
            assert {value for _, value in block.choices} == set(knob.choices)


def test_a_model_with_a_shorter_longest_song_shortens_the_slider(tmp_path: Path):
    page = Page(FakeStudio(CARD.model_copy(update={"longest_s": 120.0}), tmp_path))
    assert page.blocks["generate-duration_s"].maximum == 120


def test_guidance_is_disabled_with_the_reason_where_it_steers_nothing(tmp_path: Path):
    deaf = CARD.model_copy(update={"takes_guidance": False, "guidance": 1.0})
    page = Page(FakeStudio(deaf, tmp_path))
    for name in forms.GUIDANCE:
        block = page.blocks[f"generate-{name}"]
        assert not block.interactive
        assert block.info == words.NO_GUIDANCE.format(model=deaf.title)
    page.generate()
    assert page.studio.asked[0].guidance_scale is None


def test_lyrics_hide_and_stay_at_home_when_nobody_sings(page: Page):
    for silent in (True, False):
        (seen,) = page.press("generate-instrumental", silent, None, does="change")
        assert seen["generate-lyrics"]["visible"] is not silent
    page.generate(instrumental=True, lyrics="la la la")
    assert page.studio.asked[0].lyrics == ""


def test_a_run_locks_generate_and_frees_stop_then_the_other_way_round(page: Page):
    first, *_, last = page.generate()
    assert first["generate-run"]["interactive"] is False
    assert first["generate-stop"]["interactive"] is True
    assert last["generate-run"]["interactive"] is True
    assert last["generate-stop"]["interactive"] is False


def test_the_status_counts_steps_and_time_and_the_reader_hears_stages_only(page: Page):
    updates = page.generate(prompt="slow")
    status = [u["generate-status"] for u in updates if "generate-status" in u]
    assert any("step 3 of 20" in s and "about 3 to 8 s left" in s for s in status)
    assert words.MEASURING in status[1]
    said = [u["generate-said"] for u in updates if "generate-said" in u]
    assert said[:4] == [
        words.STARTING,
        words.stage("Loading"),
        words.stage("Denoising"),
        words.stage("Decoding"),
    ]


def test_a_take_is_shown_with_its_sound_its_files_and_its_particulars(page: Page):
    last = page.generate(duration_s=11, seed="77")[-1]
    take = page.studio.takes("one")[0]
    assert last["generate-player"] == take.path
    assert last["generate-wav"]["value"] == take.path
    assert Path(last["generate-json"]["value"]).read_text().startswith("{")
    facts = last["generate-facts"]
    for told in ("77", "11 s", "a waltz", "sha256 abababab", "Pretended CPU", take.notes[0]):
        assert told in facts
    assert take.path not in facts


def test_what_a_person_wrote_is_text_and_not_markup(page: Page):
    last = page.generate(prompt="<img src=x onerror=alert(1)> & co")[-1]
    assert "<img" not in last["generate-facts"]
    assert "&lt;img" in last["generate-facts"]


def test_the_shelf_is_captioned_by_style_length_knobs_turned_and_seed(page: Page):
    last = page.generate(bpm="92", infer_method="sde", seed="5")[-1]
    ((caption, chosen),) = last["generate-shelf"]["choices"]
    assert caption == "a waltz\n30 s · Method SDE · Tempo 92 bpm · seed 5"
    assert last["generate-shelf"]["value"] == chosen


def test_the_shelf_holds_ten(page: Page):
    for _ in range(12):
        last = page.generate()[-1]
    assert len(last["generate-shelf"]["choices"]) == 10


def test_clicking_a_take_plays_it_and_shows_its_settings_again(page: Page):
    page.generate(prompt="first")
    page.generate(prompt="second")
    older = page.studio.takes("one")[1]
    (shown,) = page.press("generate-shelf", older.id)
    assert shown["generate-player"] == older.path
    assert "first" in shown["generate-facts"]


def test_settings_of_a_take_go_back_into_the_form(page: Page):
    page.generate(prompt="first", bpm="92", infer_method="heun")
    take = page.studio.takes("one")[0]
    (update,) = page.press("generate-reuse", take.id)
    filled = plain("generate", update)
    assert filled["prompt"] == "first"
    assert (filled["bpm"], filled["infer_method"], filled["seed"]) == (92, "heun", 1001)
    page.generate(**filled)
    again, before = page.studio.asked[-1], take.request
    assert again.model_dump(mode="json") == before


def test_settings_of_an_instrumental_do_not_wipe_lyrics(page: Page):
    page.generate(instrumental=True)
    (update,) = page.press("generate-reuse", page.studio.takes("one")[0].id)
    filled = plain("generate", update)
    assert filled["instrumental"] is True
    assert "lyrics" not in filled


def test_retake_is_the_request_as_run_with_another_seed(page: Page):
    page.generate(bpm="92")
    take = page.studio.takes("one")[0]
    seeds = {take.request["seed"]}
    for _ in range(5):
        page.press("generate-again", take.id)
        asked = page.studio.asked[-1].model_dump(mode="json")
        seeds.add(asked.pop("seed"))
        assert asked == {n: v for n, v in take.request.items() if n != "seed"}
    assert len(seeds) == 6


def test_two_visitors_do_not_see_each_others_takes(page: Page, toasts: list[str]):
    page.generate(by="one", prompt="mine")
    last = page.generate(by="two", prompt="yours")[-1]
    assert [c for c, _ in last["generate-shelf"]["choices"]] == ["yours\n30 s · seed 1002"]
    (refused,) = page.press("generate-shelf", page.studio.takes("one")[0].id, by="two")
    assert "generate-player" not in refused
    assert toasts
    page.press("generate-again", page.studio.takes("one")[0].id, by="two")
    assert len(page.studio.asked) == 2


@pytest.mark.parametrize(
    ("turned", "told"),
    [
        ({"prompt": "  "}, "The style is empty."),
        ({"duration_s": 999}, "Length runs from 10 to 240 s, not 999."),
        ({"bpm": "fast"}, "Tempo is a whole number from 30 to 300 bpm"),
        ({"bpm": "92.5"}, "Tempo is a whole number"),
        ({"seed": "-1"}, "Seed runs from 0"),
        ({"lyrics": "la " * 4000}, "Lyrics has 12,000 characters"),
        ({"cfg_interval_start": 0.9, "cfg_interval_end": 0.1}, "below"),
    ],
)
def test_a_wrong_value_is_a_sentence_and_an_action(
    page: Page, toasts: list[str], turned: dict[str, Any], told: str
):
    last = page.generate(**turned)[-1]
    assert told in last["generate-status"]
    assert "data-state='failed'" in last["generate-status"]
    assert len(toasts) == 1
    assert last["generate-run"]["interactive"] is True
    assert not page.studio.asked
    assert not {b for b in last if b.removeprefix("generate-") in KNOBS}, "the form stays"


def test_a_failure_of_the_studio_is_shown_and_the_page_goes_on(page: Page, toasts: list[str]):
    last = page.generate(prompt="fail")[-1]
    assert "There was not enough memory" in last["generate-status"]
    assert "Shorten the song to 120 s" in toasts[0]
    assert "generate-player" not in last
    assert page.generate()[-1]["generate-run"]["interactive"] is True


def test_a_bug_behind_the_page_is_told_without_a_traceback(
    page: Page, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(*_: Any) -> Iterator[Any]:
        raise OSError("/secret/path")
        yield

    monkeypatch.setattr(page.studio, "run", broken)
    last = page.generate()[-1]
    assert "Something broke inside the studio (OSError)." in last["generate-status"]
    assert "secret" not in str(last)
    assert last["generate-run"]["interactive"] is True
    assert "/secret/path" in capsys.readouterr().err, "the terminal is told all of it"


def test_stop_tells_the_studio_and_the_run_ends_as_stopped(page: Page):
    running = page.event("generate-run").fn(caller(), *page.form(prompt="slow").values())
    next(running), next(running)
    (stopping,) = page.press("generate-stop")
    assert stopping["interactive"] is False
    assert page.studio.stopped == ["one"]
    (last,) = list(running)[-1:]
    told = {block.elem_id: value for block, value in last.items()}
    assert words.CANCELLED in told["generate-status"]
    assert told["generate-run"]["interactive"] is True


def test_a_closed_tab_closes_the_job_and_leaves(page: Page):
    running = page.event("generate-run").fn(caller(), *page.form(prompt="slow").values())
    next(running), next(running)
    running.close()
    assert page.studio.closed == 1
    (leave,) = (f for f in page.demo.fns.values() if any(t[1] == "unload" for t in f.targets))
    leave.fn(caller())
    assert page.studio.left == ["one"]


@pytest.mark.parametrize("module", ["ui", "endpoints", "theme", "tooltips"])
def test_the_page_is_importable_without_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_gradio_reports_nothing_to_anyone():
    code = "import theme, gradio.analytics as a; import sys; sys.exit(a.analytics_enabled())"
    env = {"PATH": "/usr/bin", "GRADIO_ANALYTICS_ENABLED": "True"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0


# ---- the API, over the wire ----


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeStudio, str]]:
    patch = pytest.MonkeyPatch()
    patch.setenv("NO_PROXY", "127.0.0.1,localhost")
    patch.setenv("no_proxy", "127.0.0.1,localhost")
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("page")))
    studio = FakeStudio(folder=tmp_path_factory.mktemp("takes"))
    demo = ui.build(studio)
    options = {**theme.launch_options(), "allowed_paths": [str(studio.folder)]}
    _, url, _ = demo.queue(max_size=64).launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **options
    )
    yield studio, url
    demo.close()
    patch.undo()


@pytest.fixture(scope="module")
def client(served: tuple[FakeStudio, str], tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(served[1], verbose=False, download_files=str(tmp_path_factory.mktemp("got")))


def test_the_api_has_one_endpoint_a_mode_and_nothing_else(client: Client):
    told = client.view_api(return_format="dict", print_info=False)
    assert set(told["named_endpoints"]) == {f"/{mode}" for mode in MODES | HELPERS}
    assert not told["unnamed_endpoints"]


def test_the_api_speaks_in_the_requests_own_names_types_and_defaults(client: Client):
    told = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/generate"]
    assert [p["parameter_name"] for p in told["parameters"]] == list(KNOBS)
    for parameter in told["parameters"]:
        knob = KNOBS[parameter["parameter_name"]]
        assert parameter["parameter_has_default"] is not knob.required
        assert parameter["parameter_default"] == knob.default
        assert words.tip("generate", knob) in parameter["python_type"]["description"]
        if knob.choices:
            assert parameter["type"]["enum"] == list(knob.choices)
    assert told["description"].startswith("A song from words")


def test_an_api_call_returns_the_song_and_its_take(served: Any, client: Client):
    studio, _ = served
    sound, take = client.predict(
        prompt="by wire", duration_s=10, seed=3, bpm=90, keyscale="A minor", api_name="/generate"
    )
    assert Path(sound).read_bytes()[:4] == b"RIFF"
    assert take["request"]["seed"] == 3
    assert (studio.asked[-1].bpm, studio.asked[-1].keyscale) == (90, "A minor")
    assert "path" not in take
    assert studio.left[-1].startswith("api-"), "nothing of it stays on the shelf"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": ""}, "The style is empty. Write a few words"),
        ({"duration_s": 9}, "Length runs from 10 to 240 s, not 9. Set Length"),
        ({"duration_s": "NaN"}, "Length is a number from 10 to 240 s"),
        ({"seed": 1.5}, "Seed is a whole number"),
        ({"keyscale": "H minor"}, "Key cannot be 'H minor'. Choose one of"),
        ({"inference_steps": True}, "Steps is a whole number from 1 to 100, not True."),
        ({"prompt": "fail"}, "There was not enough memory on the CPU"),
    ],
)
def test_a_wrong_value_by_api_is_a_sentence_and_an_action(
    client: Client, given: dict[str, Any], told: str, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(AppError, match=told.replace("(", r"\(")):
        client.predict(**{"prompt": "a waltz", **given}, api_name="/generate")
    assert "Traceback" not in capfd.readouterr().err


def test_not_a_number_by_plain_http_is_a_sentence_too(served: Any):
    url = f"{served[1]}gradio_api/call/v2/generate"
    body = f'{{"prompt": "x", "duration_s": {math.inf}}}'.replace("inf", "NaN")
    called = httpx.post(url, content=body, headers={"content-type": "application/json"})
    if called.status_code == 200:
        told = httpx.get(f"{served[1]}gradio_api/call/generate/{called.json()['event_id']}").text
        assert "Length is a number from 10 to 240 s" in told
    else:
        assert called.status_code == 422
    assert "Traceback" not in called.text


@pytest.mark.parametrize(
    ("given", "code"), [({"prompt": "x", "tempo": 3}, "unknown-field"), ({}, "prompt-empty")]
)
def test_a_wrong_name_by_plain_http_is_named(served: Any, given: dict[str, Any], code: str):
    called = httpx.post(f"{served[1]}gradio_api/call/v2/generate", json=given)
    assert called.status_code == 422
    assert called.json()["code"] == code


def test_an_api_call_given_up_is_stopped(served: Any, client: Client):
    studio, _ = served
    before = len(studio.left)
    job = client.submit(prompt="slow", api_name="/generate")
    wait_for(lambda: len(job.outputs()) >= 2)
    job.cancel()
    wait_for(lambda: len(studio.left) > before)
