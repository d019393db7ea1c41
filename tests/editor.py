"""An editor for tests: a daemon process, what it is told and all that it says, in order."""

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
    """Starts `program`; its tracks are in `cache`. Leaving a `with` kills what still runs."""

    def __init__(self, cache: Path, program: str = QUICK, **env: str) -> None:
        self.tracks = cache / "tracks"
        own = {k: v for k, v in os.environ.items() if not k.startswith(("LOFI_", "ACE_"))}
        self.process = subprocess.Popen(
            [sys.executable, program, *(["daemon"] if program == REAL else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **own,
                "LOFI_CACHE_PATH": str(cache),
                "LOFI_CONFIG": "none.toml",
                "PYTHONPATH": str(ROOT),
                **env,
            },
        )
        self.said: list[dict[str, Any]] = []
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
                self.said.append(json.loads(line))
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
        """What the daemon says stays in the pipe for a while."""
        with self._more:
            yield

    def find(self, wanted: Callable[[dict[str, Any]], Any], within_s: float = 90) -> dict[str, Any]:
        """The first message beside batches that is `wanted`, which may have come already."""
        deadline, seen = time.monotonic() + within_s, 0
        with self._more:
            while True:
                for message in self.said[seen:]:
                    if isinstance(message, dict) and wanted(message):
                        return message
                seen = len(self.said)
                left = deadline - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and not self._more.wait(0.5)):
                    raise AssertionError(f"not said; the log: {self.log.decode()[-2000:]}")
                self._more.wait(min(left, 1))

    def logs(self, text: bytes, within_s: float = 20) -> bool:
        """Whether standard error says `text`, which is read beside the wire and may come later."""
        deadline = time.monotonic() + within_s
        while text not in self.log and time.monotonic() < deadline:
            time.sleep(0.02)
        return text in self.log

    def answer(self, name: Any) -> dict[str, Any]:
        return self.find(lambda m: "method" not in m and m.get("id") == name)

    def ask(self, method: str, /, **params: Any) -> dict[str, Any]:
        """The result of a request."""
        answer = self.answer(self.send(method, **params))
        assert "error" not in answer, answer
        return answer["result"]

    def refusal(self, method: str, /, **params: Any) -> tuple[int, str]:
        """Number and constant of the error that a request gets; all errors have the same shape."""
        return told(self.answer(self.send(method, **params)))

    def notes(self, track: str, kind: str = "") -> list[dict[str, Any]]:
        """The notifications about a track so far, in order."""
        with self._more:
            return [
                m
                for m in self.said
                if isinstance(m, dict)
                and m.get("method", "").startswith(f"generation_{kind}")
                and m["params"]["track_id"] == track
            ]

    def downloads(self, kind: str, count: int) -> list[dict[str, Any]]:
        """What was told of downloads, once there are `count` messages of that kind."""
        method = f"download_{kind}"

        def told(_: Any = None) -> list[dict[str, Any]]:
            return [m["params"] for m in self.said if m.get("method") == method]

        self.find(lambda _: len(told()) >= count)
        return told()

    def ending(self, track: str, nth: int = 0) -> dict[str, Any]:
        """How the track's job ended: the notification's short name with its fields."""
        endings = ("generation_complete", "generation_error", "generation_cancelled")
        seen = []

        def wanted(message: dict[str, Any]) -> bool:
            if message.get("method") in endings and message["params"]["track_id"] == track:
                seen.append(message)
            return len(seen) > nth

        found = self.find(wanted)
        return {"how": found["method"].removeprefix("generation_"), **found["params"]}

    def end(self, within_s: float = 20) -> int:
        """Close the input; the exit code."""
        self.process.stdin.close()
        return self.process.wait(within_s)


def told(answer: dict[str, Any]) -> tuple[int, str]:
    """Number and constant of an error; all of them have the same shape."""
    error = answer["error"]
    assert set(error) == {"code", "message", "data"}
    assert set(error["data"]) == {"error_code", "details"}
    assert error["data"]["details"].endswith(".")
    return error["code"], error["data"]["error_code"]
