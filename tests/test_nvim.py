"""The Neovim plugin, in the real editor: against a scripted daemon, and against the studio's own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "nvim" / "tests"

EDITORS = os.environ.get("ACE_NVIM", "nvim").split(os.pathsep)
"""Editors to test with. ACE_NVIM names others, with `:` between them."""


@pytest.fixture(params=EDITORS)
def editor(request, tmp_path) -> list[str]:
    """The command of an editor that has this plugin and nothing of the person's."""
    found = shutil.which(request.param)
    if not found:
        if os.environ.get("ACE_REQUIRE_NVIM"):
            pytest.fail(f"{request.param} is not here, and ACE_REQUIRE_NVIM is set")
        pytest.skip(f"{request.param} is not here")
    return [found, "--headless", "-u", str(TESTS / "init.lua")]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of an editor whose home is `folder`."""
    own = ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOFI_")}
    homes = dict.fromkeys(own, str(folder))
    return kept | homes | {"LOFI_TEST_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"} | more


def run(editor: list[str], name: str, folder: Path, limit: float = 120) -> str:
    """Run a file of tests in the editor; returns what it said."""
    done = subprocess.run(
        [*editor, "-c", f"luafile {TESTS / name}.lua"],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed, 0 failed" in done.stdout
    return done.stdout


@pytest.mark.parametrize("name", ["reader", "api", "player", "commands", "health"])
def test_plugin(editor, tmp_path, name) -> None:
    run(editor, name, tmp_path)


@pytest.mark.timeout(600)
def test_plugin_with_the_real_daemon(editor, tmp_path) -> None:
    run(editor, "real", tmp_path, limit=590)


def alive(number: int) -> bool:
    """Whether a process runs; one that only nobody has asked about does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are seen in /proc")
@pytest.mark.parametrize("way", ["killed", "left"])
def test_the_daemon_ends_with_its_editor(editor, tmp_path, way) -> None:
    """In the middle of a job, within a second."""
    note = tmp_path / "daemon"
    more = {"FILE": str(note), "CACHE": str(tmp_path / "cache")}
    if way == "left":
        more["LEAVE"] = "1"
    child = subprocess.Popen(
        [*editor, "-c", f"luafile {TESTS / 'left.lua'}"],
        env=environment(tmp_path, **more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 200
        while not (note.exists() and note.read_text().strip()):
            assert time.monotonic() < until, "no progress was told"
            assert child.poll() is None or way == "left"
            time.sleep(0.01)
        number = int(note.read_text())
        if way == "killed":
            assert alive(number)
            child.send_signal(signal.SIGKILL)
        child.wait(10)
        until = time.monotonic() + 1
        while alive(number):
            assert time.monotonic() < until, "the daemon outlived its editor by a second"
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
