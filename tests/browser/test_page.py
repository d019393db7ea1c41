"""The page in a real browser: full user flows at desktop, tablet and phone widths."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import GREY, at_widths, fits, fits_all, state, upload, wait

import tooltips
from core.requests import Generate

if TYPE_CHECKING:
    from playwright.sync_api import FileChooser, Locator, Page

pytestmark = pytest.mark.browser


@pytest.fixture
def visit(open_at: Callable[..., Page], url: str) -> Callable[..., Page]:
    """Open the page of the real studio."""
    return lambda width=1440, query="": open_at(url, width, query)


@pytest.fixture
def visit_fake(open_at: Callable[..., Page], quick: str) -> Callable[..., Page]:
    """Open the page of the fake studio on the given tab."""
    return lambda tab, width=1440: open_at(quick, width, f"?tab={tab}")


def _region(page: Page) -> tuple[float, float]:
    """From and To in seconds; value, label and `aria-valuetext` must agree."""
    ends = []
    for name in ("From", "To"):
        slider = page.get_by_role("slider", name=name, exact=True)
        at = float(slider.input_value())
        assert slider.get_attribute("aria-valuetext") == f"{at:.1f} s"
        row = page.locator("#edit-source-look label", has_text=name)
        assert row.locator(".value").inner_text() == f"{at:.1f} s"
        ends.append(at)
    return ends[0], ends[1]


def _box(page: Page, param: str, mode: str = "generate") -> Locator:
    return page.locator(f"#{mode}-{param} textarea")


def _fill_form(page: Page, style: str, length: float = 5) -> None:
    _box(page, "prompt").fill(style)
    box = page.locator("#generate-duration_s input[type=number]")
    box.fill(str(length))
    box.press("Tab")


def _takes(page: Page) -> Locator:
    return page.locator("#generate-shelf label")


def test_generate_play_retake_and_stop_work_on_a_phone(visit: Callable[..., Page]):
    page = visit(390)
    run, stop = page.locator("#generate-run"), page.locator("#generate-stop")
    assert page.get_by_role("heading", level=1).inner_text().lower() == tooltips.TITLE.lower()
    assert "mini" in page.locator("#masthead .badge").inner_text()
    assert page.locator("#generate-empty").is_visible()
    assert stop.is_disabled()
    assert fits(page)
    vocals, instrumental = page.locator("#generate-instrumental input").all()
    assert vocals.is_disabled(), "the embedded model cannot sing"
    assert instrumental.is_checked()
    assert instrumental.is_enabled()

    _fill_form(page, "warm lofi piano, vinyl crackle", 30)
    run.click()
    seen: list[str] = []
    state(page, "running").wait_for()
    wait(run.is_disabled, 10)
    while not state(page, "done").count():
        assert not state(page, "failed").count(), page.locator("#generate-status").inner_text()
        message = page.locator("#generate-status p").inner_text()
        seen += [message] if message not in seen else []
        page.wait_for_timeout(50)
    assert any(re.search(r"step \d+ of \d+", message) for message in seen)
    assert any("left" in message for message in seen)

    sound = page.locator("#generate-player #waveform audio")
    sound.wait_for(state="attached")
    wait(lambda: sound.evaluate("e => e.duration > 0"), 60)
    assert sound.evaluate("e => e.duration") == pytest.approx(30, abs=0.01)
    play = page.locator("#generate-player").get_by_label("Play", exact=True)

    def plays() -> bool:
        if play.count():  # on a busy machine the player may miss the first click
            play.click()
        page.wait_for_timeout(400)
        return sound.evaluate("e => e.currentTime > 0.2")

    wait(plays, 60)
    page.locator("#generate-player").get_by_label("Pause").click()
    assert fits(page)

    page.get_by_role("button", name=tooltips.RETAKE).click()
    page.wait_for_function("document.querySelectorAll('#generate-shelf label').length === 2")
    first, second = (re.search(r"seed (\d+)", take.inner_text())[1] for take in _takes(page).all())
    assert first != second
    _takes(page).nth(1).click()
    page.wait_for_function(
        f"document.querySelector('#generate-facts').innerText.includes('{second}')"
    )

    _fill_form(page, "an endless drone", 240)
    run.click()
    page.wait_for_function(
        "/step [1-9]/.test(document.querySelector('#generate-status').innerText)"
    )
    stop.click()
    pressed = time.monotonic()
    state(page, "stopped").wait_for()
    assert time.monotonic() - pressed < 10
    assert tooltips.CANCELLED in page.locator("#generate-status").inner_text()
    assert run.is_enabled()
    assert stop.is_disabled()
    assert _takes(page).count() == 2
    assert _box(page, "prompt").input_value() == "an endless drone"
    assert fits_all(page)


TAB_WIDTHS = {320: (290, 320), 1440: (180, 220), 820: (48, 72), 390: (360, 390)}
"""Minimum and maximum width of the tab bar by page width, in pixels."""


def test_no_element_overflows_the_page_with_advanced_settings_open(
    visit_fake: Callable[..., Page],
):
    page = visit_fake("generate")
    page.get_by_role("button", name=tooltips.ADVANCED).click()
    page.locator("#generate-vocal_language").wait_for()
    for width in at_widths(page, 320):
        page.evaluate("scrollTo(0, 0)")
        assert fits(page)
        for param in Generate.params():
            box = page.locator(f"#generate-{param.name}").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        controls = page.locator(".job-controls").bounding_box()
        bottom = controls["y"] + controls["height"]
        assert bottom <= page.viewport_size["height"] + 1, "the job controls are always visible"
        # The tabs are a column with labels, a column of icons or a row.
        narrowest, widest = TAB_WIDTHS[width]
        tab_width = page.locator("#studio > .tab-wrapper").bounding_box()["width"]
        assert narrowest <= tab_width <= widest
        tab = page.get_by_role("tab", name=tooltips.MODES["generate"])
        assert tab.get_attribute("aria-selected") == "true"
        assert tab.bounding_box()["height"] >= 44


def test_the_form_is_usable_by_keyboard_with_visible_focus(
    visit_fake: Callable[..., Page],
):
    page = visit_fake("generate")
    _box(page, "prompt").focus()
    _box(page, "prompt").press("Tab")
    page.keyboard.press("ArrowRight")
    page.locator("#generate-lyrics").wait_for(state="hidden")
    page.keyboard.press("ArrowLeft")
    page.locator("#generate-lyrics").wait_for()
    assert page.get_by_role("textbox", name="Style", exact=True).count() == 1
    reached = set()
    page.locator("#masthead a.skip").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id^=generate-]')?.id"))
        outlined = page.evaluate(
            "(() => { const s = getComputedStyle(document.activeElement);"
            "const p = document.activeElement.closest('label');"
            "return s.outlineStyle !== 'none' || s.boxShadow !== 'none'"
            " || s.borderColor === 'rgb(255, 255, 255)'"
            " || (p && getComputedStyle(p).outlineStyle !== 'none'); })()"
        )
        assert outlined or page.evaluate("document.activeElement === document.body"), page.evaluate(
            "document.activeElement.outerHTML"
        )
    assert {"generate-prompt", "generate-lyrics", "generate-duration_s", "generate-run"} <= reached
    _fill_form(page, "a tune by keyboard")
    _box(page, "prompt").press("Control+Enter")
    state(page, "done").wait_for()


def test_an_empty_style_shows_an_error_and_keeps_what_was_typed(
    visit_fake: Callable[..., Page],
):
    page = visit_fake("generate")
    _box(page, "lyrics").fill("[verse]\nlines I would hate to lose")
    page.get_by_role("button", name=tooltips.ADVANCED).click()
    _box(page, "bpm").fill("fast")
    page.locator("#generate-run").click()
    state(page, "failed").wait_for()
    assert "The style is empty." in page.locator("#generate-status").inner_text()
    assert page.get_by_test_id("toast-text").inner_text().startswith("The style is empty.")
    _box(page, "prompt").fill("a waltz")
    page.locator("#generate-run").click()
    page.wait_for_function(
        "document.querySelector('#generate-status').innerText.includes('Tempo must be a whole number')"
    )
    assert "hate to lose" in _box(page, "lyrics").input_value()
    assert _box(page, "bpm").input_value() == "fast"
    assert page.locator("#generate-run").is_enabled()
    assert not page.evaluate(GREY), "errors are grey too"


def test_opening_advanced_settings_leaves_seed_and_tempo_automatic(visit: Callable[..., Page]):
    page = visit()
    for _ in range(2):
        page.get_by_role("button", name=tooltips.ADVANCED).click()
        page.wait_for_timeout(300)
    _fill_form(page, "a waltz")
    page.locator("#generate-run").click()
    state(page, "done").wait_for()
    settings = page.locator("#generate-facts").inner_text().partition(tooltips.AS_RUN.upper())[2]
    assert "Tempo" not in settings.partition("MADE WITH")[0]
    assert not re.search(r"Seed\s+0\b", settings)


def test_closing_the_page_frees_the_device(visit: Callable[..., Page]):
    closed, next_one = visit(), visit()
    _fill_form(closed, "an endless drone", 240)
    closed.locator("#generate-run").click()
    closed.wait_for_function(
        "/step [1-9]/.test(document.querySelector('#generate-status').innerText)"
    )
    closed.close()
    _fill_form(next_one, "a waltz")
    next_one.locator("#generate-run").click()
    state(next_one, "done").wait_for(timeout=30_000)
    assert _takes(next_one).count() == 1


def test_the_page_is_grey_english_and_loads_its_own_fonts(visit: Callable[..., Page]):
    page = visit()
    page.get_by_role("button", name=tooltips.ADVANCED).click()
    assert page.evaluate(GREY) == []
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(10, 10, 10)"
    ticked = "getComputedStyle(document.querySelector('input:checked[type=checkbox]'))"
    assert "0A0A0A" in page.evaluate(f"{ticked}.backgroundImage"), "a dark tick on a white box"
    fonts = page.evaluate("document.fonts.ready.then(all => [...all].map(f => f.status))")
    assert fonts
    assert "error" not in fonts
    assert page.evaluate("document.fonts.check('600 16px Inter')")


def _axe(page: Page) -> list:
    """Accessibility violations that axe reports at desktop and phone width."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="the accessibility checker is not installed"
    )
    page.wait_for_function("document.getAnimations().every(a => a.playState === 'finished')")
    found = []
    for width in at_widths(page):
        if width != 820:
            found += axe.Axe().run(page).response["violations"]
    return [(v["id"], v["nodes"][0]["html"][:120]) for v in found]


def test_axe_reports_no_violations_on_the_generate_tab(visit: Callable[..., Page]):
    page = visit(1440)
    page.emulate_media(reduced_motion="reduce")  # a label fading in has too little contrast
    page.get_by_role("button", name=tooltips.ADVANCED).click()
    _fill_form(page, "a waltz", 5)
    page.locator("#generate-run").click()
    state(page, "done").wait_for()
    page.locator("#generate-player #waveform audio").wait_for(state="attached")
    page.get_by_role("button", name=tooltips.EXPORT_PANEL).click()
    page.locator("#generate-export").wait_for()
    assert _axe(page) == []


def test_a_take_is_sent_from_cover_to_extend_to_edit(visit_fake: Callable[..., Page], tune: Path):
    page = visit_fake("cover", 390)
    page.locator("#cover-run").click()
    state(page, "failed", "cover").wait_for()
    assert "No file was chosen for Source audio." in page.locator("#cover-status").inner_text()
    assert page.locator("#cover-strength").is_hidden()

    seen = upload(page, "cover-source", tune)
    assert "0:21.0 · 48 kHz · stereo" in seen.inner_text()
    page.locator("#cover-strength").wait_for()
    assert page.locator("#cover-duration_s").is_hidden()
    _box(page, "prompt", "cover").fill("brass band")
    for mode, next_one in (("cover", "extend"), ("extend", "edit"), ("edit", None)):
        page.locator(f"#{mode}-run").click()
        state(page, "done", mode).wait_for()
        facts = page.locator(f"#{mode}-facts").inner_text()
        assert tooltips.DETECTED.upper() in facts
        assert "/" not in facts.split("MADE WITH")[0].replace("4/4", ""), "no path"
        assert fits_all(page)
        if next_one is None:
            continue
        page.locator(f"#{mode}-to-{next_one}").click()
        page.locator(f"#{next_one}-source-look [data-state=ready]").wait_for()
        tab = page.get_by_role("tab", name=tooltips.MODES[next_one])
        assert tab.get_attribute("aria-selected") == "true"
        assert page.evaluate("document.activeElement.id") == f"t-{next_one}-button"
        assert _box(page, "prompt", next_one).input_value() == "brass band"
        assert fits(page)
    assert "Outside the region\n0 samples changed" in re.sub(r"\n+", "\n", facts)
    assert re.search(r"Seam at 3.4 s\s+good", facts)


def test_the_real_studio_generates_covers_extends_and_edits_a_song(visit: Callable[..., Page]):
    """Send one song through every tab on the embedded model and check the facts of each take."""
    page = visit(820)
    _fill_form(page, "calm ambient pads")
    page.locator("#generate-run").click()
    state(page, "done").wait_for()
    before = "generate"
    for mode in ("cover", "extend", "edit"):
        page.locator(f"#{before}-to-{mode}").click()
        page.locator(f"#{mode}-source-look [data-state=ready]").wait_for()
        if mode == "extend":
            page.locator("#extend-after_s input[type=number]").fill("4")
            page.locator("#extend-after_s input[type=number]").press("Tab")
        page.locator(f"#{mode}-run").click()
        page.locator(
            f"#{mode}-status [data-state=done], #{mode}-status [data-state=failed]"
        ).wait_for()
        facts = page.locator(f"#{mode}-facts").inner_text()
        assert tooltips.DETECTED.upper() in facts, page.locator(f"#{mode}-status").inner_text()
        if mode != "cover":
            assert "0 samples changed" in facts
        before = mode
    assert "9 s" in facts


def test_a_take_can_be_sent_to_a_tab_not_opened_before(visit_fake: Callable[..., Page]):
    page = visit_fake("generate")
    _fill_form(page, "a waltz")
    page.locator("#generate-run").click()
    state(page, "done").wait_for()
    page.locator("#generate-to-cover").click()
    page.locator("#cover-source-look [data-state=ready]").wait_for()
    assert "0:05.0" in page.locator("#cover-source-look").inner_text()
    assert tooltips.HELP["reference"] in page.locator("#cover-reference-look").inner_text()
    assert page.locator("#cover-reference-look .play").is_hidden()
    assert _box(page, "prompt", "cover").input_value() == "a waltz"


def test_reload_and_back_bring_back_what_was_typed_and_the_takes(visit_fake: Callable[..., Page]):
    page, lyrics = visit_fake("generate"), "[Verse]\nStreetlights hum"
    _box(page, "lyrics").fill(lyrics)
    _fill_form(page, "lofi")
    page.locator("#generate-run").click()
    _takes(page).first.wait_for()

    def comes_back() -> None:
        _takes(page).first.wait_for()
        wait(lambda: _box(page, "lyrics").input_value() == lyrics, 20)
        assert _box(page, "prompt").input_value() == "lofi"

    page.goto("data:text/html,elsewhere")
    page.go_back()
    comes_back()
    with page.expect_navigation():  # the event of a page that the browser kept in memory: a reload
        page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    comes_back()


def test_a_region_is_set_by_mouse_and_keyboard_and_previewed(
    visit_fake: Callable[..., Page], tune: Path
):
    page = visit_fake("edit")
    upload(page, "edit-source", tune)
    assert _region(page) == (7, 14)
    start, end = (page.get_by_role("slider", name=name, exact=True) for name in ("From", "To"))
    for slider, keys, expected in (
        (start, ["ArrowRight"], (7.1, 14)),
        (start, ["Shift+ArrowRight", "ArrowUp"], (8.2, 14)),
        (start, ["ArrowLeft", "Shift+ArrowDown"], (7.1, 14)),
        (end, ["Shift+ArrowLeft", "ArrowLeft"], (7.1, 12.9)),
        (end, ["End"], (7.1, 21)),
        (start, ["Home"], (0, 21)),
        (start, ["End"], (20.9, 21)),
        (end, ["Home"], (20.9, 21)),
        (start, ["Home"], (0, 21)),
        (end, ["Home"], (0, 0.1)),
    ):
        slider.focus()
        for key in keys:
            page.keyboard.press(key)
        assert _region(page) == pytest.approx(expected), keys
    canvas = page.locator("#edit-source-look canvas")
    box = canvas.bounding_box()
    middle = box["y"] + box["height"] / 2

    def at(seconds: float) -> float:
        return box["x"] + box["width"] * seconds / 21

    page.mouse.move(at(12), middle)
    page.mouse.down()
    page.mouse.move(at(9), middle)
    page.mouse.move(at(6), middle)
    page.mouse.up()
    assert _region(page) == pytest.approx((6, 12), abs=0.15)
    page.mouse.move(at(12), middle)
    page.mouse.down()
    page.mouse.move(at(7), middle, steps=3)
    page.mouse.up()
    start_s, end_s = _region(page)
    assert (start_s, end_s) == pytest.approx((6, 7), abs=0.15), (
        "the nearest edge moves, the other stays"
    )

    sound = page.locator("#edit-source-look audio")
    page.locator("#edit-source-look .play").click()
    wait(lambda: sound.evaluate("e => !e.paused && e.currentTime") > start_s, 30)
    assert page.locator("#edit-source-look .play").inner_text() == tooltips.PREVIEW["stop"]
    wait(lambda: sound.evaluate("e => e.paused"), 30)
    assert end_s <= sound.evaluate("e => e.currentTime") < end_s + 0.5

    page.locator("#edit-run").click()
    state(page, "done", "edit").wait_for()
    facts = page.locator("#edit-facts").inner_text()
    assert re.search(rf"From\s+{start_s:g} s\s+To\s+{end_s:g} s", facts)
    page.locator("#edit-kind label").nth(1).click()
    page.locator("#edit-n_max").wait_for()
    assert page.get_by_role("slider", name="From").count() == 0
    assert page.locator("#edit-repaint_mode").is_hidden()
    page.locator("#edit-kind label").nth(0).click()
    page.locator("#edit-n_max").wait_for(state="hidden")
    assert _region(page) == (start_s, end_s), "the region is kept"
    page.locator("#edit-source .icon-button").click()
    page.locator("#edit-source-look [data-state=empty]").wait_for()
    assert page.get_by_role("slider", name="From").count() == 0


def test_files_are_chosen_by_keyboard_or_drop_and_removed(
    visit_fake: Callable[..., Page], tune: Path
):
    page = visit_fake("cover")
    choosers: list[FileChooser] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))

    def opens_chooser() -> bool:  # on a busy machine the button may miss the first press
        page.get_by_role("button", name="Source audio: choose a file, or drop it here").focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(400)
        return bool(choosers)

    wait(opens_chooser, 60)
    choosers[0].set_files(tune)
    page.locator("#cover-source-look [data-state=ready]").wait_for()
    page.get_by_role("button", name="Source audio: remove the file").focus()
    page.keyboard.press("Enter")
    page.locator("#cover-source-look [data-state=empty]").wait_for()
    page.locator("#cover-strength").wait_for(state="hidden")

    dropped = page.evaluate_handle(
        "() => { const data = new DataTransfer();"
        "data.items.add(new File(['dear diary'], 'notes.txt')); return data; }"
    )
    target = page.locator("#cover-reference .upload-container")
    target.dispatch_event("drop", {"dataTransfer": dropped})
    refused = page.locator("#cover-reference-look [data-state=refused]")
    refused.wait_for()
    assert "notes.txt cannot be read as audio" in refused.inner_text()
    assert refused.locator("[role=status]").count() == 1, "announced to screen readers"
    target.wait_for()
    page.locator("#cover-run").click()
    state(page, "failed", "cover").wait_for()
    assert "Choose an audio file" in page.locator("#cover-status").inner_text()


def test_inspire_fills_the_form_and_can_be_stopped(visit_fake: Callable[..., Page]):
    page = visit_fake("generate", 390)
    idea = page.get_by_role("textbox", name="Idea")
    idea.fill("slow rain")
    page.get_by_role("button", name=tooltips.HELPERS["inspire"]).click()
    state(page, "running").wait_for()
    page.locator("#generate-stop").click()
    state(page, "stopped").wait_for()
    assert _box(page, "prompt").input_value() == ""
    idea.fill("rain")
    page.get_by_role("button", name=tooltips.HELPERS["inspire"]).click()
    state(page, "done").wait_for()
    assert "Filled in: Style, Lyrics" in page.locator("#generate-status").inner_text()
    assert _box(page, "prompt").input_value() == "Slow warm synthwave, gated drums"
    assert page.locator("#generate-duration_s input[type=number]").input_value() == "42"


def test_lyrics_stream_while_written_can_be_repaired_and_used(visit_fake: Callable[..., Page]):
    page = visit_fake("lyrics", 390)
    draft, run = page.locator("#lyrics-draft textarea"), page.locator("#lyrics-run")
    page.locator("#lyrics-brief textarea").fill("slow rain")
    run.click()
    page.wait_for_function("document.querySelector('#lyrics-draft textarea')?.value.length > 9")
    page.locator("#lyrics-stop").click()
    state(page, "stopped", "lyrics").wait_for()
    assert draft.input_value().startswith("[Verse]"), "the partial draft is kept"
    page.locator("#lyrics-brief textarea").fill("rain")
    run.click()
    page.locator("#lyrics-status", has_text="1 of 2 sections, not as requested").wait_for()
    page.locator("#lyrics-repair").click()
    page.locator("#lyrics-status", has_text="2 of 2 sections, as requested").wait_for()
    assert page.locator("#lyrics-repair").is_disabled()
    draft.fill("[Verse]\nmy own line")
    page.locator("#lyrics-use").click()
    page.locator("#generate-lyrics textarea").wait_for()
    assert _box(page, "lyrics").input_value() == "[Verse]\nmy own line"
    assert page.evaluate("document.activeElement.id") == "t-generate-button"
    assert fits_all(page)


def test_the_badge_opens_the_models_in_a_dialog_for_keyboards(visit_fake: Callable[..., Page]):
    page = visit_fake("generate")
    page.locator("#masthead .badge").focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name=tooltips.MODELS["title"])
    dialog.locator(".row").first.wait_for()
    inside = (
        "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
    )
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate(inside), "the focus stays in the dialog"
    page.get_by_role("button", name="Download: ACE-Step 5Hz planner 0.6B").click()
    page.get_by_role("button", name="Stop: ACE-Step 5Hz planner 0.6B").click()
    page.get_by_role("button", name="Resume: ACE-Step 5Hz planner 0.6B").wait_for()
    for _ in at_widths(page, 320):
        assert dialog.evaluate("node => node.scrollWidth <= node.clientWidth")
    assert _axe(page) == []
    assert fits_all(page)
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert page.evaluate("document.activeElement.className") == "badge"


def test_axe_reports_no_violations_on_the_edit_and_cover_tabs(
    visit_fake: Callable[..., Page], tune: Path
):
    page = visit_fake("edit", 1440)
    page.emulate_media(reduced_motion="reduce")
    for mode in ("edit", "cover"):
        page.locator(f"#t-{mode}-button").click()
        page.locator(f"#{mode}-run").wait_for()
        upload(page, f"{mode}-source", tune)
        page.locator(f"#t-{mode}").get_by_role("button", name=tooltips.ADVANCED).click()
        page.locator(f"#{mode}-run").click()
        state(page, "done", mode).wait_for()
        page.locator(f"#{mode}-player #waveform audio").wait_for(state="attached")
        assert _axe(page) == []
        assert page.evaluate(GREY) == []
