"""The adapter picker in a real browser on the real studio: upload, strength, removal, replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import fits_all, state
from trained import pair, write

import tooltips

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.browser

QUICK = (
    "inference_steps=2&thinking=false"
    "&use_cot_caption=false&use_cot_metas=false&use_cot_language=false"
)


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters that fit the embedded model, one that does not, and a pickle."""
    folder = tmp_path_factory.mktemp("adapters")
    write(folder / "warm.safetensors", pair())
    write(folder / "cold.safetensors", pair("layers.1.self_attn.q_proj", rank=8))
    write(folder / "wide.safetensors", pair(into=2560, out=4096))
    (folder / "old.pt").write_bytes(b"PK\3\4 and so on, for more than a header")
    return folder


def _choose(page: Page, *files: Path) -> None:
    page.locator("#generate-adapters-file input[type=file]").set_input_files(files)


def _row(page: Page, name: str) -> Locator:
    return page.locator("#generate-adapters .row", has_text=name)


def test_adapters_are_uploaded_applied_removed_and_restored_by_keyboard(
    open_at: Callable[..., Page], url: str, adapter_files: Path
):
    page = open_at(url, 390, f"#prompt=warm%20lofi%20piano&duration_s=5&{QUICK}")
    page.locator(".restore[data-state=ready]").wait_for()
    page.locator("#t-generate .advanced > button").click()
    message = page.locator("#generate-adapters .message")

    for bad, problem in (
        ("old.pt", "it is a pickle"),
        ("wide.safetensors", "it was made for width 2560, and this model has 256"),
    ):
        _choose(page, adapter_files / bad)
        page.locator("#generate-adapters [data-state=refused]").wait_for()
        page.wait_for_function(
            "problem => document.querySelector('#generate-adapters .message').innerText.includes(problem)",
            arg=problem,
        )
        assert str(adapter_files) not in message.inner_text()
    assert page.locator("#generate-adapters .row").count() == 0

    _choose(page, adapter_files / "warm.safetensors", adapter_files / "cold.safetensors")
    _row(page, "cold.safetensors").wait_for()
    assert message.inner_text() == "Added cold.safetensors"
    assert "rank 4 · 1 layer" in _row(page, "warm.safetensors").inner_text()
    slider = page.get_by_role("slider", name="Strength: warm.safetensors")
    assert slider.get_attribute("aria-valuetext") == "1.00"
    slider.focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "0.80"
    assert slider.evaluate("e => e === document.activeElement"), "the slider was not re-rendered"
    assert fits_all(page)

    page.get_by_role("button", name="Remove: cold.safetensors").focus()
    page.keyboard.press("Enter")
    _row(page, "cold.safetensors").wait_for(state="detached")
    assert message.inner_text() == "Removed cold.safetensors"
    kept = page.get_by_role("button", name="Remove: warm.safetensors")
    assert kept.evaluate("e => e === document.activeElement")

    page.locator("#generate-run").click()
    state(page, "done").wait_for(timeout=120_000)
    facts = page.locator("#generate-facts").inner_text()
    assert "warm.safetensors at 0.8 (rank 4, 1 layers, sha256 " in facts
    assert "cold" not in facts
    assert "Adapters warm.safetensors 0.8" in page.locator("#generate-shelf").inner_text()

    kept.press("Enter")
    assert page.locator("#generate-adapters .row").count() == 0
    page.get_by_role("button", name=tooltips.REUSE).click()
    _row(page, "warm.safetensors").wait_for()
    assert slider.get_attribute("aria-valuetext") == "0.80"
    assert fits_all(page)
