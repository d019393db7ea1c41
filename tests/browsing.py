"""Fixtures and helpers of the browser tests: Chromium, page servers and page state."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_studio import write_tone

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--mute-audio",
]
ROOT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT")
"""Set to a dead address during the tests: the page must neither use nor depend on them."""
WIDTHS = {1440: 900, 820: 1180, 390: 844}

GREY = """() => {
  const coloured = [];
  for (const node of document.querySelectorAll("body, body *")) {
    if (!node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    for (const part of ["color", "backgroundColor", "borderTopColor", "outlineColor", "fill"]) {
      const rgb = style[part].match(/^rgba?\\((\\d+), (\\d+), (\\d+)(?:, ([\\d.]+))?/);
      if (!rgb || rgb[4] === "0") continue;
      const [low, high] = [Math.min(...rgb.slice(1, 4)), Math.max(...rgb.slice(1, 4))];
      if (high - low > 2) coloured.push(`${node.tagName}.${node.className} ${part} ${style[part]}`);
    }
  }
  return coloured;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None or not importlib.util.find_spec("playwright"):
        reason = "no Chromium (or no playwright) on this computer: the page was not tested"
        if os.environ.get("ACE_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


OF_LEAVING = ("AbortError: signal is aborted", "Connection errored out")
"""What Gradio logs of requests that end because the page is left or reloaded."""


@contextmanager
def serving(folder: Path, *command: str) -> Iterator[str]:
    """Start a page server and yield its address; its process group is killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = folder / "log"
    with log.open("w") as out:
        app = subprocess.Popen(
            [sys.executable, *(part.replace("PORT", port) for part in command)],
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                **dict.fromkeys(PROXY_VARIABLES, "http://127.0.0.1:9"),
                "HF_HUB_OFFLINE": "0",
                "NO_PROXY": "127.0.0.1",
                "XDG_CACHE_HOME": str(folder),
            },
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        wait(lambda: app.poll() is not None or responds(address), 120)
        assert app.poll() is None, log.read_text()
        yield address
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        os.killpg(app.pid, signal.SIGTERM)
        try:
            app.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(app.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def _real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    app = (str(ROOT / "app.py"), "--model", "mini", "--port", "PORT")
    with serving(tmp_path_factory.mktemp("studio"), *app) as address:
        yield address


@pytest.fixture(scope="session")
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    fake = str(ROOT / "tests" / "fake_studio.py")
    with serving(tmp_path_factory.mktemp("quick"), fake, "PORT") as address:
        yield address


@pytest.fixture(scope="module")
def url(browser: Browser, request: pytest.FixtureRequest) -> str:
    """Address of `python app.py`, one server for all tests: each page is a separate visitor."""
    return request.getfixturevalue("_real")


@pytest.fixture(scope="module")
def quick(browser: Browser, request: pytest.FixtureRequest) -> str:
    """Address of the same page on the fake studio, which responds at once."""
    return request.getfixturevalue("_quick")


@pytest.fixture(scope="module")
def tune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "my tune.wav"
    write_tone(path, 21 * 48_000, 330)
    return path


@pytest.fixture
def open_at(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page at a width; fail at the end on any error or request to another address."""
    problems: list[str] = []
    contexts = []

    def open_page(url: str, width: int, query: str) -> Page:
        context = browser.new_context(viewport={"width": width, "height": WIDTHS.get(width, 700)})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on(
            "console",
            lambda m: (
                problems.append(f"console: {m.text}")
                if m.type == "error" and not any(text in m.text for text in OF_LEAVING)
                else None
            ),
        )
        page.on("pageerror", lambda e: problems.append(f"script: {e}"))
        page.on(
            "request",
            lambda r: (
                None
                if r.url.startswith((url, "data:", "blob:"))
                else problems.append(f"outside: {r.url}")
            ),
        )
        page.on(
            "response",
            lambda r: problems.append(f"{r.status}: {r.url}") if r.status >= 400 else None,
        )
        page.goto(url + query)
        page.locator(".actions button.primary:visible").wait_for()
        page.locator(".announcement[aria-live]").first.wait_for(state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def responds(address: str) -> bool:
    """Whether a server at `address` returns status 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(address, timeout=2).status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait(done: Callable[[], bool], timeout_s: float) -> None:
    """Poll `done` until it is true; AssertionError after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"timed out after {timeout_s} s"
        time.sleep(0.1)


def state(page: Page, state: str, mode: str = "generate") -> Locator:
    """The status line of a tab when it is in `state`."""
    return page.locator(f"#{mode}-status [data-state={state}]")


def upload(page: Page, field: str, path: Path) -> Locator:
    """Choose a file for a field and wait until the studio has inspected it."""
    page.locator(f"#{field} input[type=file]").set_input_files(path)
    preview = page.locator(
        f"#{field}-look .upload-preview:is([data-state=ready], [data-state=refused])"
    )
    preview.wait_for()
    return preview


def fits(page: Page) -> bool:
    """Whether the page needs no horizontal scrolling."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def at_widths(page: Page, *more: int) -> Iterator[int]:
    """Resize the page to desktop, tablet and phone width in turn, then restore its size."""
    before = page.viewport_size
    for width in (*more, *WIDTHS):
        page.set_viewport_size({"width": width, "height": WIDTHS.get(width, 700)})
        yield width
    page.set_viewport_size(before)


def fits_all(page: Page) -> bool:
    """Whether the page fits at every width and contains no colour."""
    return {fits(page) for _ in at_widths(page, 320)} == {True} and page.evaluate(GREY) == []
