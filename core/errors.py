"""Everything that can go wrong, in words a musician can act on.

One table: a code, one sentence, one action that works. Raise deep, `StudioError(code, **facts)`;
each face (page, command line, API) translates it once.
"""

from __future__ import annotations

from string import Formatter
from typing import Any, NamedTuple


class ErrorText(NamedTuple):
    """What a code says. Both texts are format strings over the facts given when it is raised."""

    sentence: str
    action: str


ERRORS: dict[str, ErrorText] = {
    "value-out-of-range": ErrorText("{label} {problem}.", "{fix}."),
    "unknown-field": ErrorText(
        "{name!r} is not a setting of {mode}.", "Remove it, or use one of: {known}."
    ),
    "prompt-empty": ErrorText(
        "The style is empty.", "Write a few words about the music, such as: warm lofi piano, slow."
    ),
    "lyrics-too-long": ErrorText(
        "The lyrics take {tokens} tokens and the model reads {limit}.",
        "Shorten them to about {words} words.",
    ),
    "song-too-long": ErrorText(
        "{model} makes songs of up to {limit:g} s, not {asked:g}.",
        "Set Length to {limit:g} s or less.",
    ),
    "model-unknown": ErrorText(
        "There is no model called {name!r} here.",
        "Choose one of {known}, or name a folder or hub repository in the diffusers layout.",
    ),
    "model-missing": ErrorText(
        "{model} ({size}) is not on this computer and the model hub cannot be reached.",
        "Go online and run: {command}",
    ),
    "model-gated": ErrorText(
        "The hub refuses access to {model}.",
        "Accept its terms on its page, log in with `hf auth login`, and run: {command}",
    ),
    "hub-unknown": ErrorText(
        "The model hub has no {repo} ({revision}) that can be used, or does not show it.",
        "Check the name; if it is private, log in with `hf auth login`, and run: {command}",
    ),
    "download-failed": ErrorText(
        "{model} was not fetched to its end: {file} {problem}.",
        "Run this to go on from there: {command}",
    ),
    "cache-read-only": ErrorText(
        "Models cannot be kept in the folder of the model hub.",
        "Set HF_HOME to a folder that can be written to, and start again.",
    ),
    "model-broken": ErrorText("{model} cannot be loaded: {file} {problem}.", "{fix}."),
    "model-mismatch": ErrorText("The parts of {model} do not fit together: {problem}.", "{fix}."),
    "device-missing": ErrorText(
        "This computer has no {device} device.", "Start without --device, or with --device cpu."
    ),
    "out-of-memory": ErrorText(
        "There was not enough memory on the {device} for {seconds:g} s with {model}.",
        "Shorten the song to {shorter:g} s, or choose a smaller model.",
    ),
    "sound-not-finite": ErrorText(
        "{model} produced numbers that are not sound.", "Lower Guidance, or try another seed."
    ),
    "disk-full": ErrorText(
        "The disk that holds {place} is full.", "Free at least {needed} and try again."
    ),
    "not-writable": ErrorText(
        "Files cannot be written to {place}.",
        "Choose another place, on the command line with --out.",
    ),
    "gpu-aborted": ErrorText(
        "The GPU was taken away before the song was finished, twice.",
        "Shorten the song or lower Steps, and generate again.",
    ),
    "gpu-refused": ErrorText(
        "ZeroGPU did not grant a GPU: {reason}.",
        "Wait for your quota to refill, log in, or run the studio on your own computer.",
    ),
    "queue-full": ErrorText(
        "{waiting} songs are already waiting.", "Try again when one of them has finished."
    ),
    "source-missing": ErrorText("{name} is not there any more.", "Choose the file again."),
    "source-unreadable": ErrorText(
        "{name} cannot be read as music: {problem}.",
        "Save it as WAV, FLAC or MP3 with another program, and choose that file.",
    ),
    "source-too-long": ErrorText(
        "{name} is longer than {limit:g} s.", "Cut it to {limit:g} s or less, and choose it again."
    ),
    "source-too-short": ErrorText(
        "{name} lasts only {seconds:.2g} s.", "Choose a file of at least {limit:g} s."
    ),
    "file-not-uploaded": ErrorText(
        "{name} was not uploaded to this page.",
        "Upload the file, and pass on what the upload returned.",
    ),
    "still-reading": ErrorText(
        "{name} is still being read.", "Wait until its waveform is there, and start again."
    ),
    "source-needed": ErrorText("No file was chosen for {label}.", "Choose a song from your disk."),
    "noise-needs-source": ErrorText(
        "There is no song to start from.", "Choose a song, or set Start from the song to 0."
    ),
    "nothing-to-add": ErrorText(
        "Nothing is to be added to the song.", "Set Before or After to at least 1 s."
    ),
    "extended-too-long": ErrorText(
        "{model} makes up to {limit:g} s, and the song with its additions would last {asked:.4g} s.",
        "Take {over:.4g} s off Before or After.",
    ),
    "region-empty": ErrorText(
        "The region from {start:g} to {end:g} s holds nothing.", "Set To to a later time than From."
    ),
    "region-outside": ErrorText(
        "The region begins at {start:g} s and the song ends at {end:.4g} s.",
        "Move the region into the song.",
    ),
    "morph-backwards": ErrorText(
        "How far ({high:g}) is below Let go at ({low:g}).",
        "Set How far to the larger of the two.",
    ),
    "planner-missing": ErrorText(
        "No planner can think first here: {reason}.", "Turn Think first off."
    ),
    "codes-missing": ErrorText(
        "{model} was published without the part that listens, so it cannot make covers.",
        "Play another model, such as xl-sft.",
    ),
    "brief-empty": ErrorText(
        "Nothing says what the words are to be about.",
        "Write a line, such as: leaving a small town.",
    ),
    "settings-unreadable": ErrorText(
        "The settings in {name} cannot be used: {problem}.",
        "Choose another file, such as the JSON that was saved beside it.",
    ),
    "settings-missing": ErrorText(
        "{name} holds no settings of this studio.",
        "Choose a file that the studio wrote, and that no other program has written anew.",
    ),
    "settings-elsewhere": ErrorText(
        "{name} was made by {model}, which has no tab here.",
        "Make it again on the command line: python app.py replay {name}",
    ),
    "settings-need-file": ErrorText(
        "{name} went into this song, and settings hold no sound.", "Choose it as {label}."
    ),
    "settings-need-adapter": ErrorText(
        "{names} played in this song, and settings hold no adapters.",
        "Choose it under Adapters (or with --adapter FILE; --without-adapters leaves it out).",
    ),
    "link-unreadable": ErrorText(
        "The settings in the link cannot be used: {problem}.",
        "Ask for the link again; the page works without it.",
    ),
    "link-needs-file": ErrorText(
        "A file went into this song, and links hold no sound.", "Choose it as {label}."
    ),
    "takes-same": ErrorText("Both are the same take.", "Choose two different takes to compare."),
    "stems-missing": ErrorText(
        "{model} ({size}) would split the song and is not on this computer.",
        "Fetch it with: {command}",
    ),
    "stems-memory": ErrorText(
        "There was not enough memory on the {device} to split the song.",
        "Close other programs, or start the studio with --device cpu, and split it again.",
    ),
    "writer-missing": ErrorText(
        "{model} ({size}) would write the words and is not on this computer.",
        "Fetch it with: {command}",
    ),
    "writer-memory": ErrorText(
        "There was not enough memory on the {device} for {model} ({size}).",
        "Close other programs that use it, and write again.",
    ),
    "adapter-missing": ErrorText("{name} is not there any more.", "Choose the adapter again."),
    "adapter-unreadable": ErrorText(
        "{name} cannot be read as an adapter: {problem}.",
        "Fetch it again from where it came, and choose the new file.",
    ),
    "adapter-refused": ErrorText("{name} cannot be played: {problem}.", "{fix}."),
    "adapter-too-big": ErrorText(
        "{name} has {found}, and {limit} is the most that an adapter may have.",
        "Choose a smaller version of it.",
    ),
    "adapter-wrong-base": ErrorText(
        "{name} does not fit {model}: {problem}.",
        "Choose an adapter that was made for {model}.",
    ),
    "backend-missing": ErrorText(
        "{model} ({size}) is not on this computer.",
        'Fetch it with download_backend and {{"backend": "{backend}"}}.',
    ),
    "track-unknown": ErrorText(
        "No track is called {track!r} here.", "Use the track_id that generate answered with."
    ),
    "track-complete": ErrorText(
        "{track} has come to its end already.", "Nothing needs to be stopped; go on."
    ),
    "take-gone": ErrorText(
        "That take is no longer on the shelf.", "Generate it again from its JSON."
    ),
    "internal": ErrorText(
        "Something broke inside the studio ({kind}).",
        "Generate again; if it happens twice, report it with the log from the terminal.",
    ),
}


class StudioError(Exception):
    """A failure with a name.

    Args:
        code: a key of `KINDS`.
        **facts: what the sentence and the action of that kind speak about. A missing or surplus
            fact is a bug and raises `KeyError` here, not later on somebody's page.
    """

    def __init__(self, code: str, **facts: Any) -> None:
        kind = ERRORS[code]
        self.code = code
        self.facts = facts
        self.message = kind.sentence.format(**facts)
        self.action = kind.action.format(**facts)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} {self.action}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.code, self.facts)


def table() -> str:
    """Every code with what it says, as a Markdown table; facts stand in angle quotes."""
    rows = ["| code | what it says | what helps |", "|---|---|---|"]
    for code, kind in sorted(ERRORS.items()):
        rows.append(f"| `{code}` | {_with_gaps(kind.sentence)} | {_with_gaps(kind.action)} |")
    return "\n".join(rows)


def _with_gaps(text: str) -> str:
    parts = Formatter().parse(text)
    return "".join(said + (f"‹{fact}›" if fact else "") for said, fact, *_ in parts)


def _rebuild(code: str, facts: dict[str, Any]) -> StudioError:
    return StudioError(code, **facts)


if __name__ == "__main__":
    print(table())
