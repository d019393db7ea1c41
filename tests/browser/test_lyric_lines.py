"""The lyrics below the player, in a real browser on the fake studio."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from browsing import fits

if TYPE_CHECKING:
    from playwright.sync_api import Page

LYRICS = "[verse]\nFirst line of the song\nSecond line\na silent one\n" + "la " * 40
CURRENT = "[...document.querySelectorAll('#generate-lines button')].findIndex(b => b.ariaCurrent)"


def _is_current(page: Page, line: int) -> None:
    page.wait_for_function(f"{CURRENT} === {line}")


def test_lines_light_up_as_they_are_played_and_seek_by_mouse_and_keyboard(open_at, quick):
    page = open_at(quick, 320, "")
    page.locator("#generate-prompt textarea").fill("a waltz")
    page.locator("#generate-lyrics textarea").fill(LYRICS)
    page.locator("#generate-run").click()
    lines = page.locator("#generate-lines button")
    lines.nth(3).wait_for()
    assert lines.count() == 4
    assert "probably not sung" in lines.nth(2).inner_text()
    assert "probably not sung" not in lines.nth(1).inner_text()
    page.wait_for_function(
        "document.querySelector('#generate-player #duration').textContent !== '0:00'"
    )
    lines.nth(1).click()
    page.wait_for_function(
        "document.querySelector('#generate-player #time').textContent === '0:08'"
    )
    _is_current(page, 1)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    _is_current(page, 0)
    page.wait_for_function(
        "document.querySelector('#generate-player #time').textContent === '0:00'"
    )
    page.keyboard.press("End")
    assert lines.nth(3).evaluate("line => line === document.activeElement")
    lines.nth(0).press("Enter")
    page.locator("#generate-player button[aria-label=Play]").click()
    # Between two lines none is current: the player alone says so.
    page.wait_for_function(f"{CURRENT} === -1")
    _is_current(page, 1)
    assert fits(page)
    with page.expect_download() as download:
        page.locator("#generate-lrc").click()
    assert Path(download.value.path()).read_text("utf-8").startswith("[00:00.00]First line")
    page.locator("#generate-lyrics textarea").fill("")
    page.locator("#generate-run").click()
    page.locator("#generate-lines .lyric-lines[data-state=empty]").wait_for(state="attached")
    page.locator("#generate-lrc").wait_for(state="hidden")
