"""The page below a path prefix, behind a real nginx with the configuration in docs/nginx.conf."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from browsing import ROOT, responds, serving, state, upload, wait
from gradio_client import Client, handle_file

import tooltips

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

CONFIG = """
{user}
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        # The icon that browsers ask a site for is the site's own affair.
        location = /favicon.ico {{ return 204; }}
        {locations}
    }}
}}
"""


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page behind nginx."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        reason = "no nginx on this computer: the page behind a proxy was not tested"
        if os.environ.get("ACE_REQUIRE_NGINX") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("nginx")
    fake = str(ROOT / "tests" / "fake_studio.py")
    with serving(folder, fake, "PORT", "/music") as direct, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        example = (ROOT / "docs" / "nginx.conf").read_text("utf-8")
        locations = example.replace("http://127.0.0.1:7860/", direct)
        assert locations != example
        config = folder / "nginx.conf"
        user = "user root;" if os.getuid() == 0 else ""  # else workers cannot access `folder`
        config.write_text(CONFIG.format(user=user, folder=folder, port=port, locations=locations))
        nginx = subprocess.Popen([program, "-p", str(folder), "-c", str(config)])
        try:
            address = f"http://127.0.0.1:{port}/music/"
            wait(lambda: nginx.poll() is not None or responds(address), 30)
            assert nginx.poll() is None, (folder / "error.log").read_text()
            yield address
        finally:
            nginx.terminate()
            nginx.wait(10)


def test_the_prefix_without_a_slash_redirects(proxied: str):
    response = httpx.get(proxied.rstrip("/"))
    assert (response.status_code, response.headers["location"]) == (301, proxied)


def test_the_api_takes_and_returns_files_below_a_prefix(proxied: str, tune: Path, tmp_path: Path):
    client = Client(proxied, verbose=False, download_files=str(tmp_path))
    song, take = client.predict(source=handle_file(tune), prompt="brass", api_name="/cover")
    assert Path(song).read_bytes()[:4] == b"RIFF"
    assert take["request"]["source"] == tune.name


def test_the_page_works_below_a_prefix(open_at: Callable[..., Page], proxied: str, tune: Path):
    """`open_at` fails on any request outside the prefix, and on any that fails."""
    page = open_at(proxied, 1440, "?tab=extend")
    upload(page, "extend-source", tune)
    page.locator("#extend-source-look .play").click()
    sound = page.locator("#extend-source-look audio")
    wait(lambda: sound.evaluate("e => e.duration > 0"), 60)
    for count in (1, 2):
        page.locator("#extend-run").click()
        page.wait_for_function(
            f"document.querySelectorAll('#extend-shelf label').length === {count}"
        )
        state(page, "done", "extend").wait_for()
    player = page.locator("#extend-player #waveform audio")
    player.wait_for(state="attached")
    wait(lambda: player.evaluate("e => e.duration > 0"), 60)
    with page.expect_download() as saved:
        page.locator("#extend-wav").click()
    assert Path(saved.value.path()).read_bytes()[:4] == b"RIFF"

    page.locator("#t-extend").get_by_role("button", name=tooltips.COMPARE).click()
    page.locator("#extend-compare").click()
    # Watched rather than polled: the takes are short, and the clock starts over at their end.
    page.locator("#extend-ab .clock").evaluate(
        """clock => new MutationObserver(() => { window.played ||= clock.textContent !== '0:00'; })
            .observe(clock, {childList: true, characterData: true, subtree: true})"""
    )
    page.get_by_role("button", name=tooltips.AB_PLAYER["play"], exact=True).last.click()
    page.wait_for_function("window.played")
