"""The page against a studio at the far wall: what is turned arrives, what comes back is shown."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from conftest import ROOT
from fake_studio import CARD, IDEA, FakeStudio, write_tone
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from page_handlers import Page, caller

import tooltips
from core.params import PLANNER, AdapterRef, Param
from core.requests import EXPORTS, HELPERS, MODES, Generate
from core.results import Idea
from web import job_controls, sessions
from web.api import REQUESTS, unpack_error
from web.form import REGION
from web.page import build, launch_options
from web.widgets import COMPOSING, GUIDANCE, starting_value

KNOBS = {k.name: k for k in Generate.params()}
LISTENERS = tuple(mode for mode in MODES if mode != "generate")


@pytest.fixture(scope="module", autouse=True)
def upload_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, upload_folder: Path) -> Page:
    return Page(FakeStudio(folder=tmp_path_factory.mktemp("studio")))


@pytest.fixture
def page(built: Page) -> Page:
    """The page as it opens. Building it takes a second, so one is used in turn."""
    built.studio.reset()
    return built


@pytest.fixture
def brought(upload_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A file as the browser holds it once it is uploaded."""

    def bring(name: str = "tune.wav", seconds: float = 9) -> dict[str, Any]:
        path = upload_folder / tmp_path.name / name
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


def another(param: Param) -> Any:
    """A value of the knob that differs from what the form shows at first."""
    if param.name == "instrumental":
        return True
    if param.type is bool:
        return not param.default
    if param.choices:
        return next(c for c in reversed(param.choices) if c != param.default)
    if param.type is str:
        return "something else"
    assert param.type is not AdapterRef, "rows are brought, not typed"
    if starting_value(param, CARD) is None:
        return str(int(param.low) + 5)  # a box of digits sends text
    return {"cfg_interval_end": 0.5}.get(param.name, param.low + param.step)


ALSO = {("edit", "kind"): {"start_s", "end_s"}}
"""Knobs that a steering one takes along: nobody asks for a region in a morph."""


@pytest.mark.parametrize("mode", MODES)
def test_every_knob_is_on_the_page(page: Page, mode: str):
    params = {k.name: k for k in MODES[mode].params()}
    there = {name for name in params if f"{mode}-{name}" in page.blocks}
    assert params.keys() - there == set(REGION) & params.keys()
    mute = set(COMPOSING) if mode in LISTENERS else set()
    asked = [name for name in params if name in there - mute]
    assert list(page.inputs(mode)) == [*asked, *(["region"] if mode == "edit" else [])]


@pytest.mark.parametrize("mode", MODES)
def test_a_knob_turned_arrives_in_the_request_and_nothing_else_does(
    page: Page, mode: str, brought: Callable[..., dict[str, Any]]
):
    song = brought()
    for param in MODES[mode].params():
        base: dict[str, Any] = {"prompt": "a waltz"}
        base |= {"source": song} if mode in LISTENERS else {}
        base |= {"region": [1.0, 2.0]} if mode == "edit" else {}
        base |= {"kind": "morph"} if param.name.startswith(("n_", "source_")) else {}
        if mode == "cover" and param.name == "duration_s":
            base |= {"source": None, "reference": song}
        turned = {param.name: another(param)} if param.type not in (Path, AdapterRef) else {}
        if param.type is Path:
            turned = {param.name: brought("other.wav")}
        elif param.type is AdapterRef:
            turned = {param.name: [{"file": brought("warm.safetensors")["path"], "strength": 0.5}]}
        elif param.name in REGION:
            turned = {"region": [1.5, 2.0] if param.name == "start_s" else [1.0, 2.5]}
        elif param.name in COMPOSING and mode in LISTENERS:
            continue
        before = page.ask(mode, **base).model_dump()
        after = page.ask(mode, **{**base, **turned}).model_dump()
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {param.name} | ALSO.get((mode, param.name), set())


def test_what_is_hidden_is_not_asked_for(page: Page, brought: Callable[..., dict[str, Any]]):
    song, turned = brought(), {"strength": 0.3, "noise": 0.4, "duration_s": 77}
    covered = page.ask("cover", source=song, **turned)
    assert (covered.strength, covered.noise, covered.duration_s) == (0.3, 0.4, 30)
    sounds_like = page.ask("cover", reference=song, **turned)
    assert (sounds_like.strength, sounds_like.noise, sounds_like.duration_s) == (1, 0, 77)
    turned = {"source_prompt": "old", "n_max": 0.5, "repaint_strength": 0.9, "region": [1, 2]}
    repainted = page.ask("edit", source=song, **turned)
    assert (repainted.source_prompt, repainted.n_max, repainted.start_s) == ("", 1, 1)
    assert (
        page.ask("edit", source=song, repaint_mode="aggressive", **turned).repaint_strength == 0.5
    )
    morphed = page.ask("edit", source=song, kind="morph", prompt="brass", **turned)
    assert (morphed.source_prompt, morphed.n_max, morphed.start_s) == ("old", 0.5, 0)
    assert (morphed.end_s, morphed.repaint_strength) == (None, 0.5)


@pytest.mark.parametrize(
    ("mode", "steer", "there", "gone"),
    [
        ("cover", {}, [], ["strength", "noise", "duration_s"]),
        ("cover", {"reference": "x"}, ["duration_s"], ["strength", "noise"]),
        ("cover", {"source": "x", "reference": "x"}, ["strength", "noise"], ["duration_s"]),
        ("edit", {"kind": "repaint"}, ["repaint_mode", "repaint_strength"], ["n_max"]),
        ("edit", {"repaint_mode": "conservative"}, ["repaint_mode"], ["repaint_strength"]),
        ("edit", {"kind": "morph"}, ["n_max", "n_min", "n_avg", "source_prompt"], ["repaint_mode"]),
    ],
)
def test_controls_come_and_go_with_what_they_are_for(
    page: Page, mode: str, steer: dict[str, Any], there: list[str], gone: list[str]
):
    by = next(iter(steer), "instrumental")
    inputs = page.event(f"{mode}-{by}", "change").inputs
    at_first = {b.elem_id.removeprefix(f"{mode}-"): b.value for b in inputs}
    (seen,) = page.press(f"{mode}-{by}", *{**at_first, **steer}.values(), does="change")
    assert all(seen[f"{mode}-{name}"]["visible"] for name in there)
    assert not any(seen[f"{mode}-{name}"]["visible"] for name in gone)
    if not steer:
        assert not any(page.blocks[f"{mode}-{name}"].visible for name in gone)


@pytest.mark.parametrize("mode", LISTENERS)
def test_a_run_without_a_song_says_to_choose_one(page: Page, mode: str, toasts: list[str]):
    last = page.make(mode)[-1]
    assert "No file was chosen for Source audio. Choose an audio file." in toasts
    assert "No file was chosen for Source audio." in last[f"{mode}-status"]
    assert last[f"{mode}-run"]["interactive"] is True
    assert not page.studio.asked


def test_a_region_that_is_not_there_yet_is_waited_for(
    page: Page, brought: Callable[..., dict[str, Any]], toasts: list[str]
):
    page.make("edit", source=brought())
    assert toasts[0].startswith("tune.wav is still being read.")
    assert page.ask("edit", source=brought(), kind="morph", prompt="brass").kind == "morph"


def test_a_song_is_looked_at_as_soon_as_it_is_there(
    page: Page, brought: Callable[..., dict[str, Any]]
):
    song = brought("my tune.wav", seconds=9)
    reading, ready = page.press("edit-source", song, does="upload")
    assert reading["edit-source-look"]["message"] == "Reading my tune.wav"
    seen = ready["edit-source-look"]
    assert (seen["state"], seen["seconds"], seen["message"]) == (
        "ready",
        9,
        "0:09.0 · 48 kHz · stereo",
    )
    assert seen["value"] == [3.0, 6.0]
    assert len(seen["peaks"]) == 1000
    assert seen["url"] == song["url"].lstrip("/")
    assert page.studio.looked == [Path(song["path"])]
    (blank,) = page.press("edit-source", does="clear")
    assert (blank["state"], blank["value"], blank["peaks"]) == ("empty", None, [])
    *_, cover = page.press("cover-source", song, does="upload")
    assert cover["cover-source-look"]["value"] is None, "no region to pick in a cover"


def test_a_file_that_is_no_music_is_refused_politely_and_let_go(
    page: Page, brought: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    notes = brought("notes.txt")
    Path(notes["path"]).write_text("dear diary")
    *_, refused = page.press("cover-source", notes, does="upload")
    assert refused["cover-source"] is None
    seen = refused["cover-source-look"]
    assert (seen["state"], seen["message"]) == (
        "refused",
        "notes.txt cannot be read as audio: it holds no sound.",
    )
    assert seen["notes"][0].startswith("Save it as WAV, FLAC or MP3")
    monkeypatch.setattr(page.studio, "look", lambda _: 1 / 0)
    *_, broken = page.press("cover-source", brought(), does="upload")
    assert "An unexpected error occurred (ZeroDivisionError)." in str(broken)


@pytest.mark.parametrize(
    "given",
    [
        "/etc/passwd",
        {"path": "/etc/passwd"},
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "{folder}/../../etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "{folder}/link", "meta": {"_type": "gradio.FileData"}},
        {"path": "{folder}/gone.wav", "meta": {"_type": "gradio.FileData"}},
        {"path": "{folder}", "meta": {"_type": "gradio.FileData"}},
        {"path": "https://example.org/a.wav", "meta": {"_type": "gradio.FileData"}},
        {"path": 7, "meta": {"_type": "gradio.FileData"}},
        {"path": "a\0b", "meta": {"_type": "gradio.FileData"}},
        ["/etc/passwd"],
        7,
    ],
)
def test_only_what_was_uploaded_here_is_read(
    page: Page, upload_folder: Path, given: Any, toasts: list[str]
):
    (upload_folder / "link").unlink(missing_ok=True)
    (upload_folder / "link").symlink_to("/etc/passwd")
    if isinstance(given, dict) and isinstance(given["path"], str):
        given = {**given, "path": given["path"].replace("{folder}", str(upload_folder))}
    last = page.make("extend", source=given)[-1]
    assert re.search("was not uploaded to this page|was not found", toasts[0])
    assert "/etc" not in str(last) + toasts[0]
    *_, refused = page.press("extend-source", given, does="upload")
    assert refused["extend-source-look"]["state"] == "refused"
    assert not page.studio.asked
    assert not page.studio.looked


def test_even_an_uploaded_file_is_not_named_by_its_path(
    page: Page, brought: Callable[..., dict[str, Any]], toasts: list[str]
):
    page.make("extend", source=brought()["path"])
    assert toasts[0].startswith("tune.wav was not uploaded to this page.")
    assert not page.studio.asked


@pytest.fixture
def adapter(brought: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """An adapter as the browser holds it once it is uploaded; to the page's eyes, no more."""

    def bring(name: str = "warm.safetensors", content: bytes = b"12345678{}") -> dict[str, Any]:
        file = brought(name, 0.01)
        Path(file["path"]).write_bytes(content)
        return file

    return bring


def test_adapters_are_judged_as_they_come_and_asked_for_with_their_strengths(
    page: Page, adapter: Callable[..., dict[str, Any]]
):
    pair = [adapter("adapter_model.safetensors"), adapter("adapter_config.json", b"{}")]
    reading, first = page.press("generate-adapters-file", pair, None, does="upload")
    assert reading["generate-adapters"]["state"] == "reading"
    (row,) = first["generate-adapters"]["value"]
    assert (row["file"], row["config"]) == (pair[0]["path"], pair[1]["path"])
    assert (row["strength"], row["message"]) == (1, "rank 8 · 48 layers · 1.2 MB")
    assert first["generate-adapters-file"] is None, "there is room for more"
    two = [adapter("warm.safetensors"), adapter("cold.safetensors")]
    *_, then = page.press("generate-adapters-file", two, [row], does="upload")
    rows = then["generate-adapters"]["value"]
    names = ["adapter_model.safetensors", "warm.safetensors", "cold.safetensors"]
    assert [r["name"] for r in rows] == names
    assert len(then["generate-adapters"]["notes"]) == 2
    rows = [{**r, "strength": s} for r, s in zip(rows, (0.3, 0, 1.5), strict=True)]
    asked = page.ask("generate", prompt="a waltz", adapters=rows)
    assert [(w.file.name, w.strength) for w in asked.adapters] == list(
        zip(names, (0.3, 0, 1.5), strict=True)
    )
    assert asked.adapters[0].config == Path(pair[1]["path"])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("warm.pt", b"PK", "warm.pt cannot be read as an adapter: it is not a safetensors file."),
        ("wide.safetensors", b"12345678{}", "this model has 256. Choose an adapter"),
        ("adapter_config.json", b"{}", "together with its adapter file"),
    ],
)
def test_an_adapter_that_cannot_play_is_told_at_once_and_the_others_stay(
    page: Page, adapter: Callable[..., dict[str, Any]], name: str, content: bytes, told: str
):
    rows = [{"file": adapter()["path"], "strength": 0.5, "name": "warm", "message": ""}]
    given = [adapter(name, content)]
    *_, refused = page.press("generate-adapters-file", given, rows, does="upload")
    seen = refused["generate-adapters"]
    assert (seen["state"], seen["value"]) == ("refused", rows)
    assert told in seen["message"]
    assert str(Path(given[0]["path"]).parent) not in seen["message"]


def test_only_an_adapter_that_was_uploaded_here_is_read(page: Page, toasts: list[str]):
    page.generate(adapters=[{"file": "/etc/passwd", "strength": 1}])
    assert toasts[0].startswith("passwd was not uploaded to this page.")
    *_, refused = page.press("generate-adapters-file", [{"path": "/etc/passwd"}], [], does="upload")
    assert "was not uploaded to this page" in refused["generate-adapters"]["message"]
    assert not page.studio.asked


def test_a_take_names_its_adapters_and_gives_them_back(
    page: Page, adapter: Callable[..., dict[str, Any]]
):
    rows = [{"file": adapter()["path"], "strength": 0.8}]
    last = page.generate(adapters=rows)[-1]
    assert "warm.safetensors at 0.8 (rank 8, 48 layers, sha256 efef" in last["generate-facts"]
    assert rows[0]["file"] not in str({**last, "generate-json": 0})
    ((caption, _),) = last["generate-shelf"]["choices"]
    assert "Adapters warm.safetensors 0.8" in caption
    (update,) = page.press("generate-reuse", page.studio.takes("one")[0].id)
    (row,) = update["generate-adapters"]["value"]
    assert (row["name"], row["strength"]) == ("warm.safetensors", 0.8)
    assert page.ask("generate", prompt="x", adapters=[row]).adapters[0].strength == 0.8
    page.generate()
    (update,) = page.press("generate-reuse", page.studio.takes("one")[0].id)
    assert update["generate-adapters"]["value"] == []


def test_a_take_goes_to_another_tab_with_its_words(page: Page, upload_folder: Path):
    page.generate(lyrics="la la", duration_s=10)
    take = page.studio.takes("one")[0]
    values = page.form("edit", prompt="mine").values()
    first, then = page.press("generate-to-edit", take.id, *values)
    assert first["studio"]["selected"] == "edit"
    assert first["edit-source-look"]["state"] == "reading"
    assert then["edit-source"]["value" if isinstance(then["edit-source"], dict) else 0]
    assert then["edit-source-look"]["state"] == "ready"
    assert page.studio.looked[0].is_relative_to(upload_folder), "served by this page"
    filled = plain("edit", then)
    assert (filled["lyrics"], filled["source_prompt"]) == ("la la", "a waltz")
    assert filled["source_lyrics"] == "la la"
    assert "prompt" not in filled, "what a person wrote stays"
    *_, cover = page.press("generate-to-cover", take.id, *page.form("cover").values())
    assert plain("cover", cover)["prompt"] == "a waltz"
    assert cover["cover-strength"]["visible"]


def test_an_instrumental_stays_one_on_another_tab(page: Page):
    page.generate(instrumental=True, duration_s=10)
    take = page.studio.takes("one")[0]
    *_, then = page.press("generate-to-extend", take.id, *page.form("extend").values())
    assert plain("extend", then)["instrumental"] is True
    assert then["extend-lyrics"]["visible"] is False


def test_an_edit_says_what_it_kept_and_what_was_heard_and_no_path(
    page: Page, brought: Callable[..., dict[str, Any]]
):
    last = page.make("edit", source=brought("my tune.wav"), region=[3.4, 6.7], lyrics="la")[-1]
    told = re.sub(r"<[^>]+>", "|", last["edit-facts"])
    for words_ in (
        "Outside the region||0 samples changed",
        "Seam at 3.4 s||good",
        "Seam at 6.7 s||audible",
        tooltips.DETECTED,
        "A bright waltz with a clarinet",
        "Source audio||my tune.wav",
        "From||3.4 s",
    ):
        assert words_ in told
    assert "Edit start" not in told, "what meant nothing is not told"
    assert "Planner guidance" not in told
    take = page.studio.takes("one")[0]
    assert str(Path(take.request["source"]).parent) not in str({**last, "edit-json": 0})
    ((caption, _),) = last["edit-shelf"]["choices"]
    assert caption.startswith("A bright waltz with a clarinet\n9 s · my tune.wav · From 3.4 s")


def test_settings_of_an_edit_go_back_with_file_and_region(
    page: Page, brought: Callable[..., dict[str, Any]]
):
    song = brought()
    page.make("edit", source=song, region=[1.5, 4.0], prompt="brass")
    take = page.studio.takes("one")[0]
    (update,) = page.press("edit-reuse", take.id)
    filled = plain("edit", update)
    assert (filled["region"], filled["prompt"]) == ([1.5, 4.0], "brass")
    assert Path(filled["source"]).read_bytes() == Path(song["path"]).read_bytes()
    Path(song["path"]).unlink()
    (update,) = page.press("edit-reuse", take.id)
    assert update["edit-source-look"]["message"] == "tune.wav was not found."
    assert plain("edit", update)["prompt"] == "brass"


def test_a_surprise_fills_the_whole_form_anew(page: Page):
    page.studio.idea = IDEA.model_copy(update={"keyscale": ""})
    form = page.form(prompt="old", keyscale="C major", duration_s=20, vocal_language="de")
    first, *_, last = page.press("generate-inspire", "a train", *form.values())
    asked = page.studio.asked[0]
    assert (asked.mode, asked.idea, asked.vocal_language) == ("inspire", "a train", "de")
    assert first["generate-inspire"]["interactive"] is False
    assert last["generate-inspire"]["interactive"] is True
    filled = plain("generate", last)
    assert (filled["prompt"], filled["lyrics"], filled["bpm"]) == (IDEA.prompt, IDEA.lyrics, 84)
    assert (filled["keyscale"], filled["duration_s"]) == ("", 42)
    assert "Style, Lyrics, Tempo" in last["generate-status"]
    page.studio.idea = Idea(prompt="drone", lyrics="[Instrumental]", duration_s=600)
    *_, last = page.press("generate-inspire", "", *form.values())
    filled = plain("generate", last)
    assert (filled["instrumental"], filled["duration_s"]) == (True, 240)
    assert "lyrics" not in filled


def test_formatting_changes_the_words_and_nothing_a_person_set(page: Page, toasts: list[str]):
    form = page.form(prompt="old", lyrics="la", bpm="92")
    *_, last = page.press("generate-rewrite", *form.values())
    asked = page.studio.asked[0]
    assert (asked.mode, asked.prompt, asked.lyrics) == ("rewrite", "old", "la")
    filled = plain("generate", last)
    assert (filled["prompt"], filled["lyrics"]) == (IDEA.prompt, IDEA.lyrics)
    assert "bpm" not in filled
    page.press("generate-rewrite", *page.form().values())
    assert toasts[0].startswith("The style is empty.")


@pytest.mark.parametrize("kind", ["repaint", "morph"])
def test_listening_fills_what_was_left_open(
    page: Page, brought: Callable[..., dict[str, Any]], kind: str, toasts: list[str]
):
    form = page.form("edit", source=brought(), region=[1, 2], kind=kind, bpm="92", lyrics="mine")
    *_, last = page.press("edit-listen", True, *form.values())
    asked = page.studio.asked[0]
    assert (asked.mode, asked.source.name, asked.transcribe) == ("listen", "tune.wav", True)
    filled = plain("edit", last)
    assert filled["keyscale"] == "D minor"
    assert filled["source_prompt"] == IDEA.prompt
    assert ("prompt" in filled) is (kind == "repaint")
    assert not filled.keys() & {"bpm", "lyrics"}
    page.press("edit-listen", True, *page.form("edit").values())
    assert toasts == ["No file was chosen for Source audio. Choose an audio file."]


def test_a_helper_can_be_stopped_and_can_fail(page: Page, toasts: list[str]):
    *_, last = page.press("generate-inspire", "fail", *page.form().values())
    assert "There was not enough memory" in last["generate-status"]
    running = page.event("generate-inspire").fn(caller(), "slow", *page.form().values())
    next(running), next(running)
    page.press("generate-stop")
    *_, last = running
    assert tooltips.CANCELLED in str(last)
    assert not plain(
        "generate", {getattr(b, "elem_id", None) or "": v for b, v in last.items()}
    ) & (KNOBS.keys())


def test_without_a_planner_the_page_says_why_and_offers_nothing(tmp_path: Path):
    why = "The planner (0.4 GB) is not on this computer; run: python app.py fetch --planner"
    page = Page(FakeStudio(CARD.model_copy(update={"planner": "", "no_planner": why}), tmp_path))
    planner = [k for k in Generate.params() if k.group == PLANNER]
    assert len(planner) == 9
    for mode in MODES:
        assert not any(page.blocks[f"{mode}-{k.name}"].interactive for k in planner)
        said = [b.value for b in page.demo.blocks.values() if "why" in (b.elem_classes or [])]
        assert len(said) == len(MODES)
        assert all(why in told for told in said)
    for button in ("generate-inspire", "generate-rewrite", "cover-listen", "edit-listen"):
        assert page.blocks[button].interactive is False
    assert page.blocks["generate-idea"].info == why
    page.generate()
    assert page.studio.asked[0].thinking is None
    first, *_, last = page.generate()
    assert "generate-inspire" not in first.keys() | last.keys(), "not even when a song is done"


def test_where_the_planner_listens_there_is_nothing_to_guide(page: Page):
    for mode in MODES:
        for name in COMPOSING:
            block = page.blocks[f"{mode}-{name}"]
            assert block.interactive is (mode == "generate")
            assert (block.info == tooltips.NOT_WHILE_ANALYSING) is (mode != "generate")


def plain(mode: str, update: dict[str, Any]) -> dict[str, Any]:
    """The values among an update of a form's fields, by knob."""
    values = {}
    for elem_id, new in update.items():
        is_props = isinstance(new, dict) and "__type__" in new
        if elem_id and elem_id.startswith(f"{mode}-") and (not is_props or "value" in new):
            name = elem_id.removeprefix(f"{mode}-").replace("source-look", "region")
            values[name] = new["value"] if is_props else new
    return {n: v for n, v in values.items() if not n.endswith("-look")}


@pytest.mark.parametrize(
    ("changes", "choices"),
    [
        ({"steps": 27}, {"Draft (16 steps)": 16, "Standard (27 steps)": 27, "Best (50 steps)": 50}),
        ({"steps": 16}, {"Standard (16 steps)": 16, "Best (50 steps)": 50}),
        ({"steps": 8, "takes_guidance": False, "guidance": 1.0}, None),
    ],
)
def test_quality_offers_the_step_counts_that_suit_the_model(
    tmp_path: Path, changes: dict[str, Any], choices: dict[str, int] | None
):
    page = Page(FakeStudio(CARD.model_copy(update=changes), tmp_path))
    for mode in MODES:
        quality = page.blocks.get(f"{mode}-quality")
        assert (quality and dict(quality.choices)) == choices
        assert quality is None or quality.value == changes["steps"]
        assert "quality" not in page.inputs(mode), "it only sets Steps"


def resume(page: Page, load: str, kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a page load changes, by elem_id, when the browser has kept `kept`."""
    (update,) = page.press("doors", {"session": kept or {}}, by=load, does_event="resume")
    return update


def test_a_reloaded_page_gets_its_forms_and_takes_back(
    page: Page, brought: Callable[..., dict[str, Any]]
):
    token = resume(page, "old")["doors"]["token"]
    page.generate(by="old", prompt="a waltz")
    page.event_named("unload").fn(caller("old"))
    assert page.studio.stopped == ["old"]
    assert not page.studio.left, "the takes are kept for a while"

    song = brought()
    forms = {
        "generate": {"lyrics": "my own words", "bpm": "92", "keyscale": "A minor", "idea": "rain"},
        "edit": {"source": song, "region": [1.5, 4], "kind": "morph"},
        "lyrics": {"brief": "a train", "draft": "[Verse]\nsteam"},
    }
    update = resume(page, "new", {"token": token, "forms": forms})
    assert update["doors"]["token"] == token
    assert plain("generate", update)["lyrics"] == "my own words"
    assert (update["generate-bpm"], update["generate-idea"]) == ("92", "rain")
    assert update["edit-source-look"]["value"] == [1.5, 4]
    assert update["edit-n_max"]["visible"] is True
    assert update["lyrics-draft"] == "[Verse]\nsteam"
    ((caption, _),) = update["generate-shelf"]["choices"]
    assert caption.startswith("a waltz")
    page.press("generate-again", page.studio.takes("old")[0].id, by="new")
    assert len(page.studio.takes("old")) == 2, "the reloaded page is the same visitor"


@pytest.mark.parametrize(
    "kept",
    [
        {"token": "guessed"},
        {"token": 7, "forms": []},
        {"forms": {"generate": {"lyrics": 7, "bpm": [], "infer_method": "magic", "shift": 99}}},
        {"forms": {"cover": {"source": {"path": "/etc/passwd"}, "strength": True}}},
        {
            "forms": {
                "cover": {"source": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}
            }
        },
        {"forms": {"edit": {"region": ["a"], "adapters": [7], "prompt": "x" * 9999}}},
    ],
)
def test_what_a_browser_kept_is_checked(page: Page, kept: dict[str, Any]):
    page.generate(by="one")
    update = resume(page, "two", kept)
    changed = {name for name in update if name != "doors"}
    assert not changed, "nothing of it is usable, and the takes of others stay hidden"


def test_takes_of_closed_pages_are_deleted_in_the_end(page: Page, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sessions, "KEEP_S", 0)
    resume(page, "gone")
    page.generate(by="gone")
    page.event_named("unload").fn(caller("gone"))
    wait_for(lambda: page.studio.left == ["gone"])


def test_only_so_many_closed_pages_keep_their_takes(page: Page, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sessions, "MAX_KEPT", 2)
    for name in ("a", "b", "c"):
        resume(page, name)
        page.generate(by=name)
        page.event_named("unload").fn(caller(name))
    assert page.studio.left == ["a"]


def test_a_second_page_of_the_same_visitor_keeps_it(page: Page):
    token = resume(page, "here")["doors"]["token"]
    page.generate(by="here")
    resume(page, "there", {"token": token})
    page.event_named("unload").fn(caller("here"))
    assert not page.studio.stopped
    assert not page.studio.left


def test_the_form_starts_at_what_suits_the_model(page: Page):
    form = page.form()
    assert (form["inference_steps"], form["guidance_scale"], form["shift"]) == (12, 4.0, 1.0)
    page.generate()
    asked = page.studio.asked[0]
    assert (asked.inference_steps, asked.guidance_scale, asked.shift) == (12, 4.0, 1.0)
    assert asked.seed is None
    assert asked.bpm is None


def test_a_widget_says_what_its_knob_declares(page: Page):
    for name, param in KNOBS.items():
        block = page.blocks[f"generate-{name}"]
        label = page.blocks[f"generate-{name}-file"] if param.type is AdapterRef else block
        assert label.label == tooltips.label(param)
        if param.type in (Path, AdapterRef):
            continue
        assert tooltips.description("generate", param) in block.info
        if isinstance(block, gr.Slider):
            assert (block.minimum, block.maximum, block.step) == (param.low, param.high, param.step)
        if isinstance(block, (gr.Dropdown, gr.Radio)) and param.choices:
            assert {value for _, value in block.choices} == set(param.choices)


def test_a_model_with_a_shorter_longest_song_shortens_the_slider(tmp_path: Path):
    page = Page(FakeStudio(CARD.model_copy(update={"longest_s": 120.0}), tmp_path))
    assert page.blocks["generate-duration_s"].maximum == 120


def test_guidance_is_disabled_with_the_reason_where_it_steers_nothing(tmp_path: Path):
    deaf = CARD.model_copy(update={"takes_guidance": False, "guidance": 1.0})
    page = Page(FakeStudio(deaf, tmp_path))
    for name in GUIDANCE:
        block = page.blocks[f"generate-{name}"]
        assert not block.interactive
        assert block.info == tooltips.NO_GUIDANCE.format(model=deaf.title)
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


def test_the_status_counts_steps_and_time_and_the_reader_hears_stages_only(
    page: Page, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job_controls, "REFRESH_S", 0)
    updates = page.generate()
    status = [u["generate-status"] for u in updates if "generate-status" in u]
    assert any("step 3 of 20" in s and "about 3 to 8 s left" in s for s in status)
    assert tooltips.MEASURING in status[1]
    said = [u["generate-said"] for u in updates if "generate-said" in u]
    assert said[:4] == [
        tooltips.STARTING,
        tooltips.stage_label("Loading"),
        tooltips.stage_label("Denoising"),
        tooltips.stage_label("Decoding"),
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
    assert caption == "a waltz\n30 s · Sampler SDE · Tempo 92 bpm · seed 5"
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
        ({"duration_s": 999}, "Length must be a number from 5 to 240 s, not 999."),
        ({"bpm": "fast"}, "Tempo must be a whole number from 30 to 300 bpm"),
        ({"bpm": "92.5"}, "Tempo must be a whole number"),
        ({"seed": "-2"}, "Seed must be a whole number from 0"),
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
    page: Page, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: Any) -> Iterator[Any]:
        raise OSError("/secret/path")
        yield

    monkeypatch.setattr(page.studio, "run", broken)
    last = page.generate()[-1]
    assert "An unexpected error occurred (OSError)." in last["generate-status"]
    assert "secret" not in str(last)
    assert last["generate-run"]["interactive"] is True
    assert "/secret/path" in caplog.text, "the log has the traceback"


def test_stop_tells_the_studio_and_the_run_ends_as_stopped(page: Page):
    running = page.event("generate-run").fn(caller(), *page.form(prompt="slow").values())
    next(running), next(running)
    (stopping,) = page.press("generate-stop")
    assert stopping["interactive"] is False
    assert page.studio.stopped == ["one"]
    (last,) = list(running)[-1:]
    told = {block.elem_id: value for block, value in last.items()}
    assert tooltips.CANCELLED in told["generate-status"]
    assert told["generate-run"]["interactive"] is True


def test_a_closed_tab_closes_the_job_and_leaves(page: Page):
    running = page.event("generate-run").fn(caller(), *page.form(prompt="slow").values())
    next(running), next(running)
    running.close()
    assert page.studio.closed == 1
    (leave,) = (f for f in page.demo.fns.values() if any(t[1] == "unload" for t in f.targets))
    leave.fn(caller())
    assert page.studio.left == ["one"]


def test_the_page_brings_no_torch_in_and_gradio_reports_nothing_to_anyone():
    code = (
        "import web.page, sys, gradio.analytics as a;"
        "sys.exit('torch' in sys.modules or a.analytics_enabled())"
    )
    env = {"PATH": "/usr/bin", "GRADIO_ANALYTICS_ENABLED": "True"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0


def test_words_are_read_while_they_are_written_then_mended_and_sung(
    page: Page, monkeypatch: pytest.MonkeyPatch, toasts: list[str]
):
    monkeypatch.setattr(job_controls, "REFRESH_S", 0)
    form = page.form("lyrics", brief="rain", lines=3, seed="7")
    updates = page.press("lyrics-run", *form.values())
    asked = page.studio.asked[-1]
    assert (asked.brief, asked.lines, asked.seed, asked.repair) == ("rain", 3, 7, "")
    read = [u["lyrics-draft"] for u in updates if "lyrics-draft" in u]
    assert len(read) > 5
    assert all(later.startswith(sooner) for sooner, later in pairwise(read))
    last = updates[-1]
    assert "1 of 2 sections, not as requested" in last["lyrics-status"]
    assert re.search("Requested.*Verse, Chorus.*Written.*Verse", last["lyrics-facts"])
    assert last["lyrics-repair"]["interactive"] is True

    *_, mended = page.press("lyrics-repair", read[-1], *form.values())
    assert page.studio.asked[-1].repair == read[-1]
    assert "2 of 2 sections, as requested" in mended["lyrics-status"]
    assert mended["lyrics-repair"]["interactive"] is False

    use = page.event("lyrics-use").fn(mended["lyrics-draft"], "de")
    sung = {block.elem_id: value for block, value in use.items()}
    assert sung["studio"]["selected"] == "generate"
    assert sung["generate-lyrics"]["value"] == mended["lyrics-draft"]
    assert (sung["generate-vocal_language"], sung["generate-instrumental"]) == ("de", False)
    *_, failed = page.press("lyrics-run", *page.form("lyrics").values())
    assert "The brief is empty." in failed["lyrics-status"]
    assert "lyrics-result" not in failed, "no empty draft is shown"


def test_without_a_songwriter_the_tab_says_how_to_get_one(tmp_path: Path):
    why = "Qwen 2.5 7B (15 GB) is not on this computer. Go online and run: python app.py fetch"
    page = Page(FakeStudio(CARD.model_copy(update={"no_writer": why}), tmp_path))
    assert page.blocks["lyrics-run"].interactive is False
    said = [b.value for b in page.demo.blocks.values() if "missing" in (b.elem_classes or [])]
    assert said == [f"<p>{why}</p>"]
    assert page.blocks["generate-run"].interactive is True


# ---- the API, over the wire ----


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeStudio, str]]:
    patch = pytest.MonkeyPatch()
    patch.setenv("NO_PROXY", "127.0.0.1,localhost")
    patch.setenv("no_proxy", "127.0.0.1,localhost")
    studio = FakeStudio(folder=tmp_path_factory.mktemp("takes"))
    studio.demo = demo = build(studio)
    options = {**launch_options(), "allowed_paths": [str(studio.folder)]}
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
    named = [*MODES, *HELPERS, *EXPORTS, "lyrics"]
    assert set(told["named_endpoints"]) == {f"/{mode}" for mode in named}
    assert not told["unnamed_endpoints"]


def test_the_api_speaks_in_the_requests_own_names_types_and_defaults(client: Client):
    told = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/generate"]
    assert [p["parameter_name"] for p in told["parameters"]] == list(KNOBS)
    for parameter in told["parameters"]:
        param = KNOBS[parameter["parameter_name"]]
        assert parameter["parameter_has_default"] is not param.required
        default = list(param.default) if param.type is AdapterRef else param.default
        assert parameter["parameter_default"] == default
        assert tooltips.help_text("generate", param) in parameter["python_type"]["description"]
        if param.choices:
            assert parameter["type"]["enum"] == list(param.choices)
    assert told["description"].startswith("A new song from a style and lyrics")


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


def test_songs_and_helpers_by_api_take_files_that_were_uploaded(
    served: Any, client: Client, tmp_path: Path
):
    studio, _ = served
    write_tone(tmp_path / "my tune.wav", 9 * 48_000, 330)
    song = handle_file(tmp_path / "my tune.wav")
    sound, take = client.predict(source=song, prompt="brass", strength=0.5, api_name="/cover")
    assert Path(sound).read_bytes()[:4] == b"RIFF"
    assert (take["request"]["source"], take["request"]["strength"]) == ("my tune.wav", 0.5)
    assert studio.asked[-1].source.read_bytes() == (tmp_path / "my tune.wav").read_bytes()
    assert client.predict(source=song, api_name="/listen")["bpm"] == 84
    assert client.predict(brief="rain", api_name="/lyrics")["got"] == ["Verse"]
    assert client.predict(idea="a train", api_name="/inspire")["prompt"] == IDEA.prompt
    told = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    for name in ("source", "reference"):
        (box,) = (p for p in told["/cover"]["parameters"] if p["parameter_name"] == name)
        meta = box["type"]["properties"]["meta"]["properties"]["_type"]
        assert meta == {"const": "gradio.FileData"}, "what makes it a file to an MCP client"


def test_adapters_by_api_are_files_that_were_uploaded(served: Any, client: Client, tmp_path: Path):
    studio, _ = served
    (tmp_path / "warm.safetensors").write_bytes(b"12345678{}")
    file = handle_file(tmp_path / "warm.safetensors")
    _, take = client.predict(
        prompt="x",
        duration_s=10,
        adapters=[{"file": file, "strength": 0.4}, file],
        api_name="/generate",
    )
    asked = studio.asked[-1].adapters
    assert [(w.file.name, w.strength) for w in asked] == [
        ("warm.safetensors", 0.4),
        ("warm.safetensors", 1),
    ]
    assert take["request"]["adapters"][0]["file"] == "warm.safetensors"
    body = {"prompt": "x", "adapters": [{"file": {"path": "/etc/passwd", **MARKED}}]}
    called = httpx.post(f"{served[1]}gradio_api/call/v2/generate", json=body)
    address = f"{served[1]}gradio_api/call/generate/{called.json().get('event_id')}"
    told = httpx.get(address, timeout=30).text
    assert re.search("not uploaded|Cannot move|error", told), told
    assert studio.asked[-1].adapters == asked


MARKED = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "given",
    [
        "/etc/passwd",
        {"path": "/etc/passwd"},
        {"path": "/etc/passwd", **MARKED},
        {"path": "{folder}/../../../../../../etc/passwd", **MARKED},
        {"path": "/etc/passwd", "url": "/gradio_api/file=/etc/passwd", **MARKED},
    ],
)
@pytest.mark.parametrize("way", ["api", "page-run", "page-look"])
def test_a_path_on_the_server_is_never_read(served: Any, given: Any, way: str):
    studio, url = served
    if isinstance(given, dict):
        folder = os.environ["GRADIO_TEMP_DIR"]
        given = {**given, "path": given["path"].replace("{folder}", folder)}
    already = len(studio.asked), len(studio.looked)
    if way == "api":
        called = httpx.post(f"{url}gradio_api/call/v2/extend", json={"source": given})
        address = f"{url}gradio_api/call/extend/{called.json()['event_id']}"
    else:
        elem_id, does = (
            ("extend-run", "click") if way == "page-run" else ("extend-source", "upload")
        )
        blocks = {b.elem_id: b for b in studio.demo.blocks.values() if getattr(b, "elem_id", None)}
        (event,) = (
            f for f in studio.demo.fns.values() if f.fn and (blocks[elem_id]._id, does) in f.targets
        )
        data = [given if b.elem_id == "extend-source" else b.value for b in event.inputs]
        body = {"data": data, "fn_index": event._id, "session_hash": f"thief-{time.time()}"}
        assert httpx.post(f"{url}gradio_api/queue/join", json=body).status_code == 200
        address = f"{url}gradio_api/queue/data?session_hash={body['session_hash']}"
    told = httpx.get(address, timeout=30).text
    assert re.search("not uploaded|Cannot move|error", told), told
    assert "root:" not in told
    assert (len(studio.asked), len(studio.looked)) == already


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": ""}, "The style is empty. Describe the music"),
        ({"duration_s": 4}, "Length must be a number from 5 to 240 s, not 4. Set Length"),
        ({"duration_s": "NaN"}, "Length must be a number from 5 to 240 s"),
        ({"seed": 1.5}, "Seed must be a whole number"),
        ({"keyscale": "H minor"}, "Key cannot be 'H minor'. Choose one of"),
        ({"inference_steps": True}, "Steps must be a whole number from 1 to 200, not True."),
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
        assert "Length must be a number from 5 to 240 s" in told
    else:
        assert called.status_code == 422
    assert "Traceback" not in called.text


@pytest.mark.parametrize(
    ("given", "code"), [({"prompt": "x", "tempo": 3}, "unknown-field"), ({}, "prompt-empty")]
)
def test_a_wrong_name_by_plain_http_is_named(served: Any, given: dict[str, Any], code: str):
    called = httpx.post(f"{served[1]}gradio_api/call/v2/generate", json=given)
    assert called.status_code == 422
    answer = called.json()
    assert answer["code"] == code
    assert answer["error"] == f"{answer['message']} {answer['action']}"


def test_api_error_carries_code_message_and_action_as_data(served: Any, client: Client):
    with pytest.raises(AppError) as caught:
        client.predict(prompt="a waltz", duration_s=4, api_name="/generate")
    data = json.loads(caught.value.title)
    assert data["code"] == "value-out-of-range"
    assert data["message"] == "Length must be a number from 5 to 240 s, not 4."
    assert data["action"].startswith("Set Length to")
    assert caught.value.message == f"{data['message']} {data['action']}"

    body = {"prompt": "a waltz", "duration_s": 4}
    called = httpx.post(f"{served[1]}gradio_api/call/v2/generate", json=body).json()
    stream = httpx.get(f"{served[1]}gradio_api/call/generate/{called['event_id']}").text
    event = json.loads(stream.partition("event: error\ndata: ")[2])
    assert {name: event[name] for name in data} == data
    assert (event["error"], event["title"]) == (caught.value.message, tooltips.FAILED)


@pytest.mark.parametrize("mode", ["generate", "master", "lyrics"])
def test_api_call_with_too_few_values_says_how_many(
    served: Any, mode: str, caplog: pytest.LogCaptureFixture
):
    called = httpx.post(f"{served[1]}gradio_api/call/{mode}", json={"data": []}).json()
    stream = httpx.get(f"{served[1]}gradio_api/call/{mode}/{called['event_id']}").text
    event = json.loads(stream.partition("event: error\ndata: ")[2])
    needed = len(REQUESTS[mode].params())
    assert event["message"] == f"/{mode} takes {needed} values, and 0 were sent."
    assert event["action"].endswith(f"by name to /call/v2/{mode}.")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "chunk",
    [
        b"",
        b"event: complete\ndata: [1]\n\n",
        b"event: error\ndata: null\n\n",
        b'event: error\ndata: {"error": null}\n\n',
        b'event: error\ndata: {"error": "x", "title": "Error"}\n\n',
        b'event: error\ndata: {"error": "x", "title": "[1]"}\n\n',
    ],
)
def test_other_events_pass_unchanged(chunk: bytes):
    assert unpack_error(chunk) == chunk


def test_an_api_call_given_up_is_stopped(served: Any, client: Client):
    studio, _ = served
    before = len(studio.left)
    job = client.submit(prompt="slow", api_name="/generate")
    wait_for(lambda: len(job.outputs()) >= 2)
    job.cancel()
    wait_for(lambda: len(studio.left) > before)
