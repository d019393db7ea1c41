"""The page and its API against a fake studio: requests sent, results shown."""

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
from core.requests import EXPORTS, HELPERS, MODES, TRACK_EDITS, Generate
from core.results import Idea
from web import job_controls, lyrics_tab, sessions
from web.api import REQUESTS, unpack_error
from web.form import REGION
from web.page import build, launch_options
from web.widgets import COMPOSING, GUIDANCE, starting_value

PARAMS = {k.name: k for k in Generate.params()}
SOURCE_MODES = tuple(mode for mode in MODES if mode != "generate")


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
    """The page as first opened. Building it takes a second, so all tests share one."""
    built.studio.reset()
    return built


@pytest.fixture
def upload(upload_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Upload a tone; the result is its file data as the browser sends it."""

    def upload_file(name: str = "tune.wav", seconds: float = 9) -> dict[str, Any]:
        path = upload_folder / tmp_path.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tone(path, round(seconds * 48_000), 330)
        return {
            "path": str(path),
            "orig_name": name,
            "url": f"/gradio_api/file={path}",
            "meta": {"_type": "gradio.FileData"},
        }

    return upload_file


@pytest.fixture(autouse=True)
def toasts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: messages.append(text))
    return messages


def wait_for(done: Callable[[], bool], timeout_s: float = 10) -> None:
    until = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.02)


def another(param: Param) -> Any:
    """A value of the parameter other than the form's initial one."""
    if param.name == "instrumental":
        return True
    if param.type is bool:
        return not param.default
    if param.choices:
        return next(c for c in reversed(param.choices) if c != param.default)
    if param.type is str:
        return "bass" if param.name == "tracks" else "something else"
    assert param.type is not AdapterRef, "adapter rows come from uploads"
    if starting_value(param, CARD) is None:
        return str(int(param.low) + 5)  # a number box sends text
    return {"cfg_interval_end": 0.5}.get(param.name, param.low + param.step)


ALSO = {("edit", "kind"): {"start_s", "end_s"}}
"""Further fields that change with one: a morph sends no region."""


@pytest.mark.parametrize("mode", MODES)
def test_form_has_a_widget_for_every_parameter(page: Page, mode: str):
    params = {k.name: k for k in MODES[mode].params()}
    present = {name for name in params if f"{mode}-{name}" in page.blocks}
    assert params.keys() - present == set(REGION) & params.keys()
    disabled = set(COMPOSING) if mode in SOURCE_MODES else set()
    expected = [name for name in params if name in present - disabled]
    assert list(page.inputs(mode)) == [*expected, *(["region"] if mode == "edit" else [])]


@pytest.mark.parametrize("mode", MODES)
def test_changing_a_widget_changes_only_its_request_field(
    page: Page, mode: str, upload: Callable[..., dict[str, Any]]
):
    song = upload()
    for param in MODES[mode].params():
        base: dict[str, Any] = {"prompt": "a waltz"}
        base |= {"source": song} if mode in SOURCE_MODES else {}
        base |= {"region": [1.0, 2.0]} if mode == "edit" else {}
        base |= {"kind": "morph"} if param.name.startswith(("n_", "source_")) else {}
        kinds = {"track": "extract", "tracks": "accompany"}
        base |= {"kind": kinds[param.name]} if param.name in kinds else {}
        if mode == "cover" and param.name == "duration_s":
            base |= {"source": None, "reference": song}
        change = {param.name: another(param)} if param.type not in (Path, AdapterRef) else {}
        if param.type is Path:
            change = {param.name: upload("other.wav")}
        elif param.type is AdapterRef:
            change = {param.name: [{"file": upload("warm.safetensors")["path"], "strength": 0.5}]}
        elif param.name in REGION:
            change = {"region": [1.5, 2.0] if param.name == "start_s" else [1.0, 2.5]}
        elif param.name in COMPOSING and mode in SOURCE_MODES:
            continue
        before = page.submit(mode, **base).model_dump()
        after = page.submit(mode, **{**base, **change}).model_dump()
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {param.name} | ALSO.get((mode, param.name), set())


def test_hidden_fields_are_sent_with_their_defaults(
    page: Page, upload: Callable[..., dict[str, Any]]
):
    song, values = upload(), {"strength": 0.3, "noise": 0.4, "duration_s": 77}
    covered = page.submit("cover", source=song, **values)
    assert (covered.strength, covered.noise, covered.duration_s) == (0.3, 0.4, 30)
    reference_only = page.submit("cover", reference=song, **values)
    assert (reference_only.strength, reference_only.noise, reference_only.duration_s) == (1, 0, 77)
    values = {"source_prompt": "old", "n_max": 0.5, "repaint_strength": 0.9, "region": [1, 2]}
    repainted = page.submit("edit", source=song, **values)
    assert (repainted.source_prompt, repainted.n_max, repainted.start_s) == ("", 1, 1)
    assert (
        page.submit("edit", source=song, repaint_mode="aggressive", **values).repaint_strength
        == 0.5
    )
    morphed = page.submit("edit", source=song, kind="morph", prompt="brass", **values)
    assert (morphed.source_prompt, morphed.n_max, morphed.start_s) == ("old", 0.5, 0)
    assert (morphed.end_s, morphed.repaint_strength) == (None, 0.5)


@pytest.mark.parametrize(
    ("mode", "controls", "shown", "hidden"),
    [
        ("cover", {}, [], ["strength", "noise", "duration_s"]),
        ("cover", {"reference": "x"}, ["duration_s"], ["strength", "noise"]),
        ("cover", {"source": "x", "reference": "x"}, ["strength", "noise"], ["duration_s"]),
        ("edit", {"kind": "repaint"}, ["repaint_mode", "repaint_strength"], ["n_max"]),
        ("edit", {"repaint_mode": "conservative"}, ["repaint_mode"], ["repaint_strength"]),
        ("edit", {"kind": "morph"}, ["n_max", "n_min", "n_avg", "source_prompt"], ["repaint_mode"]),
    ],
)
def test_controls_are_visible_only_where_they_apply(
    page: Page, mode: str, controls: dict[str, Any], shown: list[str], hidden: list[str]
):
    by = next(iter(controls), "instrumental")
    inputs = page.event(f"{mode}-{by}", "change").inputs
    initial = {b.elem_id.removeprefix(f"{mode}-"): b.value for b in inputs}
    (update,) = page.press(f"{mode}-{by}", *{**initial, **controls}.values(), does="change")
    assert all(update[f"{mode}-{name}"]["visible"] for name in shown)
    assert not any(update[f"{mode}-{name}"]["visible"] for name in hidden)
    if not controls:
        assert not any(page.blocks[f"{mode}-{name}"].visible for name in hidden)


@pytest.mark.parametrize("mode", SOURCE_MODES)
def test_run_without_source_reports_the_missing_file(page: Page, mode: str, toasts: list[str]):
    last = page.run_mode(mode)[-1]
    assert "No file was chosen for Source audio. Choose an audio file." in toasts
    assert "No file was chosen for Source audio." in last[f"{mode}-status"]
    assert last[f"{mode}-run"]["interactive"] is True
    assert not page.studio.requests


def test_repaint_before_the_preview_is_ready_reports_still_reading(
    page: Page, upload: Callable[..., dict[str, Any]], toasts: list[str]
):
    page.run_mode("edit", source=upload())
    assert toasts[0].startswith("tune.wav is still being read.")
    assert page.submit("edit", source=upload(), kind="morph", prompt="brass").kind == "morph"


def test_uploaded_source_is_previewed_at_once(page: Page, upload: Callable[..., dict[str, Any]]):
    song = upload("my tune.wav", seconds=9)
    reading, ready = page.press("edit-source", song, does="upload")
    assert reading["edit-source-look"]["message"] == "Reading my tune.wav"
    preview = ready["edit-source-look"]
    assert (preview["state"], preview["seconds"], preview["message"]) == (
        "ready",
        9,
        "0:09.0 · 48 kHz · stereo",
    )
    assert preview["value"] == [3.0, 6.0]
    assert len(preview["peaks"]) == 1000
    assert preview["url"] == song["url"].lstrip("/")
    assert page.studio.inspected == [Path(song["path"])]
    (blank,) = page.press("edit-source", does="clear")
    assert (blank["state"], blank["value"], blank["peaks"]) == ("empty", None, [])
    *_, cover = page.press("cover-source", song, does="upload")
    assert cover["cover-source-look"]["value"] is None, "a cover has no region"


def test_upload_that_is_not_audio_is_rejected_and_cleared(
    page: Page, upload: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    notes = upload("notes.txt")
    Path(notes["path"]).write_text("dear diary")
    *_, refused = page.press("cover-source", notes, does="upload")
    assert refused["cover-source"] is None
    preview = refused["cover-source-look"]
    assert (preview["state"], preview["message"]) == (
        "refused",
        "notes.txt cannot be read as audio: it holds no sound.",
    )
    assert preview["notes"][0].startswith("Save it as WAV, FLAC or MP3")
    monkeypatch.setattr(page.studio, "inspect_audio", lambda _: 1 / 0)
    *_, broken = page.press("cover-source", upload(), does="upload")
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
def test_only_files_uploaded_to_this_page_are_read(
    page: Page, upload_folder: Path, given: Any, toasts: list[str]
):
    (upload_folder / "link").unlink(missing_ok=True)
    (upload_folder / "link").symlink_to("/etc/passwd")
    if isinstance(given, dict) and isinstance(given["path"], str):
        given = {**given, "path": given["path"].replace("{folder}", str(upload_folder))}
    last = page.run_mode("extend", source=given)[-1]
    assert re.search("was not uploaded to this page|was not found", toasts[0])
    assert "/etc" not in str(last) + toasts[0]
    *_, refused = page.press("extend-source", given, does="upload")
    assert refused["extend-source-look"]["state"] == "refused"
    assert not page.studio.requests
    assert not page.studio.inspected


def test_bare_path_of_an_uploaded_file_is_rejected(
    page: Page, upload: Callable[..., dict[str, Any]], toasts: list[str]
):
    page.run_mode("extend", source=upload()["path"])
    assert toasts[0].startswith("tune.wav was not uploaded to this page.")
    assert not page.studio.requests


@pytest.fixture
def adapter(upload: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Upload bytes named as an adapter; the fake studio reads no tensors from it."""

    def upload_adapter(
        name: str = "warm.safetensors", content: bytes = b"12345678{}"
    ) -> dict[str, Any]:
        file = upload(name, 0.01)
        Path(file["path"]).write_bytes(content)
        return file

    return upload_adapter


def test_adapters_are_checked_on_upload_and_requested_with_their_strengths(
    page: Page, adapter: Callable[..., dict[str, Any]]
):
    pair = [adapter("adapter_model.safetensors"), adapter("adapter_config.json", b"{}")]
    reading, first = page.press("generate-adapters-file", pair, None, does="upload")
    assert reading["generate-adapters"]["state"] == "reading"
    (row,) = first["generate-adapters"]["value"]
    assert (row["file"], row["config"]) == (pair[0]["path"], pair[1]["path"])
    assert (row["strength"], row["message"]) == (1, "rank 8 · 48 layers · 1.2 MB")
    assert first["generate-adapters-file"] is None, "more files can be added"
    two = [adapter("warm.safetensors"), adapter("cold.safetensors")]
    *_, second = page.press("generate-adapters-file", two, [row], does="upload")
    rows = second["generate-adapters"]["value"]
    names = ["adapter_model.safetensors", "warm.safetensors", "cold.safetensors"]
    assert [r["name"] for r in rows] == names
    assert len(second["generate-adapters"]["notes"]) == 2
    rows = [{**r, "strength": s} for r, s in zip(rows, (0.3, 0, 1.5), strict=True)]
    request = page.submit("generate", prompt="a waltz", adapters=rows)
    assert [(w.file.name, w.strength) for w in request.adapters] == list(
        zip(names, (0.3, 0, 1.5), strict=True)
    )
    assert request.adapters[0].config == Path(pair[1]["path"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("warm.pt", b"PK", "warm.pt cannot be read as an adapter: it is not a safetensors file."),
        ("wide.safetensors", b"12345678{}", "this model has 256. Choose an adapter"),
        ("adapter_config.json", b"{}", "together with its adapter file"),
    ],
)
def test_invalid_adapter_is_rejected_on_upload_and_others_stay(
    page: Page, adapter: Callable[..., dict[str, Any]], name: str, content: bytes, message: str
):
    rows = [{"file": adapter()["path"], "strength": 0.5, "name": "warm", "message": ""}]
    given = [adapter(name, content)]
    *_, refused = page.press("generate-adapters-file", given, rows, does="upload")
    picker = refused["generate-adapters"]
    assert (picker["state"], picker["value"]) == ("refused", rows)
    assert message in picker["message"]
    assert str(Path(given[0]["path"]).parent) not in picker["message"]


def test_only_adapters_uploaded_to_this_page_are_read(page: Page, toasts: list[str]):
    page.generate(adapters=[{"file": "/etc/passwd", "strength": 1}])
    assert toasts[0].startswith("passwd was not uploaded to this page.")
    *_, refused = page.press("generate-adapters-file", [{"path": "/etc/passwd"}], [], does="upload")
    assert "was not uploaded to this page" in refused["generate-adapters"]["message"]
    assert not page.studio.requests


def test_take_lists_its_adapters_and_reuse_restores_them(
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
    assert page.submit("generate", prompt="x", adapters=[row]).adapters[0].strength == 0.8
    page.generate()
    (update,) = page.press("generate-reuse", page.studio.takes("one")[0].id)
    assert update["generate-adapters"]["value"] == []


def test_take_is_sent_to_another_tab_with_prompt_and_lyrics(page: Page, upload_folder: Path):
    page.generate(lyrics="la la", duration_s=10)
    take = page.studio.takes("one")[0]
    values = page.form("edit", prompt="mine").values()
    first, ready = page.press("generate-to-edit", take.id, *values)
    assert first["studio"]["selected"] == "edit"
    assert first["edit-source-look"]["state"] == "reading"
    assert ready["edit-source"]["value" if isinstance(ready["edit-source"], dict) else 0]
    assert ready["edit-source-look"]["state"] == "ready"
    assert page.studio.inspected[0].is_relative_to(upload_folder), (
        "copied to where this page serves files"
    )
    filled = field_values("edit", ready)
    assert (filled["lyrics"], filled["source_prompt"]) == ("la la", "a waltz")
    assert filled["source_lyrics"] == "la la"
    assert "prompt" not in filled, "a prompt already entered stays"
    *_, cover = page.press("generate-to-cover", take.id, *page.form("cover").values())
    assert field_values("cover", cover)["prompt"] == "a waltz"
    assert cover["cover-strength"]["visible"]


def test_instrumental_take_stays_instrumental_on_another_tab(page: Page):
    page.generate(instrumental=True, duration_s=10)
    take = page.studio.takes("one")[0]
    *_, ready = page.press("generate-to-extend", take.id, *page.form("extend").values())
    assert field_values("extend", ready)["instrumental"] is True
    assert ready["extend-lyrics"]["visible"] is False


def test_edit_facts_show_kept_samples_and_detected_values_but_no_path(
    page: Page, upload: Callable[..., dict[str, Any]]
):
    last = page.run_mode("edit", source=upload("my tune.wav"), region=[3.4, 6.7], lyrics="la")[-1]
    text = re.sub(r"<[^>]+>", "|", last["edit-facts"])
    for part in (
        "Outside the region||0 samples changed",
        "Seam at 3.4 s||good",
        "Seam at 6.7 s||audible",
        tooltips.DETECTED,
        "A bright waltz with a clarinet",
        "Source audio||my tune.wav",
        "From||3.4 s",
    ):
        assert part in text
    assert "Edit start" not in text, "parameters without effect are not listed"
    assert "Planner guidance" not in text
    take = page.studio.takes("one")[0]
    assert str(Path(take.request["source"]).parent) not in str({**last, "edit-json": 0})
    ((caption, _),) = last["edit-shelf"]["choices"]
    assert caption.startswith("A bright waltz with a clarinet\n9 s · my tune.wav · From 3.4 s")


def test_reusing_an_edit_restores_file_and_region(
    page: Page, upload: Callable[..., dict[str, Any]]
):
    song = upload()
    page.run_mode("edit", source=song, region=[1.5, 4.0], prompt="brass")
    take = page.studio.takes("one")[0]
    (update,) = page.press("edit-reuse", take.id)
    filled = field_values("edit", update)
    assert (filled["region"], filled["prompt"]) == ([1.5, 4.0], "brass")
    assert Path(filled["source"]).read_bytes() == Path(song["path"]).read_bytes()
    Path(song["path"]).unlink()
    (update,) = page.press("edit-reuse", take.id)
    assert update["edit-source-look"]["message"] == "tune.wav was not found."
    assert field_values("edit", update)["prompt"] == "brass"


def test_inspire_replaces_the_whole_form(page: Page):
    page.studio.idea = IDEA.model_copy(update={"keyscale": ""})
    form = page.form(prompt="old", keyscale="C major", duration_s=20, vocal_language="de")
    first, *_, last = page.press("generate-inspire", "a train", *form.values())
    request = page.studio.requests[0]
    assert (request.mode, request.idea, request.vocal_language) == ("inspire", "a train", "de")
    assert first["generate-inspire"]["interactive"] is False
    assert last["generate-inspire"]["interactive"] is True
    filled = field_values("generate", last)
    assert (filled["prompt"], filled["lyrics"], filled["bpm"]) == (IDEA.prompt, IDEA.lyrics, 84)
    assert (filled["keyscale"], filled["duration_s"]) == ("", 42)
    assert "Style, Lyrics, Tempo" in last["generate-status"]
    page.studio.idea = Idea(prompt="drone", lyrics="[Instrumental]", duration_s=600)
    *_, last = page.press("generate-inspire", "", *form.values())
    filled = field_values("generate", last)
    assert (filled["instrumental"], filled["duration_s"]) == (True, 240)
    assert "lyrics" not in filled


def test_rewrite_changes_only_prompt_and_lyrics(page: Page, toasts: list[str]):
    form = page.form(prompt="old", lyrics="la", bpm="92")
    *_, last = page.press("generate-rewrite", *form.values())
    request = page.studio.requests[0]
    assert (request.mode, request.prompt, request.lyrics) == ("rewrite", "old", "la")
    filled = field_values("generate", last)
    assert (filled["prompt"], filled["lyrics"]) == (IDEA.prompt, IDEA.lyrics)
    assert "bpm" not in filled
    page.press("generate-rewrite", *page.form().values())
    assert toasts[0].startswith("The style is empty.")


@pytest.mark.parametrize("kind", ["repaint", "morph"])
def test_analysis_fills_only_empty_fields(
    page: Page, upload: Callable[..., dict[str, Any]], kind: str, toasts: list[str]
):
    form = page.form("edit", source=upload(), region=[1, 2], kind=kind, bpm="92", lyrics="mine")
    *_, last = page.press("edit-listen", True, *form.values())
    request = page.studio.requests[0]
    assert (request.mode, request.source.name, request.transcribe) == ("listen", "tune.wav", True)
    filled = field_values("edit", last)
    assert filled["keyscale"] == "D minor"
    assert filled["source_prompt"] == IDEA.prompt
    assert ("prompt" in filled) is (kind == "repaint")
    assert not filled.keys() & {"bpm", "lyrics"}
    page.press("edit-listen", True, *page.form("edit").values())
    assert toasts == ["No file was chosen for Source audio. Choose an audio file."]


def test_helper_reports_failure_and_can_be_stopped(page: Page, toasts: list[str]):
    *_, last = page.press("generate-inspire", "fail", *page.form().values())
    assert "There was not enough memory" in last["generate-status"]
    running = page.event("generate-inspire").fn(caller(), "slow", *page.form().values())
    next(running), next(running)
    page.press("generate-stop")
    *_, last = running
    assert tooltips.CANCELLED in str(last)
    assert not field_values(
        "generate", {getattr(b, "elem_id", None) or "": v for b, v in last.items()}
    ) & (PARAMS.keys())


def test_missing_planner_is_explained_and_its_controls_disabled(tmp_path: Path):
    reason = "The planner (0.4 GB) is not on this computer; run: python app.py fetch --planner"
    page = Page(FakeStudio(CARD.model_copy(update={"planner": "", "no_planner": reason}), tmp_path))
    planner = [k for k in Generate.params() if k.group == PLANNER]
    assert len(planner) == 9
    for mode in MODES:
        assert not any(page.blocks[f"{mode}-{k.name}"].interactive for k in planner)
        notes = [b.value for b in page.demo.blocks.values() if "why" in (b.elem_classes or [])]
        assert len(notes) == len(MODES)
        assert all(reason in note for note in notes)
    for button in ("generate-inspire", "generate-rewrite", "cover-listen", "edit-listen"):
        assert page.blocks[button].interactive is False
    assert page.blocks["generate-idea"].info == reason
    page.generate()
    assert page.studio.requests[0].thinking is None
    first, *_, last = page.generate()
    assert "generate-inspire" not in first.keys() | last.keys(), "not enabled after a song either"


def test_composing_controls_are_disabled_in_source_modes(page: Page):
    for mode in MODES:
        for name in COMPOSING:
            block = page.blocks[f"{mode}-{name}"]
            assert block.interactive is (mode == "generate")
            assert (block.info == tooltips.NOT_WHILE_ANALYSING) is (mode != "generate")


def field_values(mode: str, update: dict[str, Any]) -> dict[str, Any]:
    """Values of the form fields in an update, by field name."""
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
def test_quality_offers_step_counts_for_the_model(
    tmp_path: Path, changes: dict[str, Any], choices: dict[str, int] | None
):
    page = Page(FakeStudio(CARD.model_copy(update=changes), tmp_path))
    for mode in MODES:
        quality = page.blocks.get(f"{mode}-quality")
        assert (quality and dict(quality.choices)) == choices
        assert quality is None or quality.value == changes["steps"]
        assert "quality" not in page.inputs(mode), "it only sets Steps"


def resume(page: Page, load: str, stored: dict[str, Any] | None = None) -> dict[str, Any]:
    """Updates of a page load by elem_id, with `stored` in the browser's storage."""
    (update,) = page.press("doors", {"session": stored or {}}, by=load, does_event="resume")
    return update


def test_reloaded_page_restores_forms_and_takes(page: Page, upload: Callable[..., dict[str, Any]]):
    token = resume(page, "old")["doors"]["token"]
    page.generate(by="old", prompt="a waltz")
    page.event_named("unload").fn(caller("old"))
    assert page.studio.stopped == ["old"]
    assert not page.studio.left, "takes stay for the retention time"

    song = upload()
    forms = {
        "generate": {"lyrics": "my own words", "bpm": "92", "keyscale": "A minor", "idea": "rain"},
        "edit": {"source": song, "region": [1.5, 4], "kind": "morph"},
        "lyrics": {"brief": "a train", "draft": "[Verse]\nsteam"},
    }
    update = resume(page, "new", {"token": token, "forms": forms})
    assert update["doors"]["token"] == token
    assert field_values("generate", update)["lyrics"] == "my own words"
    assert (update["generate-bpm"], update["generate-idea"]) == ("92", "rain")
    assert update["edit-source-look"]["value"] == [1.5, 4]
    assert update["edit-n_max"]["visible"] is True
    assert update["lyrics-draft"] == "[Verse]\nsteam"
    ((caption, _),) = update["generate-shelf"]["choices"]
    assert caption.startswith("a waltz")
    page.press("generate-again", page.studio.takes("old")[0].id, by="new")
    assert len(page.studio.takes("old")) == 2, "the reloaded page is the same visitor"


@pytest.mark.parametrize(
    "stored",
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
def test_invalid_browser_storage_is_ignored(page: Page, stored: dict[str, Any]):
    page.generate(by="one")
    update = resume(page, "two", stored)
    changed = {name for name in update if name != "doors"}
    assert not changed, "invalid storage changes nothing and shows no other visitor's takes"


def test_takes_of_a_closed_page_are_deleted_after_the_retention_time(
    page: Page, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sessions, "KEEP_S", 0)
    resume(page, "gone")
    page.generate(by="gone")
    page.event_named("unload").fn(caller("gone"))
    wait_for(lambda: page.studio.left == ["gone"])


def test_oldest_closed_page_loses_its_takes_over_the_limit(
    page: Page, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sessions, "MAX_KEPT", 2)
    for name in ("a", "b", "c"):
        resume(page, name)
        page.generate(by=name)
        page.event_named("unload").fn(caller(name))
    assert page.studio.left == ["a"]


def test_takes_stay_while_the_visitor_has_another_page(page: Page):
    token = resume(page, "here")["doors"]["token"]
    page.generate(by="here")
    resume(page, "there", {"token": token})
    page.event_named("unload").fn(caller("here"))
    assert not page.studio.stopped
    assert not page.studio.left


def test_form_starts_at_the_models_defaults(page: Page):
    form = page.form()
    assert (form["inference_steps"], form["guidance_scale"], form["shift"]) == (12, 4.0, 1.0)
    page.generate()
    request = page.studio.requests[0]
    assert (request.inference_steps, request.guidance_scale, request.shift) == (12, 4.0, 1.0)
    assert request.seed is None
    assert request.bpm is None


def test_widget_matches_its_parameter_declaration(page: Page):
    for name, param in PARAMS.items():
        block = page.blocks[f"generate-{name}"]
        label = page.blocks[f"generate-{name}-file"] if param.type is AdapterRef else block
        assert label.label == tooltips.label(param)
        if param.type in (Path, AdapterRef):
            continue
        assert tooltips.description("generate", param) in block.info
        if isinstance(block, gr.Slider):
            high = min(param.high, CARD.longest_s) if name == "duration_s" else param.high
            assert (block.minimum, block.maximum, block.step) == (param.low, high, param.step)
        if isinstance(block, (gr.Dropdown, gr.Radio)) and param.choices:
            assert {value for _, value in block.choices} == set(param.choices)


def test_duration_slider_ends_at_the_models_longest_song(tmp_path: Path):
    page = Page(FakeStudio(CARD.model_copy(update={"longest_s": 120.0}), tmp_path))
    assert page.blocks["generate-duration_s"].maximum == 120


def test_track_edits_are_offered_only_by_a_model_that_was_trained_for_them(tmp_path: Path):
    for trained in (False, True):
        page = Page(FakeStudio(CARD.model_copy(update={"edits_tracks": trained}), tmp_path))
        offered = {value for _, value in page.blocks["edit-kind"].choices}
        assert offered == {"repaint", "morph"} | (set(TRACK_EDITS) if trained else set())
        fields = {"track": ("add_track", "extract"), "tracks": ("accompany",)}
        for name, kinds in fields.items():
            assert not page.blocks[f"edit-{name}"].visible
            for kind in offered:
                inputs = page.event("edit-kind", "change").inputs
                values = [kind if b.elem_id == "edit-kind" else None for b in inputs]
                (update,) = page.press("edit-kind", *values, does="change")
                assert update[f"edit-{name}"]["visible"] is (kind in kinds)


def test_guidance_is_disabled_with_a_reason_where_it_has_no_effect(tmp_path: Path):
    card = CARD.model_copy(update={"takes_guidance": False, "guidance": 1.0})
    page = Page(FakeStudio(card, tmp_path))
    for name in GUIDANCE:
        block = page.blocks[f"generate-{name}"]
        assert not block.interactive
        assert block.info == tooltips.NO_GUIDANCE.format(model=card.title)
    preview = page.blocks["generate-fast_preview"]
    assert (preview.interactive, preview.value) == (False, False)
    assert preview.info == tooltips.NO_PREVIEW.format(model=card.title)
    page.generate()
    assert page.studio.requests[0].guidance_scale is None


def test_lyrics_are_hidden_and_not_sent_for_an_instrumental(page: Page):
    for instrumental in (True, False):
        (update,) = page.press("generate-instrumental", instrumental, None, does="change")
        assert update["generate-lyrics"]["visible"] is not instrumental
    page.generate(instrumental=True, lyrics="la la la")
    assert page.studio.requests[0].lyrics == ""


def test_generate_is_disabled_and_stop_enabled_during_a_run_only(page: Page):
    first, *_, last = page.generate()
    assert first["generate-run"]["interactive"] is False
    assert first["generate-stop"]["interactive"] is True
    assert last["generate-run"]["interactive"] is True
    assert last["generate-stop"]["interactive"] is False


def test_status_counts_steps_and_screen_readers_get_stages_only(
    page: Page, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job_controls, "REFRESH_S", 0)
    updates = page.generate()
    status = [u["generate-status"] for u in updates if "generate-status" in u]
    assert any("step 3 of 20" in s and "about 3 to 8 s left" in s for s in status)
    assert tooltips.MEASURING in status[1]
    announced = [u["generate-said"] for u in updates if "generate-said" in u]
    assert announced[:4] == [
        tooltips.STARTING,
        tooltips.stage_label("Loading"),
        tooltips.stage_label("Denoising"),
        tooltips.stage_label("Decoding"),
    ]


def test_take_is_shown_with_player_files_and_facts(page: Page):
    last = page.generate(duration_s=11, seed="77")[-1]
    take = page.studio.takes("one")[0]
    assert last["generate-player"] == take.path
    assert last["generate-wav"]["value"] == take.path
    assert Path(last["generate-json"]["value"]).read_text().startswith("{")
    facts = last["generate-facts"]
    for part in ("77", "11 s", "a waltz", "sha256 abababab", "Pretended CPU", take.notes[0]):
        assert part in facts
    assert take.path not in facts


def test_prompt_is_escaped_in_html(page: Page):
    last = page.generate(prompt="<img src=x onerror=alert(1)> & co")[-1]
    assert "<img" not in last["generate-facts"]
    assert "&lt;img" in last["generate-facts"]


def test_result_caption_shows_style_length_changed_settings_and_seed(page: Page):
    last = page.generate(bpm="92", infer_method="sde", seed="5")[-1]
    ((caption, chosen),) = last["generate-shelf"]["choices"]
    assert caption == "a waltz\n30 s · Sampler SDE · Tempo 92 bpm · seed 5"
    assert last["generate-shelf"]["value"] == chosen


def test_result_list_holds_ten_takes(page: Page):
    for _ in range(12):
        last = page.generate()[-1]
    assert len(last["generate-shelf"]["choices"]) == 10


def test_selecting_a_take_plays_it_and_shows_its_settings(page: Page):
    page.generate(prompt="first")
    page.generate(prompt="second")
    older = page.studio.takes("one")[1]
    (shown,) = page.press("generate-shelf", older.id)
    assert shown["generate-player"] == older.path
    assert "first" in shown["generate-facts"]


def test_reuse_restores_the_settings_of_a_take(page: Page):
    page.generate(prompt="first", bpm="92", infer_method="heun")
    take = page.studio.takes("one")[0]
    (update,) = page.press("generate-reuse", take.id)
    filled = field_values("generate", update)
    assert filled["prompt"] == "first"
    assert (filled["bpm"], filled["infer_method"], filled["seed"]) == (92, "heun", 1001)
    page.generate(**filled)
    again, before = page.studio.requests[-1], take.request
    assert again.model_dump(mode="json") == before


def test_a_model_that_cannot_sing_starts_instrumental_and_says_why(tmp_path: Path):
    page = Page(FakeStudio(CARD.model_copy(update={"sings": False}), tmp_path))
    vocals = page.blocks["generate-instrumental"]
    assert (vocals.value, vocals.elem_classes) == (True, ["no-vocals"])
    assert "was not trained on vocals" in vocals.info
    assert page.blocks["generate-lyrics"].visible is False
    assert page.submit("generate", prompt="a waltz", lyrics="la").instrumental is True
    *_, done = page.press("generate-inspire", "", *page.form().values())
    assert (done["generate-lyrics"].get("value"), done["generate-instrumental"]) == (None, True)
    assert page.blocks["lyrics-use"].interactive is False


def test_a_take_with_lyrics_is_restored_whatever_the_model(tmp_path: Path):
    page = Page(FakeStudio(CARD.model_copy(update={"sings": False}), tmp_path))
    page.generate(instrumental=False, lyrics="la la la")
    (take,) = page.studio.takes("one")
    filled = page.press("generate-reuse", take.id)[0]
    assert (filled["generate-instrumental"], filled["generate-lyrics"]["value"]) == (
        False,
        "la la la",
    )


def test_reusing_an_instrumental_keeps_the_lyrics(page: Page):
    page.generate(instrumental=True)
    (update,) = page.press("generate-reuse", page.studio.takes("one")[0].id)
    filled = field_values("generate", update)
    assert filled["instrumental"] is True
    assert "lyrics" not in filled


def test_retake_changes_only_the_seed(page: Page):
    page.generate(bpm="92")
    take = page.studio.takes("one")[0]
    seeds = {take.request["seed"]}
    for _ in range(5):
        page.press("generate-again", take.id)
        request = page.studio.requests[-1].model_dump(mode="json")
        seeds.add(request.pop("seed"))
        assert request == {n: v for n, v in take.request.items() if n != "seed"}
    assert len(seeds) == 6


def test_two_visitors_do_not_see_each_others_takes(page: Page, toasts: list[str]):
    page.generate(by="one", prompt="mine")
    last = page.generate(by="two", prompt="yours")[-1]
    assert [c for c, _ in last["generate-shelf"]["choices"]] == ["yours\n30 s · seed 1002"]
    (refused,) = page.press("generate-shelf", page.studio.takes("one")[0].id, by="two")
    assert "generate-player" not in refused
    assert toasts
    page.press("generate-again", page.studio.takes("one")[0].id, by="two")
    assert len(page.studio.requests) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "  "}, "The style is empty."),
        ({"duration_s": 999}, "Length must be a number from 5 to 600 s, not 999."),
        ({"bpm": "fast"}, "Tempo must be a whole number from 30 to 300 bpm"),
        ({"bpm": "92.5"}, "Tempo must be a whole number"),
        ({"seed": "-2"}, "Seed must be a whole number from 0"),
        ({"lyrics": "la " * 4000}, "Lyrics has 12,000 characters"),
        ({"cfg_interval_start": 0.9, "cfg_interval_end": 0.1}, "below"),
    ],
)
def test_invalid_value_shows_message_and_action(
    page: Page, toasts: list[str], fields: dict[str, Any], message: str
):
    last = page.generate(**fields)[-1]
    assert message in last["generate-status"]
    assert "data-state='failed'" in last["generate-status"]
    assert len(toasts) == 1
    assert last["generate-run"]["interactive"] is True
    assert not page.studio.requests
    assert not {b for b in last if b.removeprefix("generate-") in PARAMS}, "the form is unchanged"


def test_failed_job_is_shown_and_the_next_one_runs(page: Page, toasts: list[str]):
    last = page.generate(prompt="fail")[-1]
    assert "There was not enough memory" in last["generate-status"]
    assert "Shorten the song to 120 s" in toasts[0]
    assert "generate-player" not in last
    assert page.generate()[-1]["generate-run"]["interactive"] is True


def test_internal_error_is_shown_without_traceback_and_logged(
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


def test_stop_cancels_the_job_and_shows_it(page: Page):
    running = page.event("generate-run").fn(caller(), *page.form(prompt="slow").values())
    next(running), next(running)
    (stopping,) = page.press("generate-stop")
    assert stopping["interactive"] is False
    assert page.studio.stopped == ["one"]
    (last,) = list(running)[-1:]
    values = {block.elem_id: value for block, value in last.items()}
    assert tooltips.CANCELLED in values["generate-status"]
    assert values["generate-run"]["interactive"] is True


def test_closing_the_page_ends_its_job_and_visitor(page: Page):
    running = page.event("generate-run").fn(caller(), *page.form(prompt="slow").values())
    next(running), next(running)
    running.close()
    assert page.studio.closed == 1
    (leave,) = (f for f in page.demo.fns.values() if any(t[1] == "unload" for t in f.targets))
    leave.fn(caller())
    assert page.studio.left == ["one"]


def test_importing_the_page_loads_no_torch_and_disables_analytics():
    code = (
        "import web.page, sys, gradio.analytics as a;"
        "sys.exit('torch' in sys.modules or a.analytics_enabled())"
    )
    env = {"PATH": "/usr/bin", "GRADIO_ANALYTICS_ENABLED": "True"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0


def test_lyrics_stream_then_are_repaired_and_sent_to_generate(
    page: Page, monkeypatch: pytest.MonkeyPatch, toasts: list[str]
):
    monkeypatch.setattr(job_controls, "REFRESH_S", 0)
    form = page.form("lyrics", brief="rain", lines=3, seed="7")
    updates = page.press("lyrics-run", *form.values())
    request = page.studio.requests[-1]
    assert (request.brief, request.lines, request.seed, request.repair) == ("rain", 3, 7, "")
    drafts = [u["lyrics-draft"] for u in updates if "lyrics-draft" in u]
    assert len(drafts) > 5
    assert all(later.startswith(earlier) for earlier, later in pairwise(drafts))
    last = updates[-1]
    assert "1 of 2 sections, not as requested" in last["lyrics-status"]
    assert re.search("Requested.*Verse, Chorus.*Written.*Verse", last["lyrics-facts"])
    assert last["lyrics-repair"]["interactive"] is True

    *_, repaired = page.press("lyrics-repair", drafts[-1], *form.values())
    assert page.studio.requests[-1].repair == drafts[-1]
    assert "2 of 2 sections, as requested" in repaired["lyrics-status"]
    assert repaired["lyrics-repair"]["interactive"] is False

    use = page.event("lyrics-use").fn(repaired["lyrics-draft"], "de")
    sent = {block.elem_id: value for block, value in use.items()}
    assert sent["studio"]["selected"] == "generate"
    assert sent["generate-lyrics"]["value"] == repaired["lyrics-draft"]
    assert (sent["generate-vocal_language"], sent["generate-instrumental"]) == ("de", False)
    *_, failed = page.press("lyrics-run", *page.form("lyrics").values())
    assert "The brief is empty." in failed["lyrics-status"]
    assert "lyrics-result" not in failed, "no empty draft is shown"


def test_the_list_of_models_downloads_stops_resumes_and_uses(tmp_path: Path):
    studio = FakeStudio(folder=tmp_path)
    page = Page(studio)
    manage = page.blocks["models"].manage

    def row(asked: str, name: str = "qwen-0.5b") -> dict[str, Any]:
        return {row["name"]: row for row in manage(asked)["rows"]}[name]

    found = row("")
    assert (found["kind"], found["title"], found["button"]) == ("songwriter", "Qwen 0.5B", "fetch")
    for fact in ("not downloaded", "1.0 GB", "Apache-2.0: commercial use allowed", "fits: Needs"):
        assert fact in found["facts"]
    assert "does not fit" in row("", "xl-sft")["facts"]
    assert "check the licence" in row("", "htdemucs")["facts"]
    assert (row("", "mini")["button"], row("", "mini")["share"]) == ("", None)
    running = row("fetch qwen-0.5b")
    assert (running["button"], running["share"]) == ("stop", 0.25)
    assert running["message"] == "1,000 of 4,000 MB · 50.0 MB/s"
    stopped = row("stop qwen-0.5b")
    assert (stopped["label"], stopped["share"]) == ("Resume", None)
    assert "stopped at 1,000 MB" in stopped["message"]
    assert row("fetch qwen-0.5b")["share"] == 0.5
    while row("")["button"] == "stop":
        pass
    assert row("")["button"] == "use"
    assert row("use qwen-0.5b")["facts"].startswith("in use")
    assert studio.used == ["qwen-0.5b"]


REASON = "Qwen 2.5 7B (15 GB) is not on this computer. Go online and run: python app.py fetch"


def test_missing_songwriter_is_explained_where_none_may_be_downloaded(tmp_path: Path):
    studio = FakeStudio(CARD.model_copy(update={"no_writer": REASON}), tmp_path)
    studio.entries.clear()
    page = Page(studio)
    assert page.blocks["lyrics-run"].interactive is False
    notes = [b.value for b in page.demo.blocks.values() if "missing" in (b.elem_classes or [])]
    assert notes == [f"<p>{REASON}</p>"]
    assert page.blocks["generate-run"].interactive is True


@pytest.fixture
def bare(tmp_path: Path) -> Page:
    """The page of a computer without a songwriter."""
    card = CARD.model_copy(update={"no_writer": REASON, "writer": "Qwen 1.5B"})
    studio = FakeStudio(card, tmp_path)
    for name in ("qwen-1.5b", "qwen-0.5b"):
        changes = {"on_disk": False, "can_fetch": True}
        studio.entries[name] = studio.entries[name].model_copy(update=changes)
    return Page(studio)


def test_one_click_downloads_a_songwriter_and_writes(bare: Page, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lyrics_tab, "POLL_S", 0.0)
    choice, run = bare.blocks["lyrics-writer"], bare.blocks["lyrics-run"]
    assert (choice.value, run.interactive) == ("qwen-1.5b", True)
    assert [value for _, value in choice.choices] == ["qwen-1.5b", "qwen-0.5b"]
    *_, failed = bare.press("lyrics-run", *bare.form("lyrics").values())
    assert "The brief is empty." in failed["lyrics-status"], "nothing is fetched for it"
    assert bare.studio.entries["qwen-1.5b"].download is None
    form = bare.form("lyrics", brief="rain", writer="qwen-0.5b")
    updates = bare.press("lyrics-run", *form.values())
    seen = [update["lyrics-status"] for update in updates if "lyrics-status" in update]
    assert "1,000 of 4,000 MB" in seen[0]
    assert "50.0 MB/s" in seen[0]
    assert "1 of 2 sections" in seen[-1]
    assert bare.studio.used == ["qwen-0.5b"]
    assert any(update.get("lyrics-run", {}).get("value") == "Write lyrics" for update in updates)


def test_a_songwriters_download_stops_and_resumes(bare: Page, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lyrics_tab, "POLL_S", 0.0)
    form = [*bare.form("lyrics", brief="rain").values()]
    running = bare.event("lyrics-run").fn(caller(), *form)
    next(running)
    bare.event("lyrics-stop").fn(caller())
    *_, last = running
    assert any("Download stopped" in str(value) for value in last.values())
    assert not bare.studio.requests
    bare.press("lyrics-run", *form)
    assert len(bare.studio.requests) == 1


# ---- the API over HTTP ----


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


def test_api_has_one_endpoint_per_mode_and_no_others(client: Client):
    api = client.view_api(return_format="dict", print_info=False)
    names = [*MODES, *HELPERS, *EXPORTS, "lyrics"]
    assert set(api["named_endpoints"]) == {f"/{mode}" for mode in names}
    assert not api["unnamed_endpoints"]


def test_api_parameters_match_request_names_types_and_defaults(client: Client):
    endpoint = client.view_api(return_format="dict", print_info=False)["named_endpoints"][
        "/generate"
    ]
    assert [p["parameter_name"] for p in endpoint["parameters"]] == list(PARAMS)
    for parameter in endpoint["parameters"]:
        param = PARAMS[parameter["parameter_name"]]
        assert parameter["parameter_has_default"] is not param.required
        default = list(param.default) if param.type is AdapterRef else param.default
        assert parameter["parameter_default"] == default
        assert tooltips.help_text("generate", param) in parameter["python_type"]["description"]
        if param.choices:
            assert parameter["type"]["enum"] == list(param.choices)
    assert endpoint["description"].startswith("A new song from a style and lyrics")


def test_api_call_returns_audio_and_take(served: Any, client: Client):
    studio, _ = served
    sound, take = client.predict(
        prompt="by wire", duration_s=10, seed=3, bpm=90, keyscale="A minor", api_name="/generate"
    )
    assert Path(sound).read_bytes()[:4] == b"RIFF"
    assert take["request"]["seed"] == 3
    assert (studio.requests[-1].bpm, studio.requests[-1].keyscale) == (90, "A minor")
    assert "path" not in take
    assert studio.left[-1].startswith("api-"), "the API visitor keeps no takes"


def test_api_modes_and_helpers_accept_uploaded_files(served: Any, client: Client, tmp_path: Path):
    studio, _ = served
    write_tone(tmp_path / "my tune.wav", 9 * 48_000, 330)
    song = handle_file(tmp_path / "my tune.wav")
    sound, take = client.predict(source=song, prompt="brass", strength=0.5, api_name="/cover")
    assert Path(sound).read_bytes()[:4] == b"RIFF"
    assert (take["request"]["source"], take["request"]["strength"]) == ("my tune.wav", 0.5)
    assert studio.requests[-1].source.read_bytes() == (tmp_path / "my tune.wav").read_bytes()
    assert client.predict(source=song, api_name="/listen")["bpm"] == 84
    assert client.predict(brief="rain", api_name="/lyrics")["got"] == ["Verse"]
    assert client.predict(idea="a train", api_name="/inspire")["prompt"] == IDEA.prompt
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    for name in ("source", "reference"):
        (parameter,) = (p for p in endpoints["/cover"]["parameters"] if p["parameter_name"] == name)
        meta = parameter["type"]["properties"]["meta"]["properties"]["_type"]
        assert meta == {"const": "gradio.FileData"}, "marks the parameter as a file for MCP clients"


def test_api_accepts_only_uploaded_adapters(served: Any, client: Client, tmp_path: Path):
    studio, _ = served
    (tmp_path / "warm.safetensors").write_bytes(b"12345678{}")
    file = handle_file(tmp_path / "warm.safetensors")
    _, take = client.predict(
        prompt="x",
        duration_s=10,
        adapters=[{"file": file, "strength": 0.4}, file],
        api_name="/generate",
    )
    applied = studio.requests[-1].adapters
    assert [(w.file.name, w.strength) for w in applied] == [
        ("warm.safetensors", 0.4),
        ("warm.safetensors", 1),
    ]
    assert take["request"]["adapters"][0]["file"] == "warm.safetensors"
    body = {"prompt": "x", "adapters": [{"file": {"path": "/etc/passwd", **FILE_DATA}}]}
    response = httpx.post(f"{served[1]}gradio_api/call/v2/generate", json=body)
    address = f"{served[1]}gradio_api/call/generate/{response.json().get('event_id')}"
    stream = httpx.get(address, timeout=30).text
    assert re.search("not uploaded|Cannot move|error", stream), stream
    assert studio.requests[-1].adapters == applied


FILE_DATA = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "given",
    [
        "/etc/passwd",
        {"path": "/etc/passwd"},
        {"path": "/etc/passwd", **FILE_DATA},
        {"path": "{folder}/../../../../../../etc/passwd", **FILE_DATA},
        {"path": "/etc/passwd", "url": "/gradio_api/file=/etc/passwd", **FILE_DATA},
    ],
)
@pytest.mark.parametrize("route", ["api", "page-run", "page-look"])
def test_server_paths_are_never_read(served: Any, given: Any, route: str):
    studio, url = served
    if isinstance(given, dict):
        folder = os.environ["GRADIO_TEMP_DIR"]
        given = {**given, "path": given["path"].replace("{folder}", folder)}
    counts = len(studio.requests), len(studio.inspected)
    if route == "api":
        response = httpx.post(f"{url}gradio_api/call/v2/extend", json={"source": given})
        address = f"{url}gradio_api/call/extend/{response.json()['event_id']}"
    else:
        elem_id, does = (
            ("extend-run", "click") if route == "page-run" else ("extend-source", "upload")
        )
        blocks = {b.elem_id: b for b in studio.demo.blocks.values() if getattr(b, "elem_id", None)}
        (event,) = (
            f for f in studio.demo.fns.values() if f.fn and (blocks[elem_id]._id, does) in f.targets
        )
        data = [given if b.elem_id == "extend-source" else b.value for b in event.inputs]
        body = {"data": data, "fn_index": event._id, "session_hash": f"thief-{time.time()}"}
        assert httpx.post(f"{url}gradio_api/queue/join", json=body).status_code == 200
        address = f"{url}gradio_api/queue/data?session_hash={body['session_hash']}"
    stream = httpx.get(address, timeout=30).text
    assert re.search("not uploaded|Cannot move|error", stream), stream
    assert "root:" not in stream
    assert (len(studio.requests), len(studio.inspected)) == counts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": ""}, "The style is empty. Describe the music"),
        ({"duration_s": 4}, "Length must be a number from 5 to 600 s, not 4. Set Length"),
        ({"duration_s": "NaN"}, "Length must be a number from 5 to 600 s"),
        ({"seed": 1.5}, "Seed must be a whole number"),
        ({"keyscale": "H minor"}, "Key cannot be 'H minor'. Choose one of"),
        ({"inference_steps": True}, "Steps must be a whole number from 1 to 200, not True."),
        ({"prompt": "fail"}, "There was not enough memory on the CPU"),
    ],
)
def test_api_invalid_value_returns_message_and_action(
    client: Client, given: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(AppError, match=message.replace("(", r"\(")):
        client.predict(**{"prompt": "a waltz", **given}, api_name="/generate")
    assert "Traceback" not in capfd.readouterr().err


def test_nan_over_plain_http_is_rejected_with_a_message(served: Any):
    url = f"{served[1]}gradio_api/call/v2/generate"
    body = f'{{"prompt": "x", "duration_s": {math.inf}}}'.replace("inf", "NaN")
    response = httpx.post(url, content=body, headers={"content-type": "application/json"})
    if response.status_code == 200:
        stream = httpx.get(
            f"{served[1]}gradio_api/call/generate/{response.json()['event_id']}"
        ).text
        assert "Length must be a number from 5 to 600 s" in stream
    else:
        assert response.status_code == 422
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    ("given", "code"), [({"prompt": "x", "tempo": 3}, "unknown-field"), ({}, "prompt-empty")]
)
def test_unknown_or_missing_field_over_plain_http_returns_its_code(
    served: Any, given: dict[str, Any], code: str
):
    response = httpx.post(f"{served[1]}gradio_api/call/v2/generate", json=given)
    assert response.status_code == 422
    body = response.json()
    assert body["code"] == code
    assert body["error"] == f"{body['message']} {body['action']}"


def test_api_error_carries_code_message_and_action_as_data(served: Any, client: Client):
    with pytest.raises(AppError) as caught:
        client.predict(prompt="a waltz", duration_s=4, api_name="/generate")
    data = json.loads(caught.value.title)
    assert data["code"] == "value-out-of-range"
    assert data["message"] == "Length must be a number from 5 to 600 s, not 4."
    assert data["action"].startswith("Set Length to")
    assert caught.value.message == f"{data['message']} {data['action']}"

    body = {"prompt": "a waltz", "duration_s": 4}
    response = httpx.post(f"{served[1]}gradio_api/call/v2/generate", json=body).json()
    stream = httpx.get(f"{served[1]}gradio_api/call/generate/{response['event_id']}").text
    event = json.loads(stream.partition("event: error\ndata: ")[2])
    assert {name: event[name] for name in data} == data
    assert (event["error"], event["title"]) == (caught.value.message, tooltips.FAILED)


@pytest.mark.parametrize("mode", ["generate", "master", "lyrics"])
def test_api_call_with_too_few_values_says_how_many(
    served: Any, mode: str, caplog: pytest.LogCaptureFixture
):
    response = httpx.post(f"{served[1]}gradio_api/call/{mode}", json={"data": []}).json()
    stream = httpx.get(f"{served[1]}gradio_api/call/{mode}/{response['event_id']}").text
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


def test_cancelled_api_call_stops_its_job(served: Any, client: Client):
    studio, _ = served
    before = len(studio.left)
    job = client.submit(prompt="slow", api_name="/generate")
    wait_for(lambda: len(job.outputs()) >= 2)
    job.cancel()
    wait_for(lambda: len(studio.left) > before)
