"""The command line: one command for each request, and `fetch` and `replay`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import backend  # first: it brings `spaces`
import tooltips
from audio import encode, settings
from audio.tags import Tags
from core import files
from core.errors import StudioError
from core.params import AdapterRef, Param, Request
from core.requests import AUDIO_FIELDS, EDITION, EXPORTS, SONGS, Lyrics, Master
from core.results import Cancelled, Draft, ExportedFiles, Failed, Progress, Take
from models import catalog, hub
from models.weights import Weights
from runtime import device
from runtime.replay import compare, differences, match_adapters, sound_file

COMMANDS: dict[str, type[Request]] = {**SONGS, Lyrics.mode: Lyrics, **EXPORTS}


USAGE, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes beside 0."""


SUFFIXES = (".wav", ".flac", ".mp3")


FETCHED: dict[str, Weights] = {
    weights.name: weights
    for weights in (
        *catalog.PLANNERS,
        *catalog.SONGWRITERS.values(),
        catalog.HTDEMUCS,
        catalog.MUSICGEN,
        *catalog.MODELS.values(),
        catalog.SHARED_PARTS,
    )
}
"""All that `fetch` knows by name."""


Ending = Take | Draft | ExportedFiles | Cancelled | Failed


def parser() -> argparse.ArgumentParser:
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
            help=f"{', '.join(catalog.MODELS)}, a folder, or a hub id (or ACE_MODEL)",
            **keep,
        )
        on.add_argument("--device", choices=("cpu", "cuda", "mps"), **keep)
        on.add_argument(
            "--planner", help="0.6B, 1.7B, 4B, a folder, or none (or ACE_PLANNER)", **keep
        )
    parser.add_argument("--host", help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=int, help="port to serve on (default: first free from 7860)")
    parser.add_argument("--daemon", action="store_true", help="the same as the command daemon")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for mode, request in COMMANDS.items():
        command = commands.add_parser(
            mode, help=request.__doc__, parents=[common], allow_abbrev=False
        )
        for param in request.params():
            _flag(command, mode, param)
        if mode == "generate":
            command.add_argument(
                "--backend",
                choices=("ace_step", "ace-step", "musicgen"),
                help="who plays; musicgen is the command of that name, and leaves out other flags",
            )
        _out(command)
    again = commands.add_parser(
        "replay", help="make the song of a file anew", parents=[common], allow_abbrev=False
    )
    again.add_argument("file", type=Path, help="a WAV, FLAC, MP3 or JSON that the studio wrote")
    for name in AUDIO_FIELDS:
        again.add_argument(f"--{name}", type=Path, help="the file that went in, if one did")
    _adapters(again, "an adapter that played; as strongly as then unless STRENGTH is given")
    again.add_argument(
        "--without-adapters", action="store_true", help="leave out what adapters played"
    )
    _out(again)
    fetch = commands.add_parser(
        "fetch", help="bring a model to this computer", parents=[common], allow_abbrev=False
    )
    fetch.add_argument(
        "name", nargs="?", help=f"{', '.join(FETCHED)}, or a hub id (default: the model to play)"
    )
    commands.add_parser(
        "daemon", help="answer an editor: JSON-RPC on standard input and output", parents=[common]
    )
    return parser


def _out(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, help="where to: .wav, .flac or .mp3 for a song (default: song-SEED.wav)"
    )
    command.add_argument(
        "--without-settings", action="store_true", help="keep the settings out of the file"
    )
    command.add_argument(
        "--json", action="store_true", help="print what came of it as JSON on standard output"
    )


def _flag(command: argparse.ArgumentParser, mode: str, param: Param) -> None:
    """One knob as a flag. Values stay text: the request checks them and says what is wrong."""
    if param.type is AdapterRef:
        _adapters(command, tooltips.help_text(mode, param))
        return
    name = "--" + param.name.replace("_", "-")
    help_ = tooltips.help_text(mode, param).replace("%", "%%")
    if param.type is bool:
        command.add_argument(
            name, dest=param.name, action=argparse.BooleanOptionalAction, help=help_
        )
    else:
        command.add_argument(
            name, dest=param.name, help=help_, metavar=param.unit.upper() or "VALUE"
        )


def _adapters(command: argparse.ArgumentParser, told: str) -> None:
    command.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        help=f"{told} May be given again for each further one.",
        metavar="FILE[:STRENGTH]",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command that `args` name; returns the exit code.

    Raises:
        StudioError: what was asked for cannot be done; nothing was started.
    """
    if args.command == "fetch":
        return _fetch(args.name or args.planner or _chosen(args)[0].name)
    studio = open_studio(args)
    if args.command == "replay":
        return _replay(studio, args)
    musicgen = args.command == "generate" and args.backend == "musicgen"
    return _make(studio, COMMANDS["musicgen" if musicgen else args.command], args)


def open_studio(args: argparse.Namespace) -> backend.Studio:
    """The studio on the model and device that `args` or the environment name."""
    model, place = _chosen(args)
    return backend.Studio(
        model,
        place,
        args.planner or os.environ.get("ACE_PLANNER", ""),
        os.environ.get("ACE_MUSICGEN", ""),
    )


def _chosen(args: argparse.Namespace) -> tuple[catalog.Model, device.Device]:
    place = device.find_device(args.device)
    name = args.model or os.environ.get("ACE_MODEL") or catalog.default_name(place.kind)
    return catalog.choose(name), place


def _make(studio: backend.Studio, mode: type[Request], args: argparse.Namespace) -> int:
    """Do one thing without a page."""
    names = {param.name for param in mode.params()}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if "format" in names and (kind := _kind(args.out)):
        given.setdefault("format", kind)
    return _done(_to_the_end(studio, mode.of(given), args), args)


def _replay(studio: backend.Studio, args: argparse.Namespace) -> int:
    """Make the song of a file anew, and say how it compares with the sound in the file."""
    told = settings.read_settings(args.file)
    if told is None:
        raise StudioError("settings-missing", name=args.file.name)
    given = {k: getattr(args, k) for k in AUDIO_FIELDS if getattr(args, k)}
    if args.without_adapters:
        given["adapters"] = ()
    elif args.adapters:
        given["adapters"] = match_adapters(told, [AdapterRef.of(text) for text in args.adapters])
    request = settings.request_of(told, **given)
    ending = _to_the_end(studio, request, args, told["edition"])
    said = differences(told, ending) if isinstance(ending, Take) else []
    for left, done in zip(range(len(told["mastered"]) - 1, -1, -1), told["mastered"], strict=True):
        if isinstance(ending, Take | ExportedFiles):
            kept = {"format": "wav" if left else _kind(args.out) or "wav"}
            kept["settings"] = bool(left) or not args.without_settings
            request = Master.of({**done, **kept, "source": sound_file(ending)})
            ending = _to_the_end(studio, request, args)
    if isinstance(ending, Take | ExportedFiles):
        for line in (*said, compare(args.file, ending)):
            print(line, file=sys.stderr)
    return _done(ending, args)


def _to_the_end(
    studio: backend.Studio, request: Request, args: argparse.Namespace, edition: int = EDITION
) -> Ending:
    """Run `request` with its progress on standard error; Ctrl-C stops it."""
    song = request.mode in SONGS
    if song and args.out and args.out.suffix.lower() not in SUFFIXES:
        raise StudioError(
            "value-out-of-range",
            label="--out",
            problem="ends in .wav, .flac or .mp3",
            fix="Name the file song.wav, song.flac or song.mp3",
        )
    if args.out and not args.out.resolve().parent.is_dir():
        files.check_writable(args.out)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: studio.stop("terminal"))
    show = _Line(sys.stderr)
    for event in studio.run(request, "terminal", edition):
        if isinstance(event, Progress):
            show(event)
    show.end()
    return event


def _done(ending: Ending, args: argparse.Namespace) -> int:
    """Hand over what came of it; returns the exit code."""
    if isinstance(ending, Cancelled):
        print("Cancelled.", file=sys.stderr)
        return INTERRUPTED
    if isinstance(ending, Failed):
        print(f"{ending.code}: {ending.message} {ending.action}", file=sys.stderr)
        return FAILED
    told = ending.model_dump(mode="json")
    if isinstance(ending, Take):
        seed = ending.request["seed"]
        out = args.out or Path(f"song-{seed}.wav")
        _hand_over(ending, out, not args.without_settings)
        told = {**ending.for_sharing().model_dump(mode="json"), "path": str(out)}
        print(f"{out}: {ending.duration_s:g} s, seed {seed}", file=sys.stderr)
    elif isinstance(ending, ExportedFiles):
        outs = _places(ending, args.out)
        for path, out in zip(ending.paths, outs, strict=True):
            files.atomic_write(out, Path(path))
            print(out, file=sys.stderr)
        told["paths"] = [str(out) for out in outs]
    elif isinstance(ending, Draft) and args.out:
        files.atomic_write(args.out, ending.text + "\n")
    elif isinstance(ending, Draft) and not args.json:
        print(ending.text)
    for note in ending.notes:
        print(note, file=sys.stderr)
    if args.json:
        print(json.dumps(told))
    return 0


def _hand_over(take: Take, out: Path, with_settings: bool) -> None:
    """Put a take's song at `out`, in the format of its name."""
    kind = out.suffix.lower().lstrip(".")
    if kind == "wav" and with_settings:
        files.atomic_write(out, Path(take.path))
        return
    told = settings.settings_of(take) if with_settings else None
    title = take.request["prompt"] or out.stem
    tags = Tags(title, take.model.name, take.model.licence)
    for _ in encode.convert(Path(take.path), out, kind, told, tags):
        pass


def _kind(out: Path | None) -> str:
    """The format that a file's name asks for, if it does."""
    suffix = out.suffix.lower() if out else ""
    return suffix.removeprefix(".") if suffix in SUFFIXES else ""


def _places(made: ExportedFiles, out: Path | None) -> list[Path]:
    """Where files made of a take go: one at `out`, several into the folder `out`."""
    names = [Path(path).name for path in made.paths]
    if len(names) == 1:
        return [out or Path(names[0])]
    folder = out or Path()
    folder.mkdir(exist_ok=True)
    return [folder / name for name in names]


def _fetch(name: str) -> int:
    """Bring what is called `name` to disk, telling each file and the whole; Ctrl-C stops it."""
    try:
        wanted = FETCHED.get(name) or catalog.choose(name)
    except StudioError as error:
        raise StudioError("model-unknown", name=name[:80], known=", ".join(FETCHED)) from error
    show = _Line(sys.stderr)
    try:
        for step in hub.fetch(wanted):
            show.line(str(step), step.component)
    except KeyboardInterrupt:
        show.end(f"Stopped. This goes on from here: {wanted.command}")
        return INTERRUPTED
    show.end(f"{wanted.title} is here.")
    return 0


class _Line:
    """Progress on a terminal: one line rewritten in place, or one line a stage in a log."""

    def __init__(self, stream) -> None:
        self._stream, self._live, self._stage, self._next = stream, stream.isatty(), "", 0.0

    def __call__(self, event: Progress) -> None:
        self.line(tooltips.progress_line(event), event.stage)

    def line(self, text: str, stage: str) -> None:
        """Show `text`; on a terminal ten times a second at most while the stage is the same."""
        now, same = time.monotonic(), stage == self._stage
        if self._live and not (same and now < self._next):
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{text[:width]:<{width}}")
            self._next = now + 0.1
        elif not self._live and not same:
            self._stream.write(text + "\n")
        self._stage = stage
        self._stream.flush()

    def end(self, text: str = "") -> None:
        if self._live and self._stage:
            self._stream.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        self._stream.write(text + "\n" if text else "")
        self._stream.flush()
