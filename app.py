"""Serve the studio's page, or hand the arguments to the command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__" and sys.argv[1:] in (["daemon"], ["--daemon"]):
    from lofi import server

    server.main()  # does not return; an editor waits, and the imports below take time

import backend  # first: it brings `spaces`, which ZeroGPU wants before anything touches CUDA
import cli
from core import files
from core.errors import StudioError
from runtime import device


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, or serve the page where there is none; returns the exit code."""
    device.reach_loopback()
    args = cli.parser().parse_args(argv)
    try:
        if args.daemon or args.command == "daemon":
            from lofi import server

            server.main(device=args.device, ace_step_model_path=args.model)
        if args.command is None:
            return _serve(cli.open_studio(args), args)
        return cli.run(args)
    except StudioError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return cli.USAGE


def _serve(studio: backend.Studio, args: argparse.Namespace) -> int:
    """Open the page and stay until told to stop."""
    os.environ.setdefault("GRADIO_TEMP_DIR", str(files.private_folder() / "page"))
    from web import page

    if device.ON_ZERO:
        studio.warm()
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, cli.INTERRUPTED)):
        signal.signal(number, lambda *_, code=code: sys.exit(code))
    demo = page.build(studio)
    demo.queue(default_concurrency_limit=None, max_size=64)
    demo.launch(
        server_name=args.host,
        server_port=args.port,
        prevent_thread_lock=True,
        quiet=True,
        **page.launch_options(),
    )
    card = studio.card()
    print(f"ACE Music Studio: {demo.local_url}  {card.title} on {card.device}", flush=True)
    demo.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
