"""The command line as a real process: bytes, exit codes, Ctrl-C, start-up mistakes, lost disks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, run_app

import cli
from core.errors import StudioError
from core.requests import Generate

NO_PLANNER = ("--planner", "none")
SHORT = ("--duration-s", "10", "--inference-steps", "2", "--prompt", "lofi piano", *NO_PLANNER)
SHORTEST = ("--duration-s", "5", "--inference-steps", "1", "--prompt", "x", *NO_PLANNER)


def test_processes_with_one_seed_write_identical_bytes(command, tmp_path):
    arguments = ("generate", *SHORT, "--duration-s", "12.34", "--without-settings")
    runs = {"a": (run_app, "7"), "b": (command, "7"), "c": (command, "8")}
    for name, (run, seed) in runs.items():
        done = run(*arguments, "--seed", seed, "--out", str(tmp_path / f"{name}.wav"))
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
    a, b, c = ((tmp_path / f"{n}.wav").read_bytes() for n in "abc")
    assert a == b
    assert a != c
    sound, rate = soundfile.read(tmp_path / "a.wav", always_2d=True)
    assert (rate, sound.shape) == (48000, (592320, 2))


def test_json_goes_to_stdout_progress_to_stderr_and_flac_equals_wav(command):
    for out in ("s.wav", "s.flac"):
        done = command("generate", *SHORT, "--seed", "3", "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        take = json.loads(done.stdout)
        assert take["path"] == out
        assert take["request"]["seed"] == 3
        assert take["model"]["name"] == "mini"
        assert "step" in done.stderr
    assert np.array_equal(soundfile.read("s.wav")[0], soundfile.read("s.flac")[0])


def test_environment_chooses_the_model_and_the_embedded_one_needs_no_network(tmp_path):
    """All proxies lead to a closed port: a single request to the outside would fail."""
    dead = "http://127.0.0.1:9"
    done = run_app(
        *("generate", *SHORT, "--seed", "42", "--json"),
        cwd=tmp_path,
        ACE_MODEL=str(ROOT / "vendor" / "ace-step-mini"),
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT"), dead),
        HF_HUB_OFFLINE="0",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["licence"] == "unknown"
    assert "Failed to load" not in done.stderr, "libraries keep to themselves what they miss"
    assert os.listdir(tmp_path) == ["song-42.wav"], "named by its seed"


def is_refused(done: subprocess.CompletedProcess[str], text: str) -> None:
    """The process ended with one sentence that has `text`, before any work began."""
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert "Loading" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_an_unknown_flag_is_a_usage_error(command):
    done = command("generate", "--prompt", "x", "--stepz", "3")
    assert done.returncode == 2
    assert "unrecognized arguments: --stepz" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("generate", "--prompt", "x", "--out", "song.ogg"), ".wav, .flac or .mp3"),
        (("generate", "--prompt", "x", "--out", "song"), ".wav, .flac or .mp3"),
        (("musicgen", "--prompt", "x", "--out", "song.aac"), ".wav, .flac or .mp3"),
        (("export", "--source", "s.wav", "--out", "s.ogg"), ".wav, .flac or .mp3"),
        (("export", "--source", "s.wav", "--format", "mp3", "--out", "s.flac"), "--format"),
        (("master", "--source", "s.wav", "--format", "wav", "--out", "s.mp3"), "--format"),
        (("master", "--source", "s.wav", "--out", "s.txt"), ".wav, .flac or .mp3"),
        (("stems", "--source", "s.wav", "--out", "s.wav"), "must be a folder"),
        (("lyrics", "--brief", "rain", "--out", "words.wav"), ".txt or .md"),
        (("replay", "s.wav", "--out", "s.ogg"), ".wav, .flac or .mp3"),
    ],
)
def test_an_output_of_another_format_is_refused_before_any_work(command, arguments, text):
    """None of the sources exists, so a refusal that names --out came before they were read."""
    done = command(*arguments)
    is_refused(done, text)
    assert "--out" in done.stderr


@pytest.mark.parametrize(
    "out", ["/proc/song.wav", "file/song.wav", "missing/song.wav", "folder.wav", f"{'n' * 300}.wav"]
)
def test_a_place_that_cannot_be_written_is_refused_before_rendering(tmp_path, out):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.wav").mkdir()
    is_refused(run_app("generate", *SHORTEST, "--out", out, cwd=tmp_path), "not-writable")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.wav"]


@pytest.mark.parametrize("name", ["n" * 246, "🎵" * 62])
def test_a_name_as_long_as_the_file_system_allows_is_written(command, name):
    done = command("generate", *SHORTEST, "--seed", "1", "--out", f"{name}.wav")
    assert done.returncode == 0, done.stderr
    assert soundfile.info(f"{name}.wav").frames == 240_000


FULL_DISK = """
import errno, os
replace = os.replace

def full(source, target, **more):
    name, _, folder = os.environ["FULL"].partition(",")
    if str(target) == name or (folder and folder in str(target)):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))
    return replace(source, target, **more)

os.replace = full
"""
"""Runs at the start of a process: a file called, or in a folder called as FULL says meets a full
disk."""


@pytest.mark.parametrize("full", ["mine.wav", "mine.wav,/unsaved/"])
def test_a_song_that_cannot_be_written_is_kept_and_its_place_is_printed(tmp_path, full):
    """The second time the folder for kept songs is full, too."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FULL_DISK)
    done = run_app(
        *("generate", *SHORTEST, "--seed", "1", "--out", "mine.wav", "--json"),
        cwd=tmp_path,
        FULL=full,
        PYTHONPATH=str(tmp_path / "site"),
        XDG_DATA_HOME=str(tmp_path / "data"),
        TMPDIR=str(tmp_path),
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("disk-full"))
    kept = Path(line.partition("The finished file was saved as ")[2])
    assert soundfile.info(kept).frames == 240_000
    assert json.loads(done.stdout)["path"] == str(kept)
    assert kept.is_relative_to(tmp_path / "data") == ("unsaved" not in full)
    assert not (tmp_path / "mine.wav").exists()
    assert not list(tmp_path.glob("ace-studio-*")), "the private folder is gone"


def test_lyrics_that_cannot_be_written_are_printed(command, monkeypatch, capsys):
    from fake_studio import FakeStudio

    from core import files

    def full(*_, **__):
        raise StudioError("disk-full", place="here", needed="1 MB")

    monkeypatch.setattr(files, "atomic_write", full)
    studio = FakeStudio()
    run = studio.run
    monkeypatch.setattr(studio, "run", lambda request, visitor, _edition: run(request, visitor))
    monkeypatch.setattr(cli, "open_studio", lambda _: studio)
    done = command("lyrics", "--brief", "rain", "--out", "words.txt")
    assert done.returncode == 1
    assert "[Verse]" in done.stdout
    assert "disk-full" in done.stderr


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ((), None),
        (("--thinking",), True),
        (("--no-thinking",), False),
        (("--thinking", "auto"), None),
        (("--thinking=auto",), None),
        (("--thinking", "on"), True),
        (("--thinking", "off"), False),
        (("--thinking=Off",), False),
    ],
)
def test_a_switch_takes_on_off_and_auto(words, value):
    args = cli.parse(["generate", "--prompt", "on", *words, "--seed", "-1"])
    assert (args.thinking, args.seed, args.prompt) == (value, "-1", "on")


def test_values_that_messages_offer_are_accepted(command):
    automatic = ("--seed", "-1", "--bpm", "auto", "--timesignature", "4/4", "--thinking", "auto")
    done = command("generate", *SHORTEST, *automatic, "--keyscale", "auto", "--json")
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)["request"]
    assert request["seed"] >= 0
    assert request["bpm"] is None
    assert request["timesignature"] == "4"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--port", "0"), "1 to 65535"),
        (("--port", "99999"), "1 to 65535"),
        (("--port", "web"), "1 to 65535"),
        (("--port", "TAKEN"), "is in use"),
        (("--host", "192.0.2.1"), "not an address of this computer"),
        (("--host", "nobody.invalid", "--port", "7999"), "not a known address"),
    ],
)
def test_an_address_that_cannot_be_served_is_one_sentence(arguments, text):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        is_refused_at_once([port if word == "TAKEN" else word for word in arguments], text)


@pytest.mark.parametrize(
    ("threads", "arguments"),
    [("two", ()), ("0", ("generate", "--prompt", "x")), ("-1", ("daemon",)), ("257", ())],
)
def test_a_wrong_number_of_threads_is_one_sentence(threads, arguments):
    is_refused_at_once(arguments, "ACE_THREADS must be a whole number", ACE_THREADS=threads)


SLOW_IMPORTS = {"pydantic", "numpy", "spaces", "httpx", "gradio", "torch", "diffusers", "cli"}


def is_refused_at_once(arguments, text, **env):
    """The process ended with one sentence that has `text`, and had imported nothing slow."""
    done = run_app(*arguments, PYTHONPROFILEIMPORTTIME="1", **env)
    lines = done.stderr.splitlines()
    modules = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
    assert "core.startup" in modules, "imports are reported"
    assert not SLOW_IMPORTS & set(modules)
    done.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    is_refused(done, text)
    assert done.stdout == ""


def press(process: subprocess.Popen[str], when: str) -> str:
    """Press Ctrl-C as soon as standard error names a module or has a text; returns all of it."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.rpartition("|")[2].strip() == when or ("|" not in line and when in line):
            break
    else:
        raise AssertionError("".join(lines[-20:]))
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    return "".join(lines) + rest


@pytest.mark.parametrize(
    ("arguments", "when"),
    [
        (("generate", *SHORTEST), "argparse"),
        (("generate", *SHORTEST), "core.errors"),
        (("generate", *SHORTEST), "backend"),
        (("generate", *SHORTEST), "Loading"),
        (("--model", "mini"), "gradio.utils"),
        (("daemon",), "pydantic"),
    ],
)
def test_ctrl_c_while_starting_ends_with_130_and_no_traceback(tmp_path, own_cache, arguments, when):
    """The interpreter names every module it has imported, which times the key to the module."""
    compiled = str(own_cache / "compiled")  # torch makes this folder while it is imported
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(ROOT / "app.py"), *arguments],
        cwd=tmp_path,
        env={
            **os.environ,
            "LOFI_CACHE_PATH": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "TORCHINDUCTOR_CACHE_DIR": compiled,
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = press(process, when)
    assert process.returncode == 130
    assert "Traceback" not in log
    assert "KeyboardInterrupt" not in log
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_cancels_while_rendering(tmp_path):
    long = ("--prompt", "x", "--duration-s", "120", "--inference-steps", "100", *NO_PLANNER)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), "generate", *long],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    pressed = time.monotonic()
    log = press(process, "step")
    assert process.returncode == 130
    assert time.monotonic() - pressed < 120
    assert "Cancelled" in log
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_page_prints_its_address_and_ends_without_a_traceback(tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), "--model", "mini"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    line = process.stdout.readline()
    assert line.startswith("ACE Music Studio: http://127.0.0.1:")
    assert "ACE-Step mini (embedded) on" in line
    assert list(tmp_path.glob("ace-studio-*"))
    process.send_signal(number)
    assert process.wait(20) == code
    assert "Traceback" not in process.stderr.read()
    assert not list(tmp_path.glob("ace-studio-*"))


def test_a_song_passes_through_every_command_and_replays(command, tmp_path):
    """Made as MP3, extended to FLAC, replayed, mastered, exported."""

    def run(*args, code=0):
        done = command(*args)
        assert done.returncode == code, done.stderr
        return done

    run("generate", *SHORT, "--seed", "5", "--out", "a.mp3")
    more = ("--after-s", "2.5", "--inference-steps", "2", *NO_PLANNER)
    run("extend", "--source", "a.mp3", *more, "--out", "b.flac")
    assert soundfile.info(tmp_path / "a.mp3").frames == 480_000
    assert soundfile.info(tmp_path / "b.flac").frames == 600_000
    assert "settings-need-file" in run("replay", "b.flac", code=2).stderr
    replayed = run("replay", "b.flac", "--source", "a.mp3", *NO_PLANNER, "--out", "c.wav")
    assert SAME in replayed.stderr
    both = [soundfile.read(tmp_path / name)[0] for name in ("b.flac", "c.wav")]
    assert np.array_equal(*both)
    result = json.loads(run("master", "--source", "c.wav", "--out", "m.flac", "--json").stdout)
    assert result["facts"]["true_peak_dbtp"] <= -1.0
    assert result["paths"] == ["m.flac"]
    replayed = run("replay", "m.flac", "--source", "a.mp3", *NO_PLANNER, "--out", "n.wav")
    assert SAME in replayed.stderr, "it is mastered again, too"
    run("export", "--source", "c.wav", "--format", "mp3", "--no-settings", "--out", "d.mp3")
    assert "settings-missing" in run("replay", "d.mp3", code=2).stderr
    assert "writer-missing" in run("lyrics", "--brief", "rain", code=1).stderr
    assert "prompt-empty" in run("edit", "--source", "c.wav", "--kind", "morph", code=2).stderr
    assert not list(tmp_path.glob(".*"))


SAME = "The samples are the same, every one."


def test_help_lists_every_parameter(command):
    text = command("generate", "--help").stdout
    for param in Generate.params():
        option = "adapter" if param.name == "adapters" else param.name.replace("_", "-")
        assert f"--{option} " in text
