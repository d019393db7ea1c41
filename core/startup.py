"""What can be wrong in how the studio was started, told before anything slow is imported.

The libraries behind the command line take a second of processor time to import, on a busy machine
several. This module needs none of them.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

from core.errors import StudioError

FAILED, USAGE, INTERRUPTED = 1, 2, 130
"""Exit codes beside 0."""

MAX_THREADS = 256
"""The largest number of CPU threads that can be set."""

LOOKUP_TIMEOUT_S = 0.7
"""How long the name given to --host may take to be found."""


def check(argv: Sequence[str]) -> None:
    """Check the number of threads, and the address if `argv` ask for the page.

    Other arguments are the command line's to judge.

    Raises:
        StudioError: `value-out-of-range`.
    """
    threads_set()
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_page_flags(scan)
    for name in ("--model", "--device", "--planner", "--precision", "--offload"):
        scan.add_argument(name)
    scan.add_argument("command", nargs="?")
    try:
        args, others = scan.parse_known_args(argv)
    except argparse.ArgumentError:
        return
    if not args.command and not others:
        check_address(args.host, args.port)


def add_page_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the page: where it is served, and when its model is loaded."""
    parser.add_argument("--host", help="address to serve on (default: this computer only)")
    parser.add_argument("--port", help="port to serve on (default: the first free from 7860)")
    parser.add_argument(
        "--root-path", help="path prefix behind a proxy, such as /music (or GRADIO_ROOT_PATH)"
    )
    parser.add_argument(
        "--lazy", action="store_true", help="load the model at the first song, not after the start"
    )


def threads_set() -> int | None:
    """The number of CPU threads in `ACE_THREADS`; None where it is not set.

    Raises:
        StudioError: `value-out-of-range`.
    """
    text = os.environ.get("ACE_THREADS", "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS):
        raise StudioError(
            "value-out-of-range",
            label="ACE_THREADS",
            problem=f"must be a whole number from 1 to {MAX_THREADS}, not {text[:20]!r}",
            fix="Set it to such a number, or leave it out for one thread per core",
        )
    return int(text)


def check_address(host: str | None, port: str | None) -> int | None:
    """The port as a number, once it is known that the page can be served there.

    Raises:
        StudioError: `value-out-of-range` for a port that is none or taken, and for a host that is
            not an address of this computer.
    """
    if port is not None and not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise StudioError(
            "value-out-of-range",
            label="--port",
            problem=f"must be a number from 1 to 65535, not {port[:20]}",
            fix="Leave it out to use the first free port from 7860",
        )
    number = int(port) if port else None
    if host is None and number is None:
        return None
    addresses = _look_up((host or "127.0.0.1").strip("[]"), number or 0)
    problem = "is not an address of this computer" if addresses else "is not a known address"
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as trial:
            if os.name == "posix":
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(address)
                return number
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    taken = error.errno == errno.EADDRINUSE
                    raise StudioError(
                        "value-out-of-range",
                        label="--port",
                        problem=f"{number} is in use" if taken else f"{number} needs more rights",
                        fix="Choose another port, or leave it out to use the first free one",
                    ) from error
    raise StudioError(
        "value-out-of-range",
        label="--host",
        problem=f"{str(host)[:80]!r} {problem}",
        fix="Use 127.0.0.1 for this computer only, or 0.0.0.0 to serve the whole network",
    )


def _look_up(host: str, port: int) -> list[Any]:
    """The addresses of `host`; none if they are not found in time."""
    found: list[Any] = []

    def look() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            return

    # A name server that does not answer would hold up the start for many seconds.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(LOOKUP_TIMEOUT_S)
    return found
