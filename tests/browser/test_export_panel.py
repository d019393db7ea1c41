"""Export, A/B comparison, restoring from a file and sharing by link, in a real browser."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from browsing import fits, fits_all, state, upload, wait
from conftest import read_sound
from fake_studio import CARD, LOUDER, FakeStudio
from gradio_client import Client, handle_file

import tooltips
from audio import loudness
from core.requests import MODES
from web.page import build

if TYPE_CHECKING:
    from playwright.sync_api import Page


def test_missing_stem_weights_disable_the_button_and_show_the_download_command(tmp_path: Path):
    why = "HTDemucs (84 MB) would split the song. Fetch it with: hf download it"
    card = CARD.model_copy(update={"no_stems": why})
    demo = build(FakeStudio(card, tmp_path))
    blocks = {b.elem_id: b for b in demo.blocks.values() if getattr(b, "elem_id", None)}
    html = [str(b.value) for b in demo.blocks.values() if type(b).__name__ == "HTML"]
    for mode in MODES:
        assert blocks[f"{mode}-stems"].interactive is False
        assert blocks[f"{mode}-master"].interactive is True
    assert sum(why in text for text in html) == len(MODES)


# ---- in the browser, on the real studio ----


UNPLANNED = "thinking=false&use_cot_caption=false&use_cot_metas=false&use_cot_language=false"
"""Link parameters of a song made without the planner."""


def _make(page: Page, style: str = "warm lofi piano", seconds: int = 5) -> None:
    page.locator("#generate-prompt textarea").fill(style)
    box = page.locator("#generate-duration_s input[type=number]")
    box.fill(str(seconds))
    box.press("Tab")
    before = page.locator("#generate-shelf label").count()
    page.locator("#generate-run").click()
    added = f"document.querySelectorAll('#generate-shelf label').length > {before}"
    page.wait_for_function(added, timeout=120_000)
    state(page, "done").wait_for()


def _download(page: Page, link: Any, folder: Path) -> Path:
    """Download the file behind a link of the page into `folder`."""
    response = page.request.get(link.evaluate("a => a.href"))
    assert response.ok
    path = folder / (link.get_attribute("download") or "file").split("/")[-1]
    path.write_bytes(response.body())
    return path


def _save_take(page: Page, folder: Path) -> Path:
    """Save the current take with its download button."""
    with page.expect_download() as download:
        page.locator("#generate-wav").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def _run_export(page: Page, mode: str, folder: Path) -> list[Path]:
    """Run one export mode and download the files it makes."""
    selector = f"#generate-{mode}-made a[download]"
    links = page.locator(selector)
    before = [link.evaluate("a => a.href") for link in links.all()]
    page.locator(f"#generate-{mode}").click()
    # Not by "running": the job may finish before the first check.
    page.wait_for_function(
        """([selector, before]) => {
            const now = [...document.querySelectorAll(selector)].map((a) => a.href);
            return now.length && !now.some((href) => before.includes(href));
        }""",
        arg=[selector, before],
    )
    state(page, "done").wait_for()
    return [_download(page, link, folder) for link in links.all()]


def test_a_take_is_exported_compared_and_regenerated_from_its_file(
    open_at: Callable[..., Page], url: str, tmp_path: Path
):
    page = open_at(url, 1440, "#prompt=x&inference_steps=4&" + UNPLANNED)
    page.locator(".restore[data-state=ready]").wait_for()
    _make(page, "fast punk drums")
    first = _save_take(page, tmp_path)
    _make(page)
    facts = page.locator("#generate-facts")
    assert re.search(r"Loudness\s+−\d+\.\d LUFS", facts.inner_text())
    page.get_by_role("button", name=tooltips.EXPORT_PANEL).click()
    page.locator("#generate-export").wait_for()

    # Export with and without embedded settings.
    page.locator("#generate-export-format").get_by_text("FLAC", exact=True).click()
    (flac,) = _run_export(page, "export", tmp_path)
    wav = _save_take(page, tmp_path)
    assert np.array_equal(read_sound(flac), read_sound(wav))
    assert b"ACE_SETTINGS=" in flac.read_bytes()
    page.locator("#generate-export-settings input").uncheck()
    page.locator("#generate-export-ai_generated input").uncheck()
    bare = tmp_path / "bare"
    bare.mkdir()
    (plain,) = _run_export(page, "export", bare)
    assert b"ACE_SETTINGS=" not in plain.read_bytes()
    assert b"AI_GENERATED" not in plain.read_bytes()
    assert np.array_equal(read_sound(plain), read_sound(wav))

    # Master: the reported loudness is the measured one; the format options above still apply.
    page.locator("#generate-export-settings input").check()
    (master,) = _run_export(page, "master", tmp_path)
    report = page.locator("#generate-master-told").inner_text()
    after = float(re.search(r"(−[\d.]+) LUFS after", report)[1].replace("−", "-"))
    assert loudness.loudness(read_sound(master)) == pytest.approx(after, abs=0.06)
    assert loudness.true_peak(read_sound(master)) <= -1.0 + 0.01
    assert b"ACE_SETTINGS=" in master.read_bytes()
    assert b"AI_GENERATED" not in master.read_bytes()

    # Stems: the weights are missing, and the page names them and the download command.
    assert page.locator("#generate-stems").is_disabled()
    panel = page.locator(".export:visible", has=page.locator("#generate-stems")).inner_text()
    assert "HTDemucs (84 MB)" in panel
    assert "Download it with: python app.py fetch" in panel
    _check_ab_player(page, [wav, first])
    assert fits_all(page)

    # A file dropped on a fresh page regenerates the same samples; a master is labelled as one.
    other = open_at(url, 390, "")
    other.mouse.wheel(0, 2000)
    _drop(other, master)
    other.locator(".restore[data-state=ready]").wait_for()
    assert master.name in other.locator("#doors").inner_text()
    assert "mastered to -14 LUFS" in other.locator("#doors").inner_text()
    other.wait_for_function("scrollY === 0")
    box = other.locator("#generate-prompt textarea")
    assert box.input_value() == "warm lofi piano"
    other.locator("#generate-run").click()
    state(other, "done").wait_for()
    assert np.array_equal(read_sound(_save_take(other, bare)), read_sound(flac))
    assert fits(other)


def _check_ab_player(page: Page, files: list[Path]) -> None:
    """Check loudness match and seamless switching in the recorded output of the A/B player."""
    page.evaluate(RECORD)
    page.get_by_role("button", name=tooltips.COMPARE).click()
    page.locator("#generate-compare").click()
    group = page.get_by_role("group", name=tooltips.AB_PLAYER["group"])
    group.get_by_role("button", name=tooltips.AB_PLAYER["play"]).click()
    a, b = (group.get_by_role("button", name=re.compile(f"^{letter} ")) for letter in "AB")
    assert "warm lofi piano" in a.inner_text()
    assert "fast punk drums" in b.inner_text()
    page.wait_for_timeout(1500)
    gains = [page.evaluate("recorded.gains.map(each => each.gain.value)")]
    b.click()
    switched = page.evaluate("recorded.gains[0].context.currentTime")
    page.wait_for_timeout(1200)
    gains.append(page.evaluate("recorded.gains.map(each => each.gain.value)"))
    assert b.get_attribute("aria-pressed") == "true"
    page.keyboard.press("a")
    assert a.get_attribute("aria-pressed") == "true"
    starts, blocks = page.evaluate("[recorded.starts, recorded.blocks]")
    assert len(starts) == 2, "each take was started once and never restarted"
    assert starts[0] == starts[1]
    assert gains[0][1] == gains[1][0] == 0.0

    levels = [gains[0][0], gains[1][1]]
    loud = [
        loudness.loudness(read_sound(f) * level) for f, level in zip(files, levels, strict=True)
    ]
    assert abs(loud[0] - loud[1]) <= 0.1
    assert max(levels) == 1.0
    begun = starts[0][0] + 0.2
    before = [each for each in blocks if begun < each[0] < switched - 0.1]
    after = [each for each in blocks if switched + 0.3 < each[0] < switched + 1.0]
    lags = []
    for part, path, level in zip((before, after), files, levels, strict=True):
        # Compare one block only: a busy browser drops some.
        when, samples = part[len(part) // 2]
        sound = read_sound(path)[0].astype(np.float64) * level
        match = np.correlate(sound, samples, "valid")
        energy = np.convolve(np.square(sound), np.ones(len(samples)), "valid")
        at = int(np.argmin(energy - 2 * match))
        assert samples == pytest.approx(sound[at : at + len(samples)], abs=1e-3), (
            "the output is the take's own samples"
        )
        lags.append(when - at / 48_000)
    assert lags[0] == pytest.approx(lags[1], abs=0.05), "the playback position is kept"


def _drop(page: Page, path: Path) -> None:
    """Drop a file on the page outside any upload field."""
    page.evaluate(
        """([bytes, name]) => {
          const data = new DataTransfer();
          data.items.add(new File([Uint8Array.from(atob(bytes), c => c.charCodeAt(0))], name));
          const init = { dataTransfer: data, bubbles: true, cancelable: true };
          for (const type of ["dragover", "drop"]) {
            document.querySelector("#masthead").dispatchEvent(new DragEvent(type, init));
          }
        }""",
        [base64.b64encode(path.read_bytes()).decode(), path.name],
    )


RECORD = """() => {
  window.recorded = { gains: [], starts: [] };
  const gain = AudioContext.prototype.createGain;
  AudioContext.prototype.createGain = function () {
    const node = gain.call(this);
    window.recorded.gains.push(node);
    return node;
  };
  const start = AudioBufferSourceNode.prototype.start;
  AudioBufferSourceNode.prototype.start = function (...when) {
    window.recorded.starts.push(when);
    return start.apply(this, when);
  };
  const connect = AudioNode.prototype.connect;
  AudioNode.prototype.connect = function (to, ...rest) {
    if (to === this.context.destination && !(this instanceof ScriptProcessorNode)) {
      if (!window.recorded.tape) {
        const context = this.context, tape = context.createScriptProcessor(4096, 2, 1);
        window.recorded.tape = tape;
        window.recorded.blocks = [];
        tape.onaudioprocess = (event) => window.recorded.blocks.push(
          [event.playbackTime, [...event.inputBuffer.getChannelData(0)]]);
        connect.call(tape, context.destination);
      }
      connect.call(this, window.recorded.tape);
    }
    return connect.call(this, to, ...rest);
  };
}"""
"""Records the player's gain nodes, start times and output blocks with their playback time."""


def test_blind_takes_are_anonymous_until_a_vote_and_exports_can_be_stopped(
    open_at: Callable[..., Page], quick: str
):
    page = open_at(quick, 390, "")
    _make(page, "the first one", 10)
    _make(page, "the second one", 10)
    page.get_by_role("button", name=tooltips.COMPARE).click()
    page.get_by_label(tooltips.BLIND).check()
    page.locator("#generate-compare").click()
    group = page.get_by_role("group", name=tooltips.AB_PLAYER["group"])
    group.wait_for()
    hidden = group.evaluate("e => e.outerHTML")
    assert "first one" not in hidden
    assert "second one" not in hidden
    group.get_by_role("button", name=tooltips.AB_PLAYER["play"]).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.ab-player .clock').textContent !== '0:00'")
    page.keyboard.press("b")
    assert group.get_by_role("button", name="B", exact=True).get_attribute("aria-pressed") == "true"
    assert "one" not in group.get_by_role("button", name="B", exact=True).inner_text()
    group.get_by_role("button", name="B is better").click()
    result = group.get_by_role("status").inner_text()
    assert re.search(r"You chose B, the (first|second) one · seed \d+ · 10 s\.", result)
    assert group.get_by_role("button", name=re.compile("^A the (first|second) one")).count() == 1
    assert group.get_by_role("button", name="B is better").count() == 0
    assert fits_all(page)

    # Stop cancels an export; stem files with a licence badge are listed until another take is shown.
    _make(page, "a waltz, slow stems", 10)
    page.get_by_role("button", name=tooltips.EXPORT_PANEL).click()
    panel = page.locator(".export:visible", has=page.locator("#generate-stems"))
    assert CARD.stems in panel.inner_text()
    page.locator("#generate-stems").click()
    state(page, "running").wait_for()
    wait(page.locator("#generate-run").is_disabled, 10)
    page.locator("#generate-stop").click()
    state(page, "stopped").wait_for()
    assert page.locator("#generate-stems-made a[download]").count() == 0
    _make(page, "a waltz", 10)
    page.locator("#generate-stems").focus()
    page.keyboard.press("Enter")
    links = page.locator("#generate-stems-made a[download]")
    links.first.wait_for()
    assert [
        re.search(r"stems.zip|vocals|drums", a.get_attribute("download"))[0] for a in links.all()
    ] == [
        "stems.zip",
        "vocals",
        "drums",
    ]
    assert CARD.stems in page.locator("#generate-stems-told").inner_text()
    assert fits_all(page)
    _make(page, "a waltz", 10)
    assert links.count() == 0, "the files belong to another take"


def test_a_link_opens_the_page_with_the_settings_in_their_tab(
    open_at: Callable[..., Page], quick: str, tune: Path
):
    page = open_at(quick, 1440, "?tab=edit")
    upload(page, "edit-source", tune)
    page.locator("#edit-prompt textarea").fill("brass & snow, 20% more = better")
    page.locator("#edit-run").click()
    state(page, "done", "edit").wait_for()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name=tooltips.SHARE["share"]).click()
    page.get_by_text(tooltips.SHARE["copied"]).wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{quick}?tab=edit#")
    assert "prompt=brass%20%26%20snow" in link
    assert "tune" not in link, "no file, no path"
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("button", name=tooltips.SHARE["share"]).click()
    field = page.get_by_label(tooltips.SHARE["link"])
    field.wait_for()
    assert field.input_value() == link, "shown when the browser denies clipboard access"
    assert fits_all(page)

    other = open_at(quick, 390, link.removeprefix(quick))
    other.locator(".restore[data-state=ready]").wait_for()
    assert other.get_by_role("tab", name="Edit").get_attribute("aria-selected") == "true"
    missing = other.locator("#edit-source-look [data-state=refused]")
    assert "Choose it as Source audio." in missing.inner_text()
    prompt = other.locator("#edit-prompt textarea")
    assert prompt.input_value() == "brass & snow, 20% more = better"
    upload(other, "edit-source", tune)
    ends = [other.get_by_role("slider", name=n, exact=True).input_value() for n in ("From", "To")]
    assert ends == ["7", "14"], "the region is applied once the song is uploaded"
    for mode in ("cover", "extend"):  # opened after the settings of the other tab were restored
        other.locator(f"#t-{mode}-button").click()
        other.locator(f"#{mode}-source-look .message", has_text=tooltips.HELP["source"]).wait_for()
        other.locator(f"#t-{mode} .advanced > button").click()
        other.locator(f"#{mode}-adapters .help", has_text=tooltips.HELP["adapters"]).wait_for()
        other.locator(f"#{mode}-run").click()
        state(other, "failed", mode).wait_for()
    other.locator("#t-edit-button").click()
    other.locator("#edit-run").click()
    state(other, "done", "edit").wait_for()
    shown = [
        p.locator("#edit-facts").inner_text().partition(tooltips.AS_RUN.upper())[2]
        for p in (page, other)
    ]
    first, again = (text.partition("MADE WITH")[0] for text in shown)
    assert first == again


def test_hostile_links_and_files_are_refused_and_change_nothing(
    open_at: Callable[..., Page], quick: str, tmp_path: Path, tune: Path
):
    page = open_at(quick, 820, "?tab=generate#source=/etc/passwd&prompt=a")
    refused = page.locator(".restore[data-state=refused]")
    refused.wait_for()
    assert "The settings in the link cannot be used" in refused.inner_text()
    assert "/etc" not in refused.inner_text()
    prompt = page.locator("#generate-prompt textarea")
    assert prompt.input_value() == ""
    prompt.fill("mine")
    bad = tmp_path / "bad.json"
    bad.write_text('{"ace-music-studio": 1, "mode": "generate", "path": "/etc/passwd"}')
    _drop(page, bad)
    page.locator(".restore[data-state=refused] .message", has_text="bad.json").wait_for()
    assert "The settings in bad.json cannot be used" in refused.inner_text()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=tooltips.RESTORE["open"]).click()
    chooser.value.set_files(tune)
    page.locator(".restore .message", has_text="contains no settings of this studio").wait_for()
    assert prompt.input_value() == "mine"
    assert fits_all(page)


# ---- the API ----


def test_the_export_api_accepts_uploaded_files_only(quick: str, tune: Path, tmp_path: Path):
    client = Client(quick, verbose=False, download_files=str(tmp_path))
    files, result = client.predict(source=handle_file(tune), format="wav", api_name="/export")
    assert [Path(file).read_bytes()[:4] for file in files] == [b"RIFF"]
    assert set(result) == {"kind", "mode", "facts", "notes"}
    files, result = client.predict(source=handle_file(tune), target_lufs=-16, api_name="/master")
    assert result["facts"]["after_lufs"] == LOUDER["after_lufs"]
    files, result = client.predict(source=handle_file(tune), api_name="/stems")
    assert len(files) == 3
    assert result["notes"] == [CARD.stems]
    stolen = {"path": "/etc/passwd"}
    for mode in ("export", "master", "stems"):
        called = httpx.post(f"{quick}gradio_api/call/v2/{mode}", json={"source": stolen})
        address = f"{quick}gradio_api/call/{mode}/{called.json()['event_id']}"
        response = httpx.get(address, timeout=30).text
        assert "was not uploaded to this page" in response
        assert "root:" not in response
