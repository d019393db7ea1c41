"""Faults injected into the studio, one per error code, and their output on the terminal.

Every failure prints one line with code, message and action; no traceback, no internal path.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT

from core import errors, startup
from core.files import private_folder
from models import acestep, catalog
from runtime import device_queue

MINI = catalog.MODELS["mini"].folder
QUICK = ("--duration-s", "5", "--inference-steps", "1", "--planner", "none")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Audio files by name: a song, one too long, one too short, and files that are not audio."""
    folder = tmp_path_factory.mktemp("inputs")
    noise = np.random.default_rng(0).standard_normal((48_000 * 3, 2)) * 0.1
    sounds = {"song": noise, "blink": noise[:480], "long": np.zeros((48_000 * 250, 2))}
    for name, sound in sounds.items():
        soundfile.write(folder / f"{name}.flac", sound, 48_000)
    (folder / "words.wav").write_text("not music at all")
    (folder / "torn.json").write_text('{"ace-music-studio": 1, "mode": "sing"}')
    return {path.stem: str(path) for path in folder.iterdir()}


class Terminal:
    """The command line in this process, with ways to inject a fault."""

    def __init__(self, command, monkeypatch, folder: Path, files: dict[str, str]) -> None:
        self._command, self.patch, self.folder, self.files = command, monkeypatch, folder, files

    def run(self, *args: str, model: str = "mini"):
        """The completed `python app.py args`."""
        filled = [self.files.get(arg.removeprefix("@"), arg) for arg in args]
        return self._command(filled[0], "--model", model, *filled[1:])

    def fails(self, *args: str, model: str = "mini") -> str:
        """The last line on standard error of `python app.py args`, which has to fail."""
        done = self.run(*args, model=model)
        assert done.returncode in (startup.USAGE, startup.FAILED)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr or "internal" in done.stderr
        return done.stderr.strip().splitlines()[-1]

    def model(self, *without: str) -> Path:
        """A folder of links to the embedded model, without some of its parts."""
        home = self.folder / "model"
        for path in MINI.rglob("*"):
            inside = path.relative_to(MINI)
            if path.is_file() and inside.parts[0] not in without:
                (home / inside).parent.mkdir(parents=True, exist_ok=True)
                (home / inside).symlink_to(path)
        return home


@pytest.fixture
def terminal(command, monkeypatch, tmp_path, files):
    return Terminal(command, monkeypatch, tmp_path, files)


REQUESTS = {
    "value-out-of-range": ("generate", "--prompt", "x", "--duration-s", "999"),
    "prompt-empty": ("generate", "--prompt", " "),
    "lyrics-too-long": ("generate", "--prompt", "x", "--lyrics", "ą ć ę " * 600, *QUICK),
    "device-missing": ("generate", "--prompt", "x", "--device", "mps"),
    "not-writable": ("generate", "--prompt", "x", "--out", "nowhere/song.wav"),
    "source-missing": ("cover", "--source", "gone.wav"),
    "source-unreadable": ("cover", "--source", "@words"),
    "source-too-long": ("cover", "--source", "@long"),
    "source-too-short": ("extend", "--source", "@blink"),
    "source-needed": ("cover",),
    "noise-needs-source": ("cover", "--reference", "@song", "--noise", "0.5"),
    "nothing-to-add": ("extend", "--source", "@song", "--after-s", "0"),
    "extended-too-long": ("extend", "--source", "@song", "--after-s", "235", "--before-s", "235"),
    "region-empty": ("edit", "--source", "@song", "--start-s", "2", "--end-s", "1"),
    "region-outside": ("edit", "--source", "@song", "--start-s", "100"),
    "morph-backwards": (
        *("edit", "--source", "@song", "--kind", "morph", "--prompt", "x"),
        *("--n-min", "0.9", "--n-max", "0.1"),
    ),
    "planner-missing": ("generate", "--prompt", "x", "--thinking", "--planner", "none"),
    "brief-empty": ("lyrics", "--brief", " "),
    "settings-unreadable": ("replay", "@torn"),
    "settings-missing": ("replay", "@song"),
    "stems-missing": ("stems", "--source", "@song"),
}
"""Errors in the request. "@" precedes the name of a file that exists."""


@pytest.mark.parametrize("code", REQUESTS)
def test_invalid_request_fails_with_one_line(terminal, code):
    _judge(terminal.fails(*REQUESTS[code]), code, terminal)


def no_such_model(t):
    return t.fails("generate", "--prompt", "x", model="nobody")


def not_downloaded(t):
    return t.fails("generate", "--prompt", "x", "--planner", "none", model="xl-sft")


def no_songwriter(t):
    return t.fails("lyrics", "--brief", "rain", model="xl-sft")


def truncated_file(t):
    path = next((t.model() / "vae").glob("*.safetensors"))
    beginning = path.read_bytes()[:100_000]
    path.unlink()
    path.write_bytes(beginning)
    return t.fails("generate", "--prompt", "x", *QUICK, model="model")


def mixed_parts(t):
    config = t.model() / "vae" / "config.json"
    values = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps({**values, "sampling_rate": 2 * values["sampling_rate"]}))
    return t.fails("generate", "--prompt", "x", *QUICK, model="model")


def no_codes(t):
    t.model("audio_tokenizer", "audio_token_detokenizer", "planner")
    index = t.folder / "model" / "model_index.json"
    parts = json.loads(index.read_text())
    index.unlink()
    kept = {k: v for k, v in parts.items() if not k.startswith("audio_token")}
    index.write_text(json.dumps(kept))
    return t.fails("cover", "--source", "@song", "--inference-steps", "1", model="model")


def shorter_model(t):
    shorter = replace(catalog.MODELS["mini"], longest_s=60.0)
    t.patch.setitem(catalog.MODELS, "mini", shorter)
    return t.fails("generate", "--prompt", "x", "--duration-s", "61")


def out_of_memory(t):
    import torch
    from diffusers import AceStepTransformer1DModel

    def greedy(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    t.patch.setattr(AceStepTransformer1DModel, "forward", greedy)
    return t.fails("generate", "--prompt", "x", *QUICK)


def nan_output(t):
    t.patch.setattr(acestep, "is_finite", lambda _: False)
    return t.fails("generate", "--prompt", "x", *QUICK)


def disk_full(t):
    def full(*_):
        raise OSError(28, "No space left on device", str(t.folder))

    t.patch.setattr(os, "replace", full)
    return t.fails("generate", "--prompt", "x", *QUICK)


def queue_full(t):
    line = [object()] * (device_queue.MAX_WAITING + 1)
    t.patch.setattr(device_queue, "deque", lambda: deque(line))
    return t.fails("generate", "--prompt", "x", *QUICK)


def internal_error(t):
    def broken(*_, **__):
        raise ZeroDivisionError(f"a bug in {ROOT}")
        yield

    t.patch.setattr(acestep.Engine, "denoise", broken)
    return t.fails("generate", "--prompt", "x", *QUICK)


def input_not_given(t):
    source = str(shutil.copy(t.files["song"], t.folder / "mine.flac"))
    quick = ("--after-s", "1", "--inference-steps", "1", "--out", "b.flac")
    assert t.run("extend", "--source", source, *quick).returncode == 0
    return t.fails("replay", "b.flac")


FAULTS = {
    "model-unknown": no_such_model,
    "model-missing": not_downloaded,
    "writer-missing": no_songwriter,
    "model-broken": truncated_file,
    "model-mismatch": mixed_parts,
    "codes-missing": no_codes,
    "song-too-long": shorter_model,
    "out-of-memory": out_of_memory,
    "sound-not-finite": nan_output,
    "disk-full": disk_full,
    "queue-full": queue_full,
    "internal": internal_error,
    "settings-need-file": input_not_given,
}
"""Errors of the environment: weights, memory, disk, queue, or a bug."""


@pytest.mark.parametrize("code", FAULTS)
def test_fault_fails_with_one_line(terminal, code):
    _judge(FAULTS[code](terminal), code, terminal)


def _judge(line: str, code: str, terminal: Terminal) -> None:
    shown, _, text = line.partition(": ")
    assert shown == code
    assert text[0].isalnum()
    assert ". " in text, "a message and an action"
    for internal in (ROOT, terminal.folder, private_folder(), Path.home(), "Error(", "{"):
        assert str(internal) not in text


def test_the_documentation_lists_every_error_as_worded():
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    _, begins, rows = text.partition("| code |")
    assert (begins + rows).strip() == errors.table(), "run: make docs"
