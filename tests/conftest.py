"""Shared fixtures and helpers: the engine on the embedded model, a studio, the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(TESTS)]

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker and the processes it starts. With two each, the threads of torch
    # would spend their time waiting for a core that another worker holds.
    for name in ("OMP_NUM_THREADS", "ACE_THREADS"):
        os.environ.setdefault(name, "1")

from runtime import device  # noqa: E402

pytest_plugins = ["browsing", "planned_studio"]

os.environ["HF_HUB_OFFLINE"] = "1"
"""The embedded model needs no hub; a test that needs one starts its own process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TESTS / "browser" in item.path.parents:
            item.add_marker(pytest.mark.browser)


def drain(steps: Iterator[Any]) -> Any:
    """Run a generator to its end and return its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep the learned rates of tests out of the user's home folder."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def engine(own_cache):
    """The engine on the embedded model, in float32 on the CPU."""
    from models import acestep, catalog

    device.set_threads(device.find_device("cpu"))
    model = catalog.choose("mini")
    return drain(acestep.Engine.load(model, model.folder, "cpu", "float32"))


@pytest.fixture
def studio(own_cache):
    """A studio on the embedded model, set up as `python app.py` does."""
    import backend
    from models import catalog

    instance = backend.Studio(catalog.choose("mini"), device.find_device("cpu"))
    yield instance
    for visitor in {visitor for visitor, _ in instance._results}:
        instance.leave(visitor)


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, own_cache) -> Iterator[Command]:
    """Runs `python app.py ...` to its end from an empty folder, in this process: a new one would
    spend seconds on imports."""
    import app

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        try:
            code = app.main(args)
        except SystemExit as error:
            code = error.code
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


UNPLANNED = {
    "thinking": False,
    "use_cot_caption": False,
    "use_cot_metas": False,
    "use_cot_language": False,
}
"""Request fields that disable every planner step."""


def song(**changes: Any):
    """A short request with every field resolved, as the engine expects it."""
    from core.requests import Generate

    fields = {
        "prompt": "warm lofi piano, vinyl crackle",
        "instrumental": True,
        "duration_s": 10,
        "inference_steps": 3,
        "guidance_scale": 3.0,
        "shift": 1.0,
        "seed": 7,
        **UNPLANNED,
    }
    return Generate.of({**fields, **changes})


def read_sound(path: Any):
    """The samples of a sound file, float32 [2, samples]."""
    import soundfile

    return soundfile.read(path, dtype="float32", always_2d=True)[0].T


def run_app(*args: str, cwd: Path = ROOT, timeout: float = 240, **env: str):
    """Run `python app.py ...` in a new process to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "app.py"), *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
