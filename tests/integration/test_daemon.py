"""The daemon as a real process: JSON-RPC messages, queue, shutdown, hostile input.

Most tests use `quick_daemon`, which returns tones at once; the last part uses the embedded model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import soundfile
import tiny_musicgen
from conftest import drain, song
from editor import REAL, Editor, error_of
from fake_hub import FakeHub, repository
from fake_studio import CARD
from page_handlers import Page

import app
from audio import settings
from core import startup
from core.errors import StudioError
from core.requests import Generate
from core.results import Progress
from lofi.scheduler import Job
from lofi.track_cache import TrackCache
from models import catalog, vae
from runtime import estimates
from web import restore
from web.api import endpoint

GOOD = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
PARSE, SHAPE, METHOD, PARAMS = (
    (-32700, "PARSE_ERROR"),
    (-32600, "INVALID_REQUEST"),
    (-32601, "METHOD_NOT_FOUND"),
    (-32602, "INVALID_PARAMS"),
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    with Editor(tmp_path_factory.mktemp("quick")) as editor:
        editor.call("get_backends")  # from now on requests are answered in order
        yield editor


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tiny_musicgen.write(tmp_path_factory.mktemp("musicgen"))
    cache = tmp_path_factory.mktemp("real")
    with Editor(cache, REAL, LOFI_MODEL_PATH=str(folder)) as editor:
        editor.musicgen = folder
        yield editor


def after(editor, line: bytes) -> list:
    """Send `line`, then a ping; the messages received before the ping's response."""
    start = len(editor.messages)
    editor.write(line + b"\n")
    name = editor.send("ping")
    editor.response(name)
    return [m for m in editor.messages[start:] if not isinstance(m, dict) or m.get("id") != name]


def request(**changes) -> bytes:
    message = {**GOOD, **changes}
    return json.dumps({k: v for k, v in message.items() if v is not ...}).encode()


CASES = [
    # line, id of the error, error
    (b"{", None, PARSE),
    (b'{"jsonrpc": "2.0", "method": "ping", "id": NaN}', None, PARSE),
    (b"\xff\xfe{}", None, PARSE),
    (b'[{"jsonrpc": "2.0", "method": "ping", "id": "1"}, {"jsonrpc"', None, PARSE),
    (b"[" * 100_000, None, PARSE),
    (b"1" * 10_000, None, PARSE),
    (request(id=7).replace(b"7", b"1e999"), None, PARSE),
    (b'[{"jsonrpc": "2.0", "method": "ping", "id": -1e999}]', None, PARSE),
    (b"[]", None, SHAPE),
    (b"7", None, SHAPE),
    (b"null", None, SHAPE),
    (b'{"jsonrpc": "2.0", "method": 1, "params": "bar"}', None, SHAPE),
    (request(jsonrpc="1.0", id="a"), "a", SHAPE),
    (request(jsonrpc=..., id=5), 5, SHAPE),
    (request(method=...), 1, SHAPE),
    (request(id=True), None, SHAPE),
    (request(id=[1]), None, SHAPE),
    (request(params=None), 1, SHAPE),
    (request(params="x"), 1, SHAPE),
    (request(method="play"), 1, METHOD),
    (request(method="rpc.discover"), 1, METHOD),
    (request(method="Ping"), 1, METHOD),
    (request(method="cancel", params=["abc"]), 1, PARAMS),
    (request(method="ping", params={"now": 1}), 1, PARAMS),
    (request(method="ping", params={"\ud800": 1}), 1, PARAMS),
    (request(method="cancel"), 1, PARAMS),
    (request(method="cancel", params={"track_id": 7}), 1, PARAMS),
]


@pytest.mark.parametrize(("line", "name", "error"), CASES, ids=range(len(CASES)))
def test_an_invalid_message_gets_its_error_code_and_id(quick, line, name, error):
    (response,) = after(quick, line)
    assert (response["jsonrpc"], response["id"]) == ("2.0", name)
    assert error_of(response) == error


@pytest.mark.parametrize("name", ["a", "", "🎵", "half \ud83c", 0, -1, 2**53 + 1, 1.5, 1e15, None])
def test_the_response_repeats_the_request_id_exactly(quick, name):
    (response,) = after(quick, request(id=name))
    assert response == {
        "jsonrpc": "2.0",
        "id": name,
        "result": {"status": "ok", "version": response["result"]["version"]},
    }


@pytest.mark.parametrize(
    "line",
    [
        request(id=...),
        request(id=..., method="nobody"),
        request(id=..., method="cancel", params={}),
        b"[" + request(id=...) + b"," + request(id=..., method="nobody") + b"]",
        b"   ",
        b"\r",
    ],
)
def test_notifications_and_empty_lines_get_no_response(quick, line):
    assert after(quick, line) == []


def test_a_batch_gets_one_response_with_an_entry_per_request(quick):
    batch = [{**GOOD, "id": "a"}, 1, {**GOOD, "id": ...}, {**GOOD, "method": "no"}, {"x": 1}]
    batch[2].pop("id")
    (responses,) = after(quick, json.dumps(batch).encode())
    assert [r["id"] for r in responses] == ["a", None, 1, None]
    assert "result" in responses[0]
    assert [error_of(r) for r in responses[1:]] == [SHAPE, METHOD, SHAPE]


def test_params_may_be_an_empty_list_and_lines_may_end_with_crlf(quick):
    assert len(after(quick, request(params=[]) + b"\r")) == 1


TO_GENERATE = [
    ({}, PARAMS),
    ({"prompt": 7}, PARAMS),
    ({"prompt": "x\ud800"}, PARAMS),
    ({"prompt": "x", "tempo": 90}, PARAMS),
    ({"prompt": "x", "duration_sec": "30"}, PARAMS),
    ({"prompt": "x", "duration_sec": True}, PARAMS),
    ({"prompt": "x", "duration_sec": 5.5}, PARAMS),
    ({"prompt": "x", "duration_sec": None}, PARAMS),
    ({"prompt": "x", "seed": -1}, PARAMS),
    ({"prompt": "x", "seed": 2**64}, PARAMS),
    ({"prompt": "x", "priority": "urgent"}, PARAMS),
    ({"prompt": "x", "guidance_scale": "7"}, PARAMS),
    ({"prompt": "", "backend": "riffusion"}, (-32007, "INVALID_BACKEND")),
    ({"prompt": "", "backend": "ace-step"}, (-32007, "INVALID_BACKEND")),
    ({"prompt": " \n", "duration_sec": 0}, (-32006, "INVALID_PROMPT")),
    ({"prompt": "x" * 1001}, (-32006, "INVALID_PROMPT")),
    ({"prompt": "x", "duration_sec": 4, "inference_steps": 0}, (-32005, "INVALID_DURATION")),
    ({"prompt": "x", "duration_sec": 241}, (-32005, "INVALID_DURATION")),
    ({"prompt": "x", "duration_sec": 10**400}, (-32005, "INVALID_DURATION")),
    ({"prompt": "x", "duration_sec": 121, "backend": "musicgen"}, (-32005, "INVALID_DURATION")),
    (
        {"prompt": "x", "inference_steps": 201, "guidance_scale": 0},
        (-32009, "INVALID_INFERENCE_STEPS"),
    ),
    ({"prompt": "x", "guidance_scale": 30.5, "scheduler": "x"}, (-32010, "INVALID_GUIDANCE_SCALE")),
    ({"prompt": "x", "guidance_scale": 10**400}, PARAMS),
    ({"prompt": "x", "scheduler": "ddim"}, (-32011, "INVALID_SCHEDULER")),
    (
        {"prompt": "x", "backend": "musicgen", "inference_steps": 0},
        (-32009, "INVALID_INFERENCE_STEPS"),
    ),
    ({"prompt": "x", "backend": "musicgen"}, (-32008, "BACKEND_NOT_INSTALLED")),
]


@pytest.mark.parametrize(("params", "error"), TO_GENERATE, ids=range(len(TO_GENERATE)))
def test_generate_reports_invalid_params_in_a_fixed_order(quick, params, error):
    assert quick.call_error("generate", **params) == error


def test_internal_errors_are_logged_and_not_sent_to_the_client(quick):
    slow = quick.call("generate", prompt="slow", duration_sec=5)["track_id"]
    crash = quick.call("generate", prompt="crash", duration_sec=5)["track_id"]
    track = quick.call("generate", prompt="no room", duration_sec=5)["track_id"]
    blocker = quick.tracks / f".{track}.{quick.process.pid}.wav.part"
    blocker.mkdir(parents=True)
    quick.call("cancel", track_id=slow)
    ending = quick.ending(crash)
    assert (ending["outcome"], ending["code"]) == ("error", "MODEL_INFERENCE_FAILED")
    assert b"secret" not in b"".join(quick.raw)
    assert quick.logs(b"a secret of ours")
    ending = quick.ending(track)
    blocker.rmdir()
    assert (ending["outcome"], ending["code"]) == ("error", "MODEL_INFERENCE_FAILED")
    assert "cannot be written" in ending["message"]


def test_generate_responds_then_reports_progress_in_5_percent_steps_then_completes(quick):
    start = len(quick.messages)
    params = {"prompt": "warm lofi", "duration_sec": 5.0, "seed": 1e15, "inference_steps": 20.0}
    made = quick.call("generate", **params)
    assert made["status"] == "generating"
    assert made["position"] == 0
    assert made["seed"] == 10**15
    track = made["track_id"]
    ending = quick.ending(track)
    messages = quick.messages[start:]
    first = next(i for i, m in enumerate(messages) if "method" in m)
    assert "result" in messages[0]
    assert first == 1
    percents = [m["params"]["percent"] for m in quick.notes(track, "progress")]
    assert percents == [
        5,
        10,
        15,
        20,
        25,
        30,
        35,
        40,
        45,
        50,
        55,
        60,
        65,
        70,
        75,
        80,
        85,
        90,
        95,
        99,
    ]
    for note in quick.notes(track, "progress"):
        assert set(note["params"]) == {
            *("track_id", "percent", "current_step", "total_steps", "eta_sec")
        }
        assert note["params"]["eta_sec"] >= 0
        assert note["params"]["total_steps"] == 20
    assert ending["outcome"] == "complete"
    info = soundfile.info(ending["path"])
    assert (info.samplerate, info.channels, info.subtype) == (48000, 2, "PCM_16")
    assert (ending["sample_rate"], ending["channels"], ending["duration_sec"]) == (48000, 2, 5.0)
    assert info.frames == 240_000
    assert os.path.isabs(ending["path"])
    assert (ending["prompt"], ending["seed"], ending["cached"]) == ("warm lofi", 10**15, False)
    sidecar = json.loads((quick.tracks / f"{track}.json").read_text())
    assert sidecar["size_bytes"] == os.path.getsize(ending["path"])
    assert sidecar["params"] == {
        "inference_steps": 20,
        "scheduler": "euler",
        "guidance_scale": 3.0,
    }
    assert sorted(p.name for p in quick.tracks.glob("*") if track in p.name) == [
        f"{track}.json",
        f"{track}.wav",
    ]


def test_a_repeated_request_is_served_from_the_cache_after_its_response(quick):
    params = {"prompt": "again", "duration_sec": 5, "seed": 3}
    first = quick.call("generate", **params)
    quick.ending(first["track_id"])
    start = len(quick.messages)
    again = quick.call(
        "generate", **params, inference_steps=16, scheduler="EULER", guidance_scale=3
    )
    assert (again["track_id"], again["status"]) == (first["track_id"], "cached")
    ending = quick.ending(first["track_id"], nth=1)
    assert (ending["cached"], ending["generation_time_sec"]) == (True, 0)
    assert "result" in quick.messages[start]
    for change in ({"scheduler": "heun"}, {"guidance_scale": 4}, {"seed": 4}, {"duration_sec": 6}):
        other = quick.call("generate", **{**params, **change})
        assert (other["track_id"], other["status"]) != (first["track_id"], "cached")
        quick.ending(other["track_id"])


def test_a_batch_response_is_sent_before_the_notifications_of_its_tracks(quick):
    start = len(quick.messages)
    batch = [
        {"jsonrpc": "2.0", "id": i, "method": "generate", "params": {"prompt": p, "seed": 1}}
        for i, p in (("b1", "batch"), ("b2", "batch two"))
    ]
    quick.write(json.dumps(batch).encode() + b"\n")
    quick.call("ping")
    responses = next(m for m in quick.messages[start:] if isinstance(m, list))
    assert [r["result"]["status"] for r in responses] == ["generating", "queued"]
    for response in responses:
        assert quick.ending(response["result"]["track_id"])["outcome"] == "complete"
    first = quick.messages[start]
    assert isinstance(first, list)


def test_a_failed_job_reports_its_code_and_the_next_job_completes(quick):
    failing = quick.call("generate", prompt="fail", duration_sec=5)["track_id"]
    next_one = quick.call("generate", prompt="after it", duration_sec=5)["track_id"]
    ending = quick.ending(failing)
    assert (ending["outcome"], ending["code"]) == ("error", "MODEL_INFERENCE_FAILED")
    assert "Shorten" in ending["message"]
    assert quick.ending(next_one)["outcome"] == "complete"


def test_printed_output_goes_to_the_log_and_not_to_the_protocol(quick):
    track = quick.call("generate", prompt="noisy", duration_sec=5)["track_id"]
    assert quick.ending(track)["outcome"] == "complete"
    for line in (b"printed by a library", b"printed by a child", b"written to the number"):
        assert line not in b"".join(quick.raw)
        assert quick.logs(line)


def test_queue_order_limit_duplicates_and_cancellation(quick):
    """Positions, limit of ten, priority, duplicates, cached requests on a full queue, cancels."""
    editor, start = quick, len(quick.messages)
    done = editor.call("generate", prompt="done", duration_sec=5, seed=1)
    editor.ending(done["track_id"])
    running = editor.call("generate", prompt="slow", duration_sec=5, seed=1)
    assert (running["status"], running["position"]) == ("generating", 0)
    waiting = [
        editor.call("generate", prompt=f"number {n}", duration_sec=5, seed=n) for n in range(8)
    ]
    assert [(w["status"], w["position"]) for w in waiting] == [("queued", n + 1) for n in range(8)]
    urgent = [
        editor.call("generate", prompt=f"urgent {n}", duration_sec=5, seed=n, priority="high")
        for n in range(2)
    ]
    assert [u["position"] for u in urgent] == [1, 2]
    for priority in ("normal", "high"):
        full = editor.call_error("generate", prompt="too many", seed=1, priority=priority)
        assert full == (-32004, "QUEUE_FULL")
    same = editor.call("generate", prompt="slow", duration_sec=5, seed=1)
    assert same == {**running, "status": "generating", "position": 0}
    assert editor.call("generate", prompt="done", duration_sec=5, seed=1)["status"] == "cached"
    same = editor.call("generate", prompt="number 7", duration_sec=5, seed=7)
    assert same == {**waiting[7], "position": 10}
    promoted = editor.call("generate", prompt="number 7", duration_sec=5, seed=7, priority="high")
    assert promoted == {**waiting[7], "position": 3}
    dropped = waiting[2]["track_id"]
    result = {"cancelled": True, "was_generating": False}
    assert editor.call("cancel", track_id=dropped) == result
    ending = editor.ending(dropped)
    assert ending == {"outcome": "cancelled", "track_id": dropped, "at_step": 0, "total_steps": 16}
    assert editor.call_error("cancel", track_id=dropped) == (-32001, "ALREADY_COMPLETE")
    result = {"cancelled": True, "was_generating": True}
    for _ in range(2):
        assert editor.call("cancel", track_id=running["track_id"]) == result
    assert editor.ending(running["track_id"])["outcome"] == "cancelled"
    order = [urgent[0], urgent[1], waiting[7], *waiting[:2], *waiting[3:7]]
    for job in order:
        assert editor.ending(job["track_id"])["outcome"] == "complete"
    completed = [
        m["params"]["track_id"]
        for m in editor.messages[start:]
        if m.get("method") == "generation_complete" and not m["params"]["cached"]
    ]
    assert completed == [done["track_id"], *(job["track_id"] for job in order)]
    for job in (running, *waiting, *urgent):
        endings = [n for n in editor.notes(job["track_id"]) if "progress" not in n["method"]]
        assert len(endings) == 1
    assert editor.call_error("cancel", track_id="0" * 16) == (-32000, "TRACK_NOT_FOUND")
    assert editor.call_error("cancel", track_id=done["track_id"]) == (-32001, "ALREADY_COMPLETE")


def test_get_backends_reports_installed_models_and_their_limits(quick):
    result = quick.call("get_backends")
    assert result["default_backend"] == "ace_step"
    musicgen, ace_step = result["backends"]
    assert (musicgen["type"], ace_step["type"]) == ("musicgen", "ace_step")
    assert (musicgen["status"], musicgen["model_version"]) == ("not_installed", None)
    assert (musicgen["licence"], musicgen["commercial_use"]) == ("CC-BY-NC-4.0", False)
    assert (ace_step["status"], ace_step["error"]) == ("ready", None)
    assert "mini" in ace_step["model_version"]
    assert [b["max_duration_sec"] for b in result["backends"]] == [120, 240]
    assert {b["min_duration_sec"] for b in result["backends"]} == {5}
    assert {b["sample_rate"] for b in result["backends"]} == {48000}
    assert quick.call_error("download_backend", backend="x") == (-32007, "INVALID_BACKEND")
    assert quick.call("download_backend", backend="ace_step") == {
        "backend": "ace_step",
        "started": False,
        "already_installed": True,
        "already_downloading": False,
    }


def test_hostile_input_gets_an_error_and_bounded_memory(quick):
    long = json.dumps(
        {"jsonrpc": "2.0", "id": "long", "method": "generate", "params": {"prompt": "x" * 2**21}}
    )
    (response,) = after(quick, long.encode())
    assert error_of(response) == (-32006, "INVALID_PROMPT")
    assert len(json.dumps(response)) < 500
    (response,) = after(quick, b'{"x": "' + b"y" * (9 << 20) + b'"}')
    assert error_of(response) == PARSE
    (response,) = after(quick, request(method="x" * 2**20))
    assert error_of(response) == METHOD
    assert len(json.dumps(response)) < 500
    (response,) = after(quick, b'{"jsonrpc": "2.0", "id": 1, "method": ' + b'{"a":' * 50_000)
    assert error_of(response) == PARSE
    assert psutil.Process(quick.process.pid).memory_info().rss < 300 << 20


def test_ten_thousand_messages_at_once_get_responses_in_order(quick):
    """More output than a pipe holds, read late, blocks nothing."""
    start = len(quick.messages)
    with quick.not_reading():
        quick.write(b"".join(request(id=f"n{i}") + b"\n" for i in range(10_000)))
    quick.response("n9999")
    assert [m["id"] for m in quick.messages[start:]] == [f"n{i}" for i in range(10_000)]


def test_a_message_written_in_two_parts_is_one_message(quick):
    line = request(id="cut") + b"\n" + request(id="cut too") + b"\n"
    for cut in (1, 20, len(line) // 2, len(line) - 1):
        start = len(quick.messages)
        quick.write(line[:cut])
        time.sleep(0.02)
        quick.write(line[cut:])
        quick.find(lambda m, start=start: m in quick.messages[start:] and m.get("id") == "cut too")


def test_ping_is_answered_before_models_are_searched(tmp_path):
    """Of two requests sent at once, the one that needs the models is answered later; torch is
    not loaded. A missing device then fails with its error code."""
    with Editor(tmp_path, REAL, LOFI_DEVICE="metal", ACE_MODEL="mini") as editor:
        editor.write(request(method="get_backends", id="b") + b"\n" + request(id="p") + b"\n")
        editor.response("b")
        assert [m["id"] for m in editor.messages] == ["p", "b"]
        assert "torch" not in {
            part
            for m in psutil.Process(editor.process.pid).memory_maps()
            for part in m.path.split("/")
        }
        made = editor.call("generate", prompt="x", duration_sec=5)
        ending = editor.ending(made["track_id"])
        assert (ending["outcome"], ending["code"]) == ("error", "MODEL_LOAD_FAILED")
        assert {b["status"] for b in editor.call("get_backends")["backends"]} == {"error"}


def test_an_invalid_setting_without_default_exits_with_a_message(tmp_path):
    with Editor(tmp_path, REAL, ACE_THREADS="two") as editor:
        assert editor.process.wait(60) == 2
        assert editor.logs(b"ACE_THREADS must be a whole number")
        assert b"Traceback" not in editor.log


def seconds_to_exit(editor) -> float:
    """Seconds from closing standard input to the exit, whose code must be 0."""
    before = time.monotonic()
    assert editor.end() == 0
    return time.monotonic() - before


def test_closing_the_input_exits_even_during_native_code(tmp_path):
    with Editor(tmp_path, TMPDIR=str(tmp_path)) as editor:
        editor.call("generate", prompt="native", duration_sec=5)
        time.sleep(0.1)
        assert seconds_to_exit(editor) < 1
        assert not list(editor.tracks.glob("*.wav"))
        assert not list(tmp_path.glob("ace-studio-*"))


@pytest.mark.parametrize("prompt", ["slow", "native"])
def test_shutdown_responds_cancels_every_job_and_exits(tmp_path, prompt):
    with Editor(tmp_path) as editor:
        running = editor.call("generate", prompt=prompt, duration_sec=5)["track_id"]
        waiting = editor.call("generate", prompt="waiting", duration_sec=5)["track_id"]
        before = time.monotonic()
        assert editor.call("shutdown") == {"status": "shutting_down"}
        assert editor.process.wait(20) == 0
        assert time.monotonic() - before < 6
        for track in (running, waiting):
            assert editor.ending(track)["outcome"] == "cancelled"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_exits_cleanly(tmp_path, number, code):
    with Editor(tmp_path, TMPDIR=str(tmp_path)) as editor:
        editor.call("generate", prompt="slow", duration_sec=5)
        editor.process.send_signal(number)
        assert editor.process.wait(20) == code
        assert not list(tmp_path.glob("ace-studio-*"))
        assert b"Traceback" not in editor.log


def test_it_exits_when_the_output_pipe_is_closed(tmp_path):
    with Editor(tmp_path) as editor:
        editor.call("ping")
        child = editor.process
        fd = child.stdout.fileno()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, fd)  # closes the last read end of the pipe
        os.close(null)
        with contextlib.suppress(BrokenPipeError):
            for _ in range(20):
                editor.write(request() + b"\n")
                time.sleep(0.05)
        assert child.wait(20) == 0


def test_two_daemons_share_a_cache_and_track_ids_cannot_leave_it(quick):
    """The second finds the first's tracks and makes the same track at the same time. Its last
    request has no line end and is answered although its input then closes."""
    cache = quick.tracks.parent
    for suffix in ("json", "wav"):
        (cache / f"mine.{suffix}").write_text("{}")
    old = {"prompt": "old", "duration_sec": 5, "seed": 1}
    track = quick.call("generate", **old)["track_id"]
    quick.ending(track)
    with Editor(cache) as other:
        assert other.call_error("cancel", track_id=track) == (-32001, "ALREADY_COMPLETE")
        for name in ("../mine", "..", "/etc/passwd", "a/../../mine", track.upper(), ""):
            assert other.call_error("cancel", track_id=name) == (-32000, "TRACK_NOT_FOUND")
        assert other.call("generate", **old)["status"] == "cached"
        params = {"prompt": "shared", "duration_sec": 5, "seed": 1}
        both = [editor.call("generate", **params) for editor in (quick, other)]
        assert both[0]["track_id"] == both[1]["track_id"]
        for editor, made in zip((quick, other), both, strict=True):
            ending = editor.ending(made["track_id"])
            assert ending["outcome"] == "complete"
            assert soundfile.info(ending["path"]).frames == 240_000
        assert other.call("generate", **params)["status"] == "cached"
        other.process.stdin.write(request(id="last", method="get_backends"))
        assert other.end() == 0
        assert "result" in other.response("last")
    assert (cache / "mine.wav").read_text() == "{}"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_hundred_kills_leave_no_partial_track(tmp_path):
    """Kill two daemons while they write; every track served afterwards is complete."""
    chance, served = random.Random(6), 0
    for turn in range(50):
        requests = [{"prompt": f"{turn} {n}", "duration_sec": 60, "seed": 1} for n in range(8)]
        with Editor(tmp_path) as one, Editor(tmp_path) as two:
            for editor in (one, two):
                editor.call("get_backends")
            tracks = [[e.call("generate", **r)["track_id"] for r in requests] for e in (one, two)]
            assert tracks[0] == tracks[1]
            one.ending(tracks[0][0])
            time.sleep(chance.uniform(0, 1.5))
        kept = TrackCache(one.tracks, 10**9)
        for track in tracks[0]:
            if facts := kept.find(track):
                sound = kept.path(track).read_bytes()
                assert hashlib.sha256(sound).hexdigest() == facts["sha256"]
                assert soundfile.info(kept.path(track)).frames == 60 * 48_000
                served += 1
        shutil.rmtree(one.tracks)
    print(f"{served} tracks were complete after 100 kills, {50 * 8 - served} were missing")
    assert 50 <= served < 400, "kills hit both before and after tracks were written"


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """A daemon with its own settings, some of them invalid, and no access to the hub."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "set.toml").write_text(
        'ace_step_steps = 9\nace_step_scheduler = "heun"\nace_step_guidance = 99.0\ncolour = "red"\n',
        encoding="utf-8-sig",  # as some editors on Windows write it
    )
    env = {
        "LOFI_CONFIG": str(folder / "set.toml"),
        "LOFI_ACE_STEP_STEPS": "8",
        "LOFI_BACKEND": "musicgen",
        "LOFI_DEVICE": "toaster",
        "LOFI_THREADS": "0",
        "LOFI_CACHE_MAX_MB": "2",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
    }
    with Editor(folder, **env) as editor:
        yield editor


def test_environment_overrides_the_config_file_which_overrides_defaults(configured):
    result = configured.call("get_backends")
    assert result["default_backend"] == "musicgen"
    ace_step = result["backends"][1]
    assert ace_step["default_inference_steps"] == 8
    assert ace_step["default_scheduler"] == "heun"
    assert ace_step["default_guidance_scale"] == 3.0
    assert configured.call_error("generate", prompt="x") == (-32008, "BACKEND_NOT_INSTALLED")
    made = configured.call("generate", prompt="x", duration_sec=5, backend="ace_step", seed=1)
    configured.ending(made["track_id"])
    sampler = {"inference_steps": 8, "scheduler": "heun", "guidance_scale": 3}
    again = {"prompt": "x", "duration_sec": 5, "backend": "ace_step", "seed": 1, **sampler}
    assert configured.call("generate", **again)["status"] == "cached"
    other = configured.call("generate", **again | {"scheduler": "euler", "inference_steps": 4})
    assert other["track_id"] != made["track_id"]
    configured.ending(other["track_id"])
    sidecar = json.loads((configured.tracks / f"{other['track_id']}.json").read_text())
    assert sidecar["params"] == {**sampler, "scheduler": "euler", "inference_steps": 4}
    for word in (b"ace_step_guidance", b"colour", b"device", b"threads"):
        assert configured.logs(word)


def test_the_cache_keeps_its_size_limit_and_the_newest_tracks(configured):
    made, params = [], {"backend": "ace_step", "duration_sec": 5}
    for n in range(4):
        track = configured.call("generate", prompt=f"n {n}", seed=n, **params)["track_id"]
        assert configured.ending(track)["outcome"] == "complete"
        made.append(track)
    assert sorted(p.stem for p in configured.tracks.glob("*.wav")) == sorted(made[-2:])
    huge = configured.call("generate", prompt="long", seed=1, **params | {"duration_sec": 20})[
        "track_id"
    ]
    assert os.path.exists(configured.ending(huge)["path"])
    assert [p.stem for p in configured.tracks.glob("*.wav")] == [huge]


def test_an_offline_download_fails_and_can_be_retried(configured):
    for nth in range(2):
        assert configured.call("download_backend", backend="musicgen")["started"]
        error = configured.downloads("error", nth + 1)[nth]
        assert (error["backend"], error["code"]) == ("musicgen", "MODEL_DOWNLOAD_FAILED")
        musicgen = configured.call("get_backends")["backends"][0]
        assert (musicgen["status"], musicgen["error"]) == ("error", error["message"])
    refused = configured.call_error("generate", prompt="x", backend="musicgen")
    assert refused == (-32008, "BACKEND_NOT_INSTALLED")


def test_a_killed_download_resumes_reports_progress_and_installs_musicgen(tmp_path):
    files = dict.fromkeys(catalog.MUSICGEN.files, 100) | {"model.safetensors": 400_000}
    with repository(tmp_path / "served", catalog.MUSICGEN.repo, files):
        pass
    with FakeHub(tmp_path / "served", lfs_threshold=1 << 16) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        hub.faults.rate = 400_000
        with Editor(tmp_path, **env) as editor:
            assert editor.call("get_backends")["backends"][0]["status"] == "not_installed"
            started = editor.call("download_backend", backend="musicgen")
            assert (started["started"], started["already_downloading"]) == (True, False)
            again = editor.call("download_backend", backend="musicgen")
            assert (again["started"], again["already_downloading"]) == (False, True)
            assert editor.call("get_backends")["backends"][0]["status"] == "downloading"
            editor.find(lambda m: m.get("params", {}).get("component") == "model.safetensors")
        parts = [p for p in (tmp_path / "hf").rglob("partial/*") if p.suffix != ".etag"]
        had = sum(part.stat().st_size for part in parts)
        hub.faults.rate = 0
        with Editor(tmp_path, **env) as editor:
            assert editor.call("download_backend", backend="musicgen")["started"]
            assert editor.downloads("complete", 1) == [{"backend": "musicgen"}]
            progress = editor.downloads("progress", 1)
            assert all(
                t["overall_percent"] <= 100 and t["bytes_total"] == 400_200 for t in progress
            )
            assert [t["bytes_downloaded"] for t in progress] == sorted(
                t["bytes_downloaded"] for t in progress
            )
            assert (progress[-1]["overall_percent"], progress[-1]["bytes_downloaded"]) == (
                100,
                400_200,
            )
            assert (progress[-1]["files_completed"], progress[-1]["files_total"]) == (3, 3)
            ready = editor.call("get_backends")["backends"][0]
            assert (ready["status"], ready["error"]) == ("ready", None)
            assert ready["model_version"].startswith("musicgen-small-")
            made = editor.call("generate", prompt="slow", duration_sec=5, backend="musicgen")
            assert made["status"] == "generating"
        assert hub.log[-1].range == (f"bytes={had}-" if had else "")


@pytest.mark.parametrize("measured", [False, True])
def test_time_left_is_within_10_percent_after_the_first_10_percent(tmp_path, measured):
    """A job with the embedded model's time per stage, without measured rates or with rates of
    four jobs that were 20 % slower and one that was 30 times slower."""
    now = [0.0]
    stages = (
        ("Reading the words", 1, 0.3),
        ("Denoising", 16, 0.5),
        ("Decoding", 3, 0.8),
        ("Writing", 1, 1.6),
    )
    rates = estimates.Rates("here", tmp_path / "rates.json")
    work = {stage: 1.0 for stage, *_ in stages}
    if measured:
        for slower in (1.2, 1.2, 1.2, 1.2, 30):
            rates.learn({stage: slower * steps * each for stage, steps, each in stages}, work)
    clock = estimates.TimeLeft(rates, work, lambda: now[0])
    job = Job(SimpleNamespace(track_id="t", backend="ace_step", total_steps=16))
    estimated_ends = []
    for stage, steps, each in stages:
        for step in range(steps + 1):
            now[0] += each if step else 0.0
            event = clock.tick(Progress(stage=stage, step=step, steps=steps))
            if (note := job.progress(event, now[0])) and note["percent"] >= 10:
                estimated_ends.append(now[0] + note["eta_sec"])
    assert len(estimated_ends) == 15
    assert max(abs(end - now[0]) for end in estimated_ends) <= 0.1 * now[0]


@pytest.mark.parametrize(
    ("total", "stride", "percents"),
    [(1, 1, [99]), (3, 1, [33, 66, 99]), (20, 1, [*range(5, 100, 5), 99]), (100, 33, [33, 66, 99])],
)
def test_progress_percent_rises_and_ends_at_99(total, stride, percents):
    """Also where the last but one is 99."""
    job = Job(SimpleNamespace(track_id="t", backend="musicgen", total_steps=total))
    reported = []
    for step in [*range(0, total, stride), total]:
        event = Progress(stage="Composing", step=step, steps=total)
        if note := job.progress(event, float(step)):
            reported.append(note["percent"])
    assert reported == percents


# From here on with the embedded model.

PIECE = {"prompt": "warm lofi piano", "duration_sec": 5, "seed": 7, "inference_steps": 2}


def to_16_bit(path) -> np.ndarray:
    """The samples of a file rounded to 16 bits, as in a track, [frames, channels]."""
    sound = soundfile.read(path, dtype="int32", always_2d=True)[0].astype(np.int64)
    return np.clip((sound + 0x8000) >> 16, -32768, 32767)


def sidecar_of(editor, track: str) -> dict:
    return json.loads((editor.tracks / f"{track}.json").read_text())


def flags(request: dict) -> list[str]:
    """Command-line flags of a request."""
    arguments = []
    for name, value in request.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value not in (None, "", [], "unknown"):
            arguments += [f"--{flag}", str(value)]
    return arguments


def by_page(studio, request: dict, _: Path) -> Path:
    page = Page(studio)
    form = page.inputs("generate")
    page.run_mode("generate", "page", **{k: v for k, v in request.items() if k in form})
    return Path(studio.takes("page")[0].path)


def by_api(studio, request: dict, folder: Path) -> Path:
    for file, _ in endpoint(studio, Generate)(*(request[k.name] for k in Generate.params())):
        if file:
            return Path(shutil.copy(file["path"], folder / "api.wav"))
    raise AssertionError("the API returned no file")


def by_command_line(_, request: dict, folder: Path) -> Path:
    out = folder / "line.flac"
    assert app.main(["generate", *flags(request), "--out", str(out), "--device", "cpu"]) == 0
    return out


@pytest.mark.parametrize(
    ("scheduler", "seed", "interfaces"),
    [
        ("euler", 8, [by_api]),
        ("heun", 8, [by_api]),
        ("pingpong", 2**63 + 12_345, [by_page, by_api, by_command_line]),
    ],
)
def test_every_interface_makes_the_same_samples(
    real, studio, tmp_path, scheduler, seed, interfaces
):
    """Page, API and command line run the request from the sidecar of a daemon track."""
    made = real.call("generate", **{**PIECE, "seed": seed, "scheduler": scheduler})
    ending = real.ending(made["track_id"])
    assert (ending["outcome"], made["seed"], ending["seed"]) == ("complete", seed, seed), ending
    track = soundfile.read(ending["path"], dtype="int16", always_2d=True)[0]
    assert np.abs(track).max() > 10_000
    request = sidecar_of(real, made["track_id"])["request"]
    for interface in interfaces:
        assert np.array_equal(track, to_16_bit(interface(studio, request, tmp_path))), (
            interface.__name__
        )


def test_ping_and_cancel_respond_promptly_while_the_model_runs(real):
    made = real.call("generate", prompt="long", duration_sec=20, inference_steps=100)
    track = made["track_id"]
    real.find(
        lambda m: m.get("method") == "generation_progress" and m["params"]["track_id"] == track
    )
    pings = []
    for _ in range(20):
        before = time.monotonic()
        real.call("ping")
        pings.append(time.monotonic() - before)
    assert max(pings) < 0.5
    assert sorted(pings)[10] < 0.05
    assert real.call("get_backends")["backends"][1]["loaded"]
    before = time.monotonic()
    assert real.call("cancel", track_id=track)["was_generating"]
    ending = real.ending(track)
    assert time.monotonic() - before < 5, "about one step on a busy machine"
    assert (ending["outcome"], ending["total_steps"]) == ("cancelled", 100)
    assert 1 <= ending["at_step"] < 100
    last_note = real.notes(track)[-1]
    assert last_note["method"] == "generation_cancelled"
    assert not (real.tracks / f"{track}.wav").exists()
    ending = real.ending(real.call("generate", **{**PIECE, "seed": 8})["track_id"])
    assert ending["outcome"] == "complete"


def test_an_evicted_track_is_regenerated_byte_for_byte(real):
    files = []
    for nth in range(2):
        track = real.call("generate", **PIECE)["track_id"]
        ending = real.ending(track, nth)
        assert (ending["outcome"], ending["cached"]) == ("complete", False)
        files.append(Path(ending["path"]).read_bytes())
        Path(ending["path"]).unlink()
    assert files[0] == files[1]
    assert b"ACE Music Studio" in files[0]


def test_musicgen_makes_a_track_and_unloads_the_other_model(real, tmp_path, monkeypatch, capsys):
    """Progress in tokens, 48 kHz, the licence in the file, and only one model in memory."""
    params = {"prompt": "warm lofi piano", "duration_sec": 5, "seed": 7, "backend": "musicgen"}
    made = real.call("generate", **params, scheduler="heun", guidance_scale=9)
    ending = real.ending(made["track_id"])
    assert (ending["outcome"], ending["backend"], ending["sample_rate"]) == (
        "complete",
        "musicgen",
        48000,
    )
    for note in real.notes(made["track_id"], "progress"):
        progress = note["params"]
        assert progress["total_steps"] == progress["tokens_estimated"] == 250
        assert progress["current_step"] == progress["tokens_generated"]
    percents = [note["params"]["percent"] for note in real.notes(made["track_id"], "progress")]
    assert percents == sorted(set(percents))
    assert percents[-1] == 99
    assert b"CC-BY-NC-4.0, not for commercial use" in Path(ending["path"]).read_bytes()
    sidecar = sidecar_of(real, made["track_id"])
    assert (sidecar["commercial_use"], sidecar["params"]) == (False, {})
    assert real.call("generate", **params)["status"] == "cached"
    loaded = [b["loaded"] for b in real.call("get_backends")["backends"]]
    assert loaded == [True, False]
    out = tmp_path / "piece.flac"
    monkeypatch.setenv("ACE_MUSICGEN", str(real.musicgen))
    common = {k: v for k, v in sidecar["request"].items() if k not in ("temperature", "top_k")}
    line = ["generate", "--backend", "musicgen", *flags(common), "--device", "cpu"]
    assert app.main([*line, "--out", str(out)]) == 0
    assert "Loading MusicGen" in capsys.readouterr().err
    track = soundfile.read(ending["path"], dtype="int16", always_2d=True)[0]
    assert np.array_equal(track, to_16_bit(out))
    assert settings.read_settings(out)["mode"] == "musicgen"

    monkeypatch.setattr(restore, "uploaded_path", lambda _: out)
    with pytest.raises(StudioError) as caught:
        restore._find_settings({"file": "an upload"}, CARD)
    assert caught.value.code == "settings-elsewhere", "the page has no tab for it"
    assert "app.py replay" in caught.value.action


@pytest.mark.parametrize(
    ("name", "seconds", "limits"),
    [
        ("musicgen", "121", "5 to 120 s"),
        ("ace-step", "601", "5 to 600 s"),
        ("ace_step", "4", "5 to 600 s"),
    ],
)
def test_the_command_line_checks_each_backends_duration_range(capsys, name, seconds, limits):
    line = ("generate", "--backend", name, "--prompt", "x", "--duration-s", seconds)
    assert app.main([*line, "--model", "mini", "--device", "cpu"]) == startup.USAGE
    assert limits in capsys.readouterr().err


def test_closing_the_input_exits_while_the_model_runs(real):
    made = real.call("generate", prompt="x", duration_sec=20, inference_steps=100)["track_id"]
    real.find(lambda m: m.get("method") and m["params"]["track_id"] == made)
    assert seconds_to_exit(real) < 1
    assert not list(real.tracks.glob(f"*{made}*"))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_decoding_four_minutes_does_not_depend_on_the_tile_size(engine, monkeypatch):
    """Artefacts at tile boundaries would move with the tile size."""
    import torch

    request, sounds = song(duration_s=240, inference_steps=4), []
    with torch.inference_mode():
        conditions, _ = engine.conditions(request)
        latents = drain(engine.denoise(conditions, request))
        for frames in (vae.TILE_FRAMES, 333):
            monkeypatch.setattr(vae, "TILE_FRAMES", frames)
            sounds.append(drain(vae.decode(engine.pipe.vae, latents)).numpy())
    one, other = sounds
    assert latents.shape[1] == 240 * 25
    assert np.abs(one - other).max() <= 1e-6 * np.abs(one).max()
    assert np.abs(one).max() > 0.1
