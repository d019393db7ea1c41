"""The command line as a real process: bytes, exit codes, Ctrl-C, nothing from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from conftest import ROOT, run_app

from core.requests import Generate

ALONE = ("--planner", "none")
SHORT = ("--duration-s", "10", "--inference-steps", "2", "--prompt", "lofi piano", *ALONE)


def test_processes_with_one_seed_write_identical_bytes(command, tmp_path):
    asked = ("generate", *SHORT, "--duration-s", "12.34", "--without-settings")
    runs = {"a": (run_app, "7"), "b": (command, "7"), "c": (command, "8")}
    for name, (run, seed) in runs.items():
        done = run(*asked, "--seed", seed, "--out", str(tmp_path / f"{name}.wav"))
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
    a, b, c = ((tmp_path / f"{n}.wav").read_bytes() for n in "abc")
    assert a == b
    assert a != c
    sound, rate = soundfile.read(tmp_path / "a.wav", always_2d=True)
    assert (rate, sound.shape) == (48000, (592320, 2))


def test_json_on_stdout_progress_on_stderr_and_flac_is_the_wav(command):
    for out in ("s.wav", "s.flac"):
        done = command("generate", *SHORT, "--seed", "3", "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        take = json.loads(done.stdout)
        assert take["path"] == out
        assert take["request"]["seed"] == 3
        assert take["model"]["name"] == "mini"
        assert "step" in done.stderr
    assert np.array_equal(soundfile.read("s.wav")[0], soundfile.read("s.flac")[0])


def test_the_environment_says_the_model_and_cannot_cut_off_the_embedded_one(tmp_path):
    """Every way out leads to a port nobody listens on: one request outside would fail."""
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
    assert os.listdir(tmp_path) == ["song-42.wav"], "named by its seed"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--prompt", "x", "--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--prompt", "x", "--out", "song.ogg"], ".wav, .flac or .mp3"),
    ],
)
def test_bad_usage_is_exit_2_with_a_sentence(command, args, says):
    """Every other fault is put in by `test_faults`."""
    done = command("generate", *args)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_cancels_cleanly(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "app.py"),
            "generate",
            "--prompt",
            "x",
            "--duration-s",
            "120",
            "--inference-steps",
            "100",
            *ALONE,
        ],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "step" in line:
            break
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert time.monotonic() - pressed < 10
    assert "Cancelled" in process.stderr.read()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_studio_tells_where_it_is_and_ends_without_a_trace(tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), "--model", "mini"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    told = process.stdout.readline()
    assert told.startswith("ACE Music Studio: http://127.0.0.1:")
    assert "ACE-Step mini (embedded) on" in told
    assert list(tmp_path.glob("ace-studio-*"))
    process.send_signal(number)
    assert process.wait(20) == code
    assert "Traceback" not in process.stderr.read()
    assert not list(tmp_path.glob("ace-studio-*"))


def test_a_song_goes_through_every_door_and_comes_back(command, tmp_path):
    """Made as MP3, extended to FLAC, replayed, mastered, exported."""

    def run(*args, code=0):
        done = command(*args)
        assert done.returncode == code, done.stderr
        return done

    run("generate", *SHORT, "--seed", "5", "--out", "a.mp3")
    more = ("--after-s", "2.5", "--inference-steps", "2", *ALONE)
    run("extend", "--source", "a.mp3", *more, "--out", "b.flac")
    assert soundfile.info(tmp_path / "a.mp3").frames == 480_000
    assert soundfile.info(tmp_path / "b.flac").frames == 600_000
    assert "settings-need-file" in run("replay", "b.flac", code=2).stderr
    again = run("replay", "b.flac", "--source", "a.mp3", *ALONE, "--out", "c.wav")
    assert "The samples are the same, every one." in again.stderr
    both = [soundfile.read(tmp_path / name)[0] for name in ("b.flac", "c.wav")]
    assert np.array_equal(*both)
    told = json.loads(run("master", "--source", "c.wav", "--out", "m.flac", "--json").stdout)
    assert told["facts"]["true_peak_dbtp"] <= -1.0
    assert told["paths"] == ["m.flac"]
    again = run("replay", "m.flac", "--source", "a.mp3", *ALONE, "--out", "n.wav")
    assert "The samples are the same, every one." in again.stderr, "mastered again, too"
    run("export", "--source", "c.wav", "--format", "mp3", "--no-settings", "--out", "d.mp3")
    assert "settings-missing" in run("replay", "d.mp3", code=2).stderr
    assert "writer-missing" in run("lyrics", "--brief", "rain", code=1).stderr
    assert "prompt-empty" in run("edit", "--source", "c.wav", "--kind", "morph", code=2).stderr
    assert not list(tmp_path.glob(".*"))


def test_help_is_made_from_the_knobs(command):
    said = command("generate", "--help").stdout
    for param in Generate.params():
        option = "adapter" if param.name == "adapters" else param.name.replace("_", "-")
        assert f"--{option} " in said
