"""Serve the studio's page, or run one command of the command line."""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # The imports below take seconds. Ctrl-C must end them without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if sys.argv[1:] in (["daemon"], ["--daemon"]):
        from lofi import server

        server.main()  # does not return, and needs nothing of what is imported below

import argparse
import errno
import logging
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import cli  # first: it imports `spaces`, which ZeroGPU wants before anything touches CUDA
import cli_output
from core import files
from core.errors import StudioError

log = logging.getLogger(__name__)

LOOKUP_TIMEOUT_S = 1.0
"""How long the name given to --host may take to be found."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`, or serve the page if there is none; returns the exit code."""
    logging.basicConfig(format="%(message)s")
    args = cli.parse(argv)
    try:
        if args.daemon or args.command == "daemon":
            from lofi import server

            server.main(device=args.device, ace_step_model_path=args.model)
        return cli.run(args) if args.command else serve(args)
    except StudioError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return cli_output.USAGE
    except OSError as error:
        log.debug("A file could not be written.", exc_info=True)
        trouble = files.write_error(Path(str(error.filename or ".")), error, 1 << 20)
        print(f"{trouble.code}: {trouble}", file=sys.stderr)
        return cli_output.FAILED


def serve(args: argparse.Namespace) -> int:
    """Serve the page until a signal ends the process.

    Raises:
        StudioError: nothing can be served at this address, or with this model and device.
    """
    port = check_address(args.host, args.port)
    studio = cli.open_studio(args)
    os.environ.setdefault("GRADIO_TEMP_DIR", str(files.private_folder() / "page"))
    serving = False

    def end(number: int, _: Any) -> NoReturn:
        code = cli_output.INTERRUPTED if number == signal.SIGINT else 0
        if serving:
            sys.exit(code)
        cli_output.exit_now(code)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    from web import page

    studio.warm()
    demo = page.build(studio)
    demo.queue(default_concurrency_limit=None, max_size=64)
    try:
        demo.launch(
            server_name=args.host,
            server_port=port,
            root_path=args.root_path,
            prevent_thread_lock=True,
            quiet=True,
            **page.launch_options(),
        )
    except OSError as error:
        fix = "Close other programs, or choose a port with --port"
        problem = "cannot be served: no port from 7860 to 7959 is free"
        raise StudioError(
            "value-out-of-range", label="The page", problem=problem, fix=fix
        ) from error
    model = studio.model_info()
    print(f"ACE Music Studio: {demo.local_url}  {model.title} on {model.device}", flush=True)
    serving = True
    demo.block_thread()
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
