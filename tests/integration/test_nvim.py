"""The Neovim plugin in real Neovim, against a scripted daemon and the real one."""

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
"""Neovim programs to test with; ACE_NVIM overrides them, separated by `:`."""


@pytest.fixture(params=EDITORS)
def editor(request, tmp_path) -> list[str]:
    """Command of Neovim with this plugin and none of the user's configuration."""
    found = shutil.which(request.param)
    if not found:
        if os.environ.get("ACE_REQUIRE_NVIM"):
            pytest.fail(f"{request.param} is not installed, and ACE_REQUIRE_NVIM is set")
        pytest.skip(f"{request.param} is not installed")
    return [found, "--headless", "-u", str(TESTS / "init.lua")]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Environment of an editor whose home folder is `folder`."""
    variables = ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOFI_")}
    homes = dict.fromkeys(variables, str(folder))
    return kept | homes | {"LOFI_TEST_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"} | more


def run(
    editor: list[str], name: str, folder: Path, limit: float = 120, code: int = 0, **more: str
) -> None:
    """Run a Lua test file in the editor; its exit code must be `code`."""
    process = subprocess.run(
        [*editor, "-c", f"luafile {TESTS / name}.lua"],
        env=environment(folder, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert process.returncode == code, process.stdout + process.stderr


@pytest.mark.parametrize("name", ["reader", "api", "player", "commands", "health"])
def test_plugin_lua_suite(editor, tmp_path, name) -> None:
    run(editor, name, tmp_path)


def alive(number: int) -> bool:
    """Whether a process runs; a zombie does not count."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_exits(number: int) -> None:
    """Wait at most one second for a process to exit."""
    deadline = time.monotonic() + 1
    while alive(number):
        assert time.monotonic() < deadline, "the daemon still runs a second after its editor"
        time.sleep(0.01)


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@NEEDS_PROC
@pytest.mark.timeout(600)
def test_plugin_with_the_real_daemon_which_exits_when_the_editor_is_killed(
    editor, tmp_path
) -> None:
    pid_file = tmp_path / "daemon"
    run(editor, "real", tmp_path, 590, -signal.SIGKILL, FILE=str(pid_file))
    assert_exits(int(pid_file.read_text()))


@NEEDS_PROC
def test_the_daemon_exits_when_the_editor_quits_during_a_job(editor, tmp_path) -> None:
    pid_file = tmp_path / "daemon"
    more = {"FILE": str(pid_file), "DAEMON": QUICK, "PYTHONPATH": str(ROOT)}
    run(editor, "left", tmp_path, **more)
    assert_exits(int(pid_file.read_text()))
