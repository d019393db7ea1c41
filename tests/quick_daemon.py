"""The daemon on a fake studio: real transport, queue and cache, tones instead of music.

Words in the prompt choose the behaviour: "slow" takes long, "fail" fails, "noisy" prints to standard
output in every way, "native" blocks in native code that Python cannot interrupt, "crash" raises.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from types import SimpleNamespace

from fake_studio import FakeStudio

import backend
from core.params import Request
from core.results import Event
from lofi import server
from runtime.memory_plan import MemoryPlan


class Studio(FakeStudio):
    """A fake studio with misbehaviour chosen by the prompt; no model is loaded."""

    runner = SimpleNamespace(models=SimpleNamespace(holds=lambda _: False))
    setup = SimpleNamespace(plan=MemoryPlan())

    def run(self, request: Request, visitor: str) -> Iterator[Event]:
        if "noisy" in request.prompt:
            print("printed by a library")
            os.system("echo printed by a child")
            os.write(1, b"written to the number of standard output\n")
        if "native" in request.prompt:
            ctypes.CDLL(None).sleep(60)
        if "crash" in request.prompt:
            raise RuntimeError("a secret of ours")
        yield from super().run(request, visitor)


if __name__ == "__main__":
    backend.Studio = lambda *_, **__: Studio()
    server.main()
