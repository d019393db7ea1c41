"""The front door: the studio's page, or one song from the command line."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import audio
import backend
import checkpoints
import host  # first: it brings `spaces`, which ZeroGPU wants before anything touches CUDA
import tooltips
from errors import StudioError
from knobs import Knob, Request
from song import MODES, Cancelled, Failed, Progress, Take

USAGE, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes beside 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    host.reach_loopback()
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        model, place = _chosen(args)
        if args.command == "fetch":
            return _fetch(model)
        studio = backend.Studio(model, place)
        if args.command is None:
            return _serve(studio, args)
        return _make(studio, MODES[args.command], args)
    except StudioError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python app.py",
        description="ACE Music Studio. Without a command: open the studio's page.",
        allow_abbrev=False,
    )
    common = argparse.ArgumentParser(add_help=False)
    for on in (parser, common):
        keep = {} if on is parser else {"default": argparse.SUPPRESS}
        on.add_argument(
            "--model",
            help=f"{', '.join(checkpoints.MODELS)}, a folder, or a hub id (or ACE_MODEL)",
            **keep,
        )
        on.add_argument("--device", choices=("cpu", "cuda", "mps"), **keep)
    parser.add_argument("--host", help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=int, help="port to serve on (default: first free from 7860)")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for mode, request in MODES.items():
        command = commands.add_parser(
            mode, help=request.__doc__, parents=[common], allow_abbrev=False
        )
        for knob in request.knobs():
            _flag(command, mode, knob)
        command.add_argument("--out", type=Path, help=".wav or .flac (default: song-SEED.wav)")
        command.add_argument(
            "--json", action="store_true", help="print the take as JSON on standard output"
        )
    commands.add_parser("fetch", help="bring a model to this computer", parents=[common])
    return parser


def _flag(command: argparse.ArgumentParser, mode: str, knob: Knob) -> None:
    """One knob as a flag. Values stay text: the request checks them and says what is wrong."""
    name = "--" + knob.name.replace("_", "-")
    help_ = tooltips.tip(mode, knob).replace("%", "%%")
    if knob.type is bool:
        command.add_argument(
            name, dest=knob.name, action=argparse.BooleanOptionalAction, help=help_
        )
    else:
        command.add_argument(name, dest=knob.name, help=help_, metavar=knob.unit.upper() or "VALUE")


def _chosen(args: argparse.Namespace) -> tuple[checkpoints.Model, host.Place]:
    place = host.find_place(args.device)
    name = args.model or os.environ.get("ACE_MODEL") or checkpoints.default_name(place.device)
    return checkpoints.choose(name), place


def _serve(studio: backend.Studio, args: argparse.Namespace) -> int:
    """Open the page and stay until told to stop."""
    os.environ.setdefault("GRADIO_TEMP_DIR", str(host.private_folder() / "page"))
    import theme  # sets what Gradio reads at import
    import ui

    if host.ON_ZERO:
        studio.warm()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    demo = ui.build(studio)
    demo.queue(default_concurrency_limit=None, max_size=64)
    demo.launch(
        server_name=args.host,
        server_port=args.port,
        prevent_thread_lock=True,
        quiet=True,
        **theme.launch_options(),
    )
    card = studio.card()
    print(f"ACE Music Studio: {demo.local_url}  {card.title} on {card.device}", flush=True)
    demo.block_thread()
    return 0


def _make(studio: backend.Studio, mode: type[Request], args: argparse.Namespace) -> int:
    """Make one song without a page."""
    names = {knob.name for knob in mode.knobs()}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    request = mode.of(given)
    if args.out and args.out.suffix.lower() not in (".wav", ".flac"):
        raise StudioError(
            "value-out-of-range",
            label="--out",
            problem="ends in .wav or .flac",
            fix="Name the file song.wav or song.flac",
        )
    if args.out and not args.out.resolve().parent.is_dir():
        raise StudioError("not-writable", place=str(args.out.parent))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: studio.stop("terminal"))
    show = _Line(sys.stderr)
    for event in studio.run(request, "terminal"):
        if isinstance(event, Progress):
            show(event)
        elif isinstance(event, Take):
            out = args.out or Path(f"song-{event.request['seed']}.wav")
            audio.hand_over(Path(event.path), out)
            show.end(f"{out}: {event.duration_s:g} s, seed {event.request['seed']}")
            for note in event.notes:
                print(note, file=sys.stderr)
            if args.json:
                told = event.model_copy(update={"path": str(out)})
                print(json.dumps(told.model_dump(mode="json")))
            return 0
        elif isinstance(event, Cancelled):
            show.end("Cancelled.")
            return INTERRUPTED
        elif isinstance(event, Failed):
            show.end(f"{event.code}: {event.message} {event.action}")
            return FAILED
    return FAILED


def _fetch(model: checkpoints.Model) -> int:
    """Bring a model to disk, telling each file as it comes."""
    show = _Line(sys.stderr)
    for event in checkpoints.fetch(model):
        show(event)
    show.end(f"{model.title} is here.")
    return 0


class _Line:
    """Progress on a terminal: one line rewritten in place, or one line a stage in a log."""

    def __init__(self, stream) -> None:
        self._stream, self._live, self._stage = stream, stream.isatty(), ""

    def __call__(self, event: Progress) -> None:
        text = tooltips.progress_line(event)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{text[:width]:<{width}}")
        elif event.stage != self._stage:
            self._stream.write(text + "\n")
        self._stage = event.stage
        self._stream.flush()

    def end(self, text: str) -> None:
        if self._live and self._stage:
            self._stream.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        self._stream.write(text + "\n")
        self._stream.flush()


if __name__ == "__main__":
    sys.exit(main())
