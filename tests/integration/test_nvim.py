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
from editor import QUICK

ROOT = Path(__file__).parent.parent.parent
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


def run(
    editor: list[str], name: str, folder: Path, limit: float = 120, code: int = 0, **more: str
) -> None:
    """Run a file of tests in the editor, to its end with `code`."""
    done = subprocess.run(
        [*editor, "-c", f"luafile {TESTS / name}.lua"],
        env=environment(folder, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["reader", "api", "player", "commands", "health"])
def test_plugin(editor, tmp_path, name) -> None:
    run(editor, name, tmp_path)


def alive(number: int) -> bool:
    """Whether a process runs; one that only nobody has asked about does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone_in_time(number: int) -> None:
    until = time.monotonic() + 1
    while alive(number):
        assert time.monotonic() < until, "the daemon outlived its editor by a second"
        time.sleep(0.01)


SEEN = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="seen in /proc")


@SEEN
@pytest.mark.timeout(600)
def test_plugin_with_the_real_daemon_which_ends_when_the_editor_is_killed(editor, tmp_path) -> None:
    note = tmp_path / "daemon"
    run(editor, "real", tmp_path, 590, -signal.SIGKILL, FILE=str(note))
    gone_in_time(int(note.read_text()))


@SEEN
def test_the_daemon_ends_when_its_editor_is_left_in_the_middle_of_a_job(editor, tmp_path) -> None:
    note = tmp_path / "daemon"
    more = {"FILE": str(note), "DAEMON": QUICK, "PYTHONPATH": str(ROOT)}
    run(editor, "left", tmp_path, **more)
    gone_in_time(int(note.read_text()))
