"""A simulated ZeroGPU: the real `spaces` package, forked workers, a fake scheduler.

torch is hidden from the child process, since `spaces` would look for a CUDA device in it; the
engine is a fake that yields steps. The rest is real: pickling, forking, the stop file, durations,
abortion.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest
from conftest import ROOT


@pytest.fixture
def scheduler():
    """A fake of the part of ZeroGPU's device API that `spaces` uses; records its requests."""
    requests = []

    class Api(BaseHTTPRequestHandler):
        def do_POST(self):
            url = urlparse(self.path)
            requests.append((url.path, {k: v[0] for k, v in parse_qs(url.query).items()}))
            body = b""
            if url.path == "/schedule":
                body = json.dumps(
                    {"idle": True, "nvidiaIndex": 0, "nvidiaUUID": "MIG-none", "allowToken": "t"}
                ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json" if body else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.requests = requests
    yield server
    server.shutdown()


CHILD = """
import os, sys, time
sys.modules["torch"] = None
import backend
from audio import analysis
from core import files
from models import catalog
from runtime import device, device_queue
import numpy as np
from core.requests import Generate
from core.results import Progress
from models.acestep import RenderedAudio

MAIN, MARK, MINI = os.getpid(), {mark!r}, catalog.MODELS["mini"]
assert device.ON_ZERO

class Engine:
    "A fake engine: slow steps in the forked worker."
    model = MINI

    def text_to_music(self, request, **_):
        assert os.getpid() != MAIN
        yield Progress(stage="Reading the words")
        for i in range(request.inference_steps + 1):
            yield Progress(stage="Denoising", step=i, steps=request.inference_steps)
            time.sleep(0.05)
            if request.seed == 13 or (request.seed == 14 and not os.path.exists(MARK)):
                open(MARK, "w").close()
                os._exit(1)
        yield Progress(stage="Decoding")
        return RenderedAudio(np.zeros((2, 480), np.float32), None, request.seed)

class NoCheck:
    "Replaces the audio check, whose scipy would import torch."
    model_dump = lambda self, **_: {{}}

analysis.check = lambda *_: NoCheck()
device.version = lambda _: "hidden"
device.free = lambda _: None
studio = backend.Studio(MINI, device.find_device(), planner="none")
studio.runner.models._loaded[MINI, MINI.folder] = Engine()
studio.runner.models._fingerprints[MINI.folder] = "0" * 64

def song(**params):
    return Generate.of({{"prompt": "x", "duration_s": 10, **params}})
"""


def run_on_zerogpu(scheduler, tmp_path, body: str) -> str:
    """Run `body` in a process with ZeroGPU's environment; its standard output."""
    script = CHILD.format(mark=str(tmp_path / "mark"))
    process = subprocess.Popen(
        [sys.executable, "-c", script + textwrap.dedent(body)],
        cwd=ROOT,
        env={
            **os.environ,
            "SPACES_ZERO_GPU": "true",
            "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{scheduler.server_port}",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "GRADIO_ANALYTICS_ENABLED": "False",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # forked workers outlive their parent
    assert process.returncode == 0, err[-3000:]
    lines = [line for line in out.splitlines() if not line.startswith("SPACES_ZERO_GPU_DEBUG")]
    return "\n".join(lines)


def scheduled_seconds(scheduler) -> list[int]:
    return [int(q["durationSeconds"]) for path, q in scheduler.requests if path == "/schedule"]


def test_a_worker_makes_the_song_and_the_next_duration_is_the_measured_one(scheduler, tmp_path):
    out = run_on_zerogpu(
        scheduler,
        tmp_path,
        """
        for _ in range(2):
            events = list(studio.run(song(inference_steps=4, seed=1), "v"))
            print(events[-1].kind, [e.step for e in events if getattr(e, "stage", "") == "Denoising"])
        """,
    )
    first, second = out.strip().splitlines()
    assert first.startswith("take")
    assert second.startswith("take")
    assert "4]" in first
    requested = scheduled_seconds(scheduler)
    assert requested[0] == 60, "the minimum before anything was measured"
    assert requested[1] < 5, "the measured time and a margin"


def test_stop_reaches_the_worker_and_a_stopped_waiting_job_uses_no_quota(scheduler, tmp_path):
    out = run_on_zerogpu(
        scheduler,
        tmp_path,
        """
        began = None
        for event in studio.run(song(inference_steps=90, seed=1), "v"):
            if event.kind == "progress" and event.stage == "Denoising" and event.step == 3:
                studio.stop("v"); began = time.monotonic()
        print(event.kind, round(time.monotonic() - began, 2), len(os.listdir(files.private_folder())))
        enter = device_queue.DeviceQueue.enter
        device_queue.DeviceQueue.enter = lambda *args: (studio.stop("v"), enter(*args))[1]
        print(list(studio.run(song(inference_steps=2, seed=1), "v"))[-1].kind)
        """,
    )
    running, waiting = out.strip().splitlines()
    kind, took, left = running.split()
    assert kind == "cancelled"
    assert float(took) < 1.5
    assert left == "0"
    assert waiting == "cancelled"
    assert len(scheduled_seconds(scheduler)) == 1, "only the first song was scheduled"


def test_an_aborted_task_is_retried_once_with_double_the_time(scheduler, tmp_path):
    out = run_on_zerogpu(
        scheduler,
        tmp_path,
        """
        for seed in (13, 14):
            ending = list(studio.run(song(inference_steps=2, seed=seed), "v"))[-1]
            print(ending.kind, getattr(ending, "code", ""))
            if seed == 13:
                os.remove(MARK)
        """,
    )
    assert [line.strip() for line in out.splitlines()] == ["failed gpu-aborted", "take"]
    assert scheduled_seconds(scheduler) == [60, 120, 60, 120]
