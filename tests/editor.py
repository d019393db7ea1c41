"""A JSON-RPC client for tests: starts a daemon process and records its messages in order."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import ROOT

QUICK = str(Path(__file__).parent / "quick_daemon.py")
REAL = str(ROOT / "app.py")


class Editor:
    """Runs `program` with its track cache in `cache`; leaving the `with` block kills it."""

    def __init__(self, cache: Path, program: str = QUICK, **env: str) -> None:
        self.tracks = cache / "tracks"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name == "ACE_THREADS" or not name.startswith(("LOFI_", "ACE_"))
        }
        self.process = subprocess.Popen(
            [sys.executable, program, *(["daemon"] if program == REAL else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **inherited,
                "LOFI_CACHE_PATH": str(cache),
                "LOFI_CONFIG": "none.toml",
                "PYTHONPATH": str(ROOT),
                **env,
            },
        )
        self.messages: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.log = b""
        self._more = threading.Condition()
        self._readers = [
            threading.Thread(target=read, daemon=True) for read in (self._read, self._err)
        ]
        for reader in self._readers:
            reader.start()
        self._ids = iter(range(1, 1 << 30))

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._more:
                self.raw.append(line)
                self.messages.append(json.loads(line))
                self._more.notify_all()

    def _err(self) -> None:
        for line in self.process.stderr:
            self.log += line

    def write(self, data: bytes) -> None:
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def send(self, method: str, /, **params: Any) -> int:
        """Send a request without waiting; returns its id."""
        name = next(self._ids)
        message = {"jsonrpc": "2.0", "id": name, "method": method, "params": params}
        self.write(json.dumps(message).encode() + b"\n")
        return name

    @contextlib.contextmanager
    def not_reading(self) -> Iterator[None]:
        """Stop reading: the daemon's output stays in the pipe inside the `with` block."""
        with self._more:
            yield

    def find(self, wanted: Callable[[dict[str, Any]], Any], within_s: float = 90) -> dict[str, Any]:
        """The first message for which `wanted` is true, received already or later; no batches.

        AssertionError after `within_s` seconds or once the process has exited.
        """
        deadline, seen = time.monotonic() + within_s, 0
        with self._more:
            while True:
                for message in self.messages[seen:]:
                    if isinstance(message, dict) and wanted(message):
                        return message
                seen = len(self.messages)
                left = deadline - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and not self._more.wait(0.5)):
                    raise AssertionError(f"no such message; the log: {self.log.decode()[-2000:]}")
                self._more.wait(min(left, 1))

    def logs(self, text: bytes, within_s: float = 20) -> bool:
        """Whether standard error contains `text` within `within_s` seconds."""
        deadline = time.monotonic() + within_s
        while text not in self.log and time.monotonic() < deadline:
            time.sleep(0.02)
        return text in self.log

    def response(self, name: Any) -> dict[str, Any]:
        """The response to the request with id `name`."""
        return self.find(lambda m: "method" not in m and m.get("id") == name)

    def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Send a request; its result. AssertionError if it fails."""
        response = self.response(self.send(method, **params))
        assert "error" not in response, response
        return response["result"]

    def call_error(self, method: str, /, **params: Any) -> tuple[int, str]:
        """Send a request that fails; number and constant of its error."""
        return error_of(self.response(self.send(method, **params)))

    def notes(self, track: str, kind: str = "") -> list[dict[str, Any]]:
        """Notifications about a track so far, in order."""
        with self._more:
            return [
                m
                for m in self.messages
                if isinstance(m, dict)
                and m.get("method", "").startswith(f"generation_{kind}")
                and m["params"]["track_id"] == track
            ]

    def downloads(self, kind: str, count: int) -> list[dict[str, Any]]:
        """Parameters of the download notifications, once there are `count` of that kind."""
        method = f"download_{kind}"

        def received() -> list[dict[str, Any]]:
            return [m["params"] for m in self.messages if m.get("method") == method]

        self.find(lambda _: len(received()) >= count)
        return received()

    def ending(self, track: str, nth: int = 0) -> dict[str, Any]:
        """How the track's job ended: the notification's short name as "outcome", and its fields."""
        endings = ("generation_complete", "generation_error", "generation_cancelled")
        seen = []

        def wanted(message: dict[str, Any]) -> bool:
            if message.get("method") in endings and message["params"]["track_id"] == track:
                seen.append(message)
            return len(seen) > nth

        found = self.find(wanted)
        return {"outcome": found["method"].removeprefix("generation_"), **found["params"]}

    def end(self, within_s: float = 20) -> int:
        """Close standard input; the exit code."""
        self.process.stdin.close()
        return self.process.wait(within_s)


def error_of(response: dict[str, Any]) -> tuple[int, str]:
    """Number and constant of an error response; all errors have the same shape."""
    error = response["error"]
    assert set(error) == {"code", "message", "data"}
    assert set(error["data"]) == {"error_code", "details"}
    assert error["data"]["details"].endswith(".")
    return error["code"], error["data"]["error_code"]
