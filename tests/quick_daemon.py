"""The daemon on a studio at the far wall: real wire, queue and tracks, a tone in place of music.

In the style, "slow" takes its time, "fail" fails, "noisy" prints wherever it can, "native" stays in
code that no Python can interrupt, and "crash" is a bug of ours.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

from fake_studio import FakeStudio

import backend
from core.params import Request
from core.results import Event
from lofi import server


class Studio(FakeStudio):
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
    backend.Studio = lambda *_: Studio()
    server.main()
