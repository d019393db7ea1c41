"""Environments beside the pinned one, each with the smoke test run in it.

    python tests/environments/make.py newest    the newest versions that the ranges allow
    python tests/environments/make.py lowest    the lowest versions that the ranges allow
    python tests/environments/make.py space     what a Space installs

`newest` stands on .venv, whose torch it shares. The other two are whole environments of some
gigabytes; ACE_PIP_ARGS is handed to pip, for instance to take torch for the CPU from elsewhere, and
PYTHON312 names the interpreter of the Space. With ACE_SHARE_TORCH=1 `lowest` stands on .venv too: all
but torch is then the lowest.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = (ROOT / "constraints.txt").read_text("utf-8")


def main() -> int:
    """Make the environment that is named on the command line, and run the smoke test in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=("newest", "lowest", "space"))
    name = parser.parse_args().name
    folder = ROOT / f".venv-{name}"
    python = {"newest": newest, "lowest": lowest, "space": space}[name](folder)
    return subprocess.run([python, ROOT / "tests" / "environments" / "smoke.py"]).returncode


def newest(folder: Path) -> Path:
    """An environment on top of the one that runs this: only what is newer is installed."""
    python = create(folder, sys.executable)
    constraint = share_torch(folder)
    install(python, "--upgrade", "--upgrade-strategy", "eager", *constraint, *dependencies())
    return python


def lowest(folder: Path) -> Path:
    """An environment with the lower end of every range."""
    python = create(folder, sys.executable)
    lowest_ends = [lower_end(requirement) for requirement in dependencies()]
    if os.environ.get("ACE_SHARE_TORCH") == "1":
        lowest_ends = [each for each in lowest_ends if not each.startswith("torch==")]
        lowest_ends += share_torch(folder)
    install(python, *lowest_ends)
    return python


def space(folder: Path) -> Path:
    """An environment as a Space builds it: requirements.txt, and the Gradio of the front matter."""
    found = os.environ.get("PYTHON312") or shutil.which("python3.12")
    if not found:
        sys.exit("Python 3.12 was not found. Set PYTHON312 to its path.")
    python = create(folder, found)
    front = (ROOT / "README.md").read_text("utf-8").split("---\n")[1]
    version = re.search(r"^sdk_version: (.*)$", front, re.MULTILINE)
    assert version, "the front matter of README.md names no sdk_version"
    gradio = f"gradio[oauth,mcp]=={version[1]}"
    install(python, "--requirement", str(ROOT / "requirements.txt"), gradio, "spaces")
    return python


def create(folder: Path, python: str) -> Path:
    """An empty environment in `folder`; returns its interpreter."""
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    return folder / "bin" / "python"


def share_torch(folder: Path) -> list[str]:
    """Let the environment in `folder` use what is in .venv; returns arguments that keep its torch."""
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
    torch = re.search(r"^torch==.*$", PINS, re.MULTILINE)
    assert torch, "constraints.txt pins no torch"
    (folder / "torch.txt").write_text(torch[0] + "\n")
    return ["--constraint", str(folder / "torch.txt")]


def install(python: Path, *args: str) -> None:
    """Run the environment's pip."""
    more = shlex.split(os.environ.get("ACE_PIP_ARGS", ""))
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", "install", *quiet, *more, *args], check=True)


def dependencies() -> list[str]:
    """What the project needs, for this system."""
    return [line for line in PROJECT["dependencies"] if "darwin" not in line]


def lower_end(requirement: str) -> str:
    """The requirement at its lowest: "av>=18.1,<20" is "av==18.1"."""
    return re.sub(r">=([^,;]+)(,[^;]+)?", r"==\1", requirement)


if __name__ == "__main__":
    sys.exit(main())
