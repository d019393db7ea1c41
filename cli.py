"""The command line: one command for each request, and `replay`, `fetch`, `doctor` and `daemon`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import backend  # first: it imports `spaces`
import tooltips
from audio import lyric_files, settings
from cli_output import Ending, ProgressLine, deliver, exit_now
from core import files, startup
from core.errors import StudioError
from core.params import AdapterRef, Param, Request
from core.requests import AUDIO_FIELDS, EDITION, EXPORTS, MODES, SONGS, Lyrics, Master
from core.results import Cancelled, ExportedFiles, Progress, Take
from models import catalog, hub
from runtime import device, memory_plan
from runtime.replay import compare, differences, match_adapters, sound_file

COMMANDS: dict[str, type[Request]] = {**SONGS, Lyrics.mode: Lyrics, **EXPORTS}

SUFFIXES = (".wav", ".flac", ".mp3")
"""Of songs."""

TEXT_SUFFIXES = ("", ".txt", ".md")
"""Of lyrics: what `--out` may end in."""

BYTES_PER_SECOND = {".wav": 288_000, ".flac": 200_000, ".mp3": 40_000}
"""Size of a song: 48 kHz, stereo, 24 bits, or at most so much when compressed."""

SWITCH_VALUES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
"""Values accepted after a switch: `--thinking off` is `--no-thinking`."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of `python app.py`; ends the process with a usage message if they are wrong."""
    device.reach_loopback()
    return parser().parse_args(_plain_switches(sys.argv[1:] if argv is None else argv))


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python app.py",
        description="ACE Music Studio. Without a command: open the studio's page.",
        allow_abbrev=False,
    )
    common = argparse.ArgumentParser(add_help=False)
    for target in (parser, common):
        default: dict[str, Any] = {} if target is parser else {"default": argparse.SUPPRESS}
        target.add_argument(
            "--model",
            help=f"{', '.join(catalog.MODELS)}, a folder, or a hub id (or ACE_MODEL)",
            **default,
        )
        target.add_argument("--device", choices=device.KINDS, **default)
        target.add_argument(
            "--precision",
            choices=("auto", *memory_plan.PRECISIONS),
            help="number type of the transformer's weights (or ACE_PRECISION)",
            **default,
        )
        target.add_argument(
            "--offload",
            choices=("auto", *memory_plan.OFFLOADS),
            help="what waits in main memory until it runs (or ACE_OFFLOAD)",
            **default,
        )
        target.add_argument(
            "--planner", help="0.6B, 1.7B, 4B, a folder, or none (or ACE_PLANNER)", **default
        )
    startup.add_page_flags(parser)
    parser.add_argument("--daemon", action="store_true", help="same as the command daemon")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for mode, request in COMMANDS.items():
        command = commands.add_parser(
            mode, help=request.__doc__, parents=[common], allow_abbrev=False
        )
        for param in request.params():
            _add_param(command, mode, param)
        if mode == "generate":
            command.add_argument(
                "--backend",
                choices=("ace_step", "ace-step", "musicgen"),
                help="the model; musicgen runs the command musicgen and ignores other flags",
            )
        _add_output(command, lyric_times=mode in MODES or mode in ("export", "master"))
    replay = commands.add_parser(
        "replay", help="make a song again from its file", parents=[common], allow_abbrev=False
    )
    replay.add_argument("file", type=Path, help="a WAV, FLAC, MP3 or JSON written by the studio")
    for name in AUDIO_FIELDS:
        replay.add_argument(f"--{name}", type=Path, help=f"the {name} file, if the song used one")
    _add_adapters(replay, "an adapter that the song used; as strong as then without STRENGTH.")
    replay.add_argument(
        "--without-adapters", action="store_true", help="leave out the adapters the song used"
    )
    _add_output(replay, lyric_times=True)
    fetch = commands.add_parser(
        "fetch", help="download a model", parents=[common], allow_abbrev=False
    )
    known = f"{', '.join(catalog.BY_NAME)}, or a hub id (default: the model in use)"
    fetch.add_argument("name", nargs="?", help=known)
    doctor = commands.add_parser(
        "doctor",
        help="report device, memory, models, and what would be faster",
        parents=[common],
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    commands.add_parser(
        "daemon", help="serve an editor: JSON-RPC on standard input and output", parents=[common]
    )
    return parser


def _add_output(command: argparse.ArgumentParser, lyric_times: bool) -> None:
    command.add_argument(
        "--out",
        type=Path,
        help="output file: .wav, .flac or .mp3 for a song (default: song-SEED.wav)",
    )
    command.add_argument(
        "--without-settings", action="store_true", help="do not embed the settings in the file"
    )
    command.add_argument(
        "--json", action="store_true", help="print the result as JSON on standard output"
    )
    if lyric_times:
        for kind in lyric_files.FORMATS:
            help_ = f"also write when each line is sung, as .{kind} beside the song"
            command.add_argument(f"--{kind}", action="store_true", help=help_)


def _add_param(command: argparse.ArgumentParser, mode: str, param: Param) -> None:
    """A request's field as a flag. Values stay text: the request checks them."""
    if param.type is AdapterRef:
        _add_adapters(command, tooltips.help_text(mode, param))
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


def _add_adapters(command: argparse.ArgumentParser, description: str) -> None:
    command.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        help=f"{description} May be repeated.",
        metavar="FILE[:STRENGTH]",
    )


def _plain_switches(argv: Sequence[str]) -> list[str]:
    """`argv` with `--thinking off` as `--no-thinking`, and without `--thinking auto`."""
    mode = next((word for word in argv if word in COMMANDS), None)
    params = COMMANDS[mode].params() if mode else ()
    optional = {"--" + p.name.replace("_", "-"): p.optional for p in params if p.type is bool}
    words, plain = list(argv), []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        following = value if equals else (words[0] if words else "")
        state = SWITCH_VALUES.get(following.lower())
        if name in optional and (state is not None or (following == "auto" and optional[name])):
            if not equals:
                words.pop(0)
            plain += [] if state is None else [name if state else f"--no-{name[2:]}"]
        else:
            plain.append(word)
    return plain


def run(args: argparse.Namespace) -> int:
    """Run the command that `args` name; returns the exit code.

    Raises:
        StudioError: the request cannot be run. Nothing was started.
    """
    if args.command == "fetch":
        return _fetch(args.name or args.planner or _model_and_device(args)[0].name)
    if args.command == "doctor":
        return _doctor(args)
    if args.command == "replay":
        return _replay(args)
    musicgen = args.command == "generate" and args.backend == "musicgen"
    mode = COMMANDS["musicgen" if musicgen else args.command]
    names = {param.name for param in mode.params()}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    kind = _check_suffix(mode.mode, args.out, given.get("format"))
    if "format" in names and kind:
        given["format"] = kind
    request = mode.of(given)
    _check_place(args.out, request)
    studio = open_studio(args)
    if request.mode in SONGS:
        plan = studio.setup.plan
        if not (plan.plain and plan.fits):
            print(f"{plan.title}: {plan.reason}", file=sys.stderr)
    return deliver(_run_request(studio, request), args)


def open_studio(args: argparse.Namespace) -> backend.Studio:
    """The studio with the model and device that `args` or the environment name."""
    model, place = _model_and_device(args)
    return backend.Studio(
        model,
        place,
        args.planner or os.environ.get("ACE_PLANNER", ""),
        os.environ.get("ACE_MUSICGEN", ""),
        precision=args.precision or "",
        offload=args.offload or "",
    )


def _doctor(args: argparse.Namespace) -> int:
    """Print what decides which model runs here, and how fast."""
    from runtime import doctor

    found = doctor.report(open_studio(args).setup)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(doctor.lines(found)))
    return 0


def _model_and_device(args: argparse.Namespace) -> tuple[catalog.Model, device.Device]:
    place = device.find_device(args.device)
    name = args.model or os.environ.get("ACE_MODEL") or catalog.default_name(place.kind)
    return catalog.choose(name), place


def _check_suffix(mode: str, out: Path | None, requested: str | None = None) -> str:
    """The format that `--out` names, or "" without it.

    Raises:
        StudioError: the command cannot write such a file, or `--format` asks for another.
    """
    if out is None:
        return ""
    suffix = out.suffix.lower()
    if mode == "stems":
        if suffix in (*SUFFIXES, ".zip") or out.is_file():
            raise _bad_out("must be a folder", "Name a folder, such as stems")
        return ""
    if mode == Lyrics.mode and suffix not in TEXT_SUFFIXES:
        raise _bad_out("must end in .txt or .md", "Name the file lyrics.txt")
    if mode == Lyrics.mode:
        return ""
    if suffix not in SUFFIXES:
        fix = "Name the file song.wav, song.flac or song.mp3"
        raise _bad_out("must end in .wav, .flac or .mp3", fix)
    kind = suffix.removeprefix(".")
    if requested and requested.strip().lower() != kind:
        problem = f"ends in {suffix}, and --format asks for {requested}"
        raise _bad_out(problem, "Leave out --format, or change one of the two")
    return kind


def _bad_out(problem: str, fix: str) -> StudioError:
    return StudioError("value-out-of-range", label="--out", problem=problem, fix=fix)


def _check_place(out: Path | None, request: Request) -> None:
    """Check that the result can be written, before it is made.

    Raises:
        StudioError: `not-writable`, `disk-full`.
    """
    if request.mode == Lyrics.mode and out is None:
        return
    place = out or Path("song-0000000000.wav")
    if request.mode == "stems":
        place = (out if out and out.is_dir() else (out or Path("stems")).parent) / "drums.wav"
    rate = BYTES_PER_SECOND.get(place.suffix.lower(), 0)
    files.check_writable(place, int(rate * getattr(request, "duration_s", 0)))


def _replay(args: argparse.Namespace) -> int:
    """Make the song of a file again, and report how it compares with the audio in the file."""
    kind = _check_suffix("replay", args.out) or "wav"
    saved = settings.read_settings(args.file)
    if saved is None:
        raise StudioError("settings-missing", name=args.file.name)
    given = {k: getattr(args, k) for k in AUDIO_FIELDS if getattr(args, k)}
    if args.without_adapters:
        given["adapters"] = ()
    elif args.adapters:
        given["adapters"] = match_adapters(saved, [AdapterRef.of(text) for text in args.adapters])
    request = settings.request_of(saved, **given)
    _check_place(args.out, request)
    studio = open_studio(args)
    ending = _run_request(studio, request, saved["edition"])
    remarks = differences(saved, ending) if isinstance(ending, Take) else []
    for left, master in reversed([*enumerate(reversed(saved["mastered"]))]):
        if isinstance(ending, Take | ExportedFiles):
            output = {
                "format": "wav" if left else kind,
                "settings": bool(left) or not args.without_settings,
            }
            ending = _run_request(
                studio, Master.of({**master, **output, "source": sound_file(ending)})
            )
    if isinstance(ending, Take | ExportedFiles):
        for line in (*remarks, compare(args.file, ending)):
            print(line, file=sys.stderr)
    return deliver(ending, args)


def _run_request(studio: backend.Studio, request: Request, edition: int = EDITION) -> Ending:
    """Run `request` by the rules of `edition`, with its progress on standard error.

    Ctrl-C cancels it; pressed again, it ends the process.
    """
    pressed = 0

    def stop(*_: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            exit_now(startup.INTERRUPTED)
        studio.stop("terminal")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    line = ProgressLine(sys.stderr)
    ending: Ending = Cancelled(stage="Waiting", elapsed_s=0)
    for event in studio.run(request, "terminal", edition):
        if pressed:
            studio.stop("terminal")  # the first call may have come before the job existed
        if isinstance(event, Progress):
            line.show(tooltips.progress_line(event), event.stage)
        else:
            ending = event
    line.end()
    return ending


def _fetch(name: str) -> int:
    """Download the weights called `name`. Ctrl-C stops it, and the same command resumes."""
    try:
        weights = catalog.BY_NAME.get(name) or catalog.choose(name)
    except StudioError as error:
        raise StudioError(
            "model-unknown", name=name[:80], known=", ".join(catalog.BY_NAME)
        ) from error
    message = f"\nStopped. Resume with: {weights.command}\n"
    signal.signal(signal.SIGINT, lambda *_: exit_now(startup.INTERRUPTED, message))
    line = ProgressLine(sys.stderr)
    for step in hub.fetch(weights):
        line.show(str(step), step.component)
    line.end(f"{weights.title} is installed.")
    return 0
