"""A daemon that does what the prompt's first word says, for tests of the editor's side.

SCRIPT in the environment: "broken" ends at the start with a complaint, "deaf" does not end when its
input does. LOG names a file that gets every line that came in, and "started" at the start; PIDFILE
one that gets the process's number.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

out = os.fdopen(os.dup(1), "wb", buffering=0)
lock = threading.Lock()
cancelled: set[str] = set()
tracks = Path(os.environ.get("TRACKS", "/tmp"))


def log(line: str) -> None:
    if name := os.environ.get("LOG"):
        with open(name, "a") as file:
            file.write(line + "\n")


def send(message: dict[str, Any], piece: int = 0) -> None:
    """Write a message; with `piece`, that many bytes at a time."""
    data = json.dumps({"jsonrpc": "2.0", **message}, ensure_ascii=False).encode() + b"\n"
    with lock:
        for start in range(0, len(data), piece or len(data)):
            out.write(data[start : start + (piece or len(data))])
            if piece:
                time.sleep(0.0005)


def note(method: str, **params: Any) -> None:
    send({"method": method, "params": params})


def complete(track: str, prompt: str, **more: Any) -> dict[str, Any]:
    path = tracks / f"{track}.wav"
    path.write_bytes(b"RIFF")
    return {
        "track_id": track,
        "path": str(path),
        "duration_sec": 5,
        "sample_rate": 48000,
        "prompt": prompt,
        "seed": 7,
        "generation_time_sec": 0.1,
        "model_version": None,
        "backend": "ace_step",
        **more,
    }


def steps(track: str, count: int = 4, pause: float = 0.02) -> bool:
    for i in range(1, count):
        time.sleep(pause)
        if track in cancelled:
            note("generation_cancelled", track_id=track, at_step=i, total_steps=count)
            return False
        note(
            "generation_progress",
            track_id=track,
            percent=100 * i // count,
            current_step=i,
            total_steps=count,
            eta_sec=(count - i) * pause,
        )
    return True


def make(number: int, params: dict[str, Any]) -> None:
    prompt = params["prompt"]
    how = prompt.split()[0]
    track = prompt.encode().hex()[:16].ljust(16, "0")
    answer = {
        "track_id": track,
        "status": "queued" if how == "queued" else "generating",
        "position": 1 if how == "queued" else 0,
        "seed": params.get("seed", 7),
        "backend": params.get("backend", "ace_step"),
    }
    reply = {"id": number, "result": answer}
    if how == "refuse":
        data = {"error_code": "QUEUE_FULL", "details": "Ten songs wait already."}
        return send(
            {"id": number, "error": {"code": -32004, "message": "Queue full", "data": data}}
        )
    if how == "mute":
        return None
    if how == "late":
        time.sleep(0.4)
    if how == "reversed":
        note("generation_complete", **complete(track, prompt))
        return send(reply)
    if how == "bytes":
        send(reply, piece=1)
        return send({"method": "generation_complete", "params": complete(track, prompt)}, piece=1)
    send(reply)
    if how == "crash":
        print("the roof fell in", file=sys.stderr, flush=True)
        os._exit(3)
    if how == "fail":
        return note(
            "generation_error", track_id=track, code="MODEL_LOAD_FAILED", message="Too large."
        )
    if how == "big":
        return note("generation_complete", **complete(track, prompt, blob="é" * 300_000))
    if how == "noise":
        with lock:
            out.write(b"Loading weights: 100%\n\n[1, 2\n")
    if how in ("slow", "late", "queued"):
        if not steps(track, 200, 0.02):
            return None
    elif not steps(track):
        return None
    return note("generation_complete", **complete(track, prompt))


def fetch(backend: str) -> None:
    for i in range(1, 4):
        note(
            "download_progress",
            backend=backend,
            component="model.safetensors",
            component_percent=25 * i,
            overall_percent=25 * i,
            bytes_downloaded=i,
            bytes_total=4,
        )
        time.sleep(0.02)
    note("download_complete", backend=backend)


def handle(message: dict[str, Any]) -> None:
    number, method, params = message["id"], message["method"], message["params"]
    if method == "ping":
        send({"id": number, "result": {"status": "ok", "version": "1"}})
    elif method == "generate":
        threading.Thread(target=make, args=(number, params), daemon=True).start()
    elif method == "cancel":
        cancelled.add(params["track_id"])
        send({"id": number, "result": {"cancelled": True, "was_generating": True}})
    elif method == "get_backends":
        backends = [
            {
                "type": "musicgen",
                "name": "MusicGen-Small",
                "status": "not_installed",
                "size_bytes": 2_370_000_000,
                "min_duration_sec": 5,
                "max_duration_sec": 120,
                "sample_rate": 48000,
                "model_version": None,
            },
            {
                "type": "ace_step",
                "name": "ACE-Step-3.5B",
                "status": "ready",
                "device": "cpu",
                "dtype": "float32",
                "min_duration_sec": 5,
                "max_duration_sec": 240,
                "sample_rate": 48000,
                "model_version": "ace-step-v1",
            },
        ]
        send({"id": number, "result": {"backends": backends, "default_backend": "ace_step"}})
    elif method == "download_backend":
        ready = params["backend"] == "ace_step"
        send({"id": number, "result": {"started": not ready, "already_installed": ready}})
        if not ready:
            threading.Thread(target=fetch, args=("musicgen",), daemon=True).start()


log("started")
if place := os.environ.get("PIDFILE"):
    Path(place).write_text(f"{os.getpid()}\n")
script = os.environ.get("SCRIPT", "")
if script == "broken":
    print("no module named torch", file=sys.stderr)
    sys.exit(1)
for line in sys.stdin.buffer:
    log(line.decode().strip())
    handle(json.loads(line))
while script == "deaf":
    time.sleep(1)
os._exit(0)
