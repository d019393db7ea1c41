"""Serve the studio's page, or run one command of the command line."""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # Imports take seconds. Ctrl-C must end them without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from core import startup
from core.errors import StudioError

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`, or serve the page if there is none; returns the exit code."""
    logging.basicConfig(format="%(message)s")
    if argv is None:
        argv = sys.argv[1:]
        signal.signal(signal.SIGINT, lambda *_: os._exit(startup.INTERRUPTED))
    try:
        startup.check(argv)
        return _run(argv)
    except StudioError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return startup.USAGE
    except OSError as error:
        from core import files

        log.debug("A file could not be written.", exc_info=True)
        trouble = files.write_error(Path(str(error.filename or ".")), error, 1 << 20)
        print(f"{trouble.code}: {trouble}", file=sys.stderr)
        return startup.FAILED


def _run(argv: Sequence[str]) -> int:
    """Import what `argv` ask for, and run it; returns the exit code."""
    if list(argv) in (["daemon"], ["--daemon"]):
        from lofi import server

        server.main()
    import cli  # before the page: it imports `spaces`, which must come before CUDA is touched

    args = cli.parse(argv)
    if args.daemon or args.command == "daemon":
        from lofi import server

        server.main(
            device=args.device,
            ace_step_model_path=args.model,
            precision=args.precision,
            offload=args.offload,
        )
    return cli.run(args) if args.command else serve(args)


def serve(args: argparse.Namespace) -> int:
    """Serve the page until a signal ends the process.

    Raises:
        StudioError: nothing can be served at this address, or with this model and device.
    """
    import cli
    from core import files

    port = startup.check_address(args.host, args.port)
    studio = cli.open_studio(args)
    os.environ.setdefault("GRADIO_TEMP_DIR", str(files.private_folder() / "page"))
    serving = False

    def end(number: int, _: Any) -> NoReturn:
        nonlocal serving
        code = startup.INTERRUPTED if number == signal.SIGINT else 0
        if serving and not studio.is_loading():
            serving = False  # a second signal may come while the interpreter is being taken down
            sys.exit(code)
        cli.exit_now(code)

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
    print(f"ACE Music Studio: {demo.local_url}  {model.title} on {model.device}")
    print(model.memory, flush=True)
    serving = True
    if not args.lazy:
        studio.load_in_background()
    demo.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
