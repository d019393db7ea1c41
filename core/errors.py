"""Every error a person can meet: a code, what happened, and what to do about it.

Code deep inside raises `StudioError(code, **facts)`. The page, the command line and the API each
translate it once.
"""

from __future__ import annotations

from string import Formatter
from typing import Any, NamedTuple


class ErrorText(NamedTuple):
    """The wording of an error: two format strings over the facts given when it is raised."""

    sentence: str
    action: str


ERRORS: dict[str, ErrorText] = {
    "value-out-of-range": ErrorText("{label} {problem}.", "{fix}."),
    "unknown-field": ErrorText(
        "{name!r} is not a setting of {mode}.", "Remove it, or use one of: {known}."
    ),
    "prompt-empty": ErrorText(
        "The style is empty.", "Describe the music in a few words, such as: warm lofi piano, slow."
    ),
    "lyrics-too-long": ErrorText(
        "The lyrics take {tokens} tokens, and the model reads {limit}.",
        "Shorten them to about {length}.",
    ),
    "song-too-long": ErrorText(
        "{model} makes songs of up to {limit:g} s, not {asked:g} s.",
        "Set Length to {limit:g} s or less.",
    ),
    "model-unknown": ErrorText(
        "There is no model called {name!r}.",
        "Choose one of {known}, or give a folder, a hub repository or a safetensors file.",
    ),
    "model-not-loaded": ErrorText(
        "{name!r} is not the model that this studio runs.", "Use {known}, or leave model out."
    ),
    "api-key-wrong": ErrorText(
        "The API key is missing or wrong.",
        "Send the header Authorization: Bearer KEY, with the key that the studio was started with.",
    ),
    "endpoint-unknown": ErrorText("There is no {path}.", "Use one of: {known}."),
    "model-missing": ErrorText(
        "{model} ({size}) is not on this computer, and the model hub cannot be reached.",
        "Go online and run: {command}",
    ),
    "model-gated": ErrorText(
        "The model hub denies access to {model}.",
        "Accept its terms on its page, log in with `hf auth login`, and run: {command}",
    ),
    "hub-unknown": ErrorText(
        "The model hub has no {repo} ({revision}) that can be used, or it is private.",
        "Check the name; if it is private, log in with `hf auth login`, and run: {command}",
    ),
    "download-failed": ErrorText(
        "The download of {model} is incomplete: {file} {problem}.", "To resume it, run: {command}"
    ),
    "cache-read-only": ErrorText(
        "Models cannot be saved: the cache folder of the model hub is not writable.",
        "Set HF_HOME to a writable folder, and start again.",
    ),
    "model-broken": ErrorText("{model} cannot be loaded: {file} {problem}.", "{fix}."),
    "model-mismatch": ErrorText("The parts of {model} do not match: {problem}.", "{fix}."),
    "device-missing": ErrorText(
        "This computer has no {device} device.", "Start without --device, or with --device cpu."
    ),
    "out-of-memory": ErrorText(
        "The {device} ran out of memory for {seconds:g} s with {model}.",
        "Shorten the song to {shorter:g} s, or choose a smaller model.",
    ),
    "sound-not-finite": ErrorText(
        "{model} produced invalid audio (not a number).", "Lower Guidance, or try another seed."
    ),
    "disk-full": ErrorText(
        "The disk that holds {place} is full.", "Free at least {needed} and try again."
    ),
    "not-writable": ErrorText("Files cannot be written to {place}: {problem}.", "{fix}."),
    "gpu-aborted": ErrorText(
        "The GPU session ended twice before the song was finished.",
        "Shorten the song or lower Steps, and generate again.",
    ),
    "gpu-refused": ErrorText(
        "ZeroGPU did not grant a GPU: {reason}.",
        "Wait for your quota to refill, log in, or run the studio on your own computer.",
    ),
    "queue-full": ErrorText(
        "{waiting} jobs are already waiting.", "Try again when one of them has finished."
    ),
    "source-missing": ErrorText("{name} was not found.", "Choose the file again."),
    "source-unreadable": ErrorText(
        "{name} cannot be read as audio: {problem}.",
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
        "Upload the file, and pass what the upload returned.",
    ),
    "still-reading": ErrorText(
        "{name} is still being read.", "Wait until its waveform appears, and start again."
    ),
    "source-needed": ErrorText("No file was chosen for {label}.", "Choose an audio file."),
    "noise-needs-source": ErrorText(
        "There is no source to start from.",
        "Choose a file for Source audio, or set Start from source to 0.",
    ),
    "nothing-to-add": ErrorText(
        "Nothing would be added to the song.", "Set Add before or Add after to at least 1 s."
    ),
    "extended-too-long": ErrorText(
        "{model} makes up to {limit:g} s, and the extended song would last {asked:.4g} s.",
        "Reduce Add before or Add after by {over:.4g} s.",
    ),
    "region-empty": ErrorText(
        "The region from {start:g} to {end:g} s is empty.", "Set To to a later time than From."
    ),
    "region-outside": ErrorText(
        "The region begins at {start:g} s, and the song ends at {end:.4g} s.",
        "Move the region into the song.",
    ),
    "morph-backwards": ErrorText(
        "Edit end ({high:g}) is below Edit start ({low:g}).",
        "Set Edit end to the larger of the two.",
    ),
    "tracks-need-base": ErrorText(
        "{model} was not trained to add, accompany or extract tracks.",
        "Start the studio with --model xl-base or --model 2b-base.",
    ),
    "planner-missing": ErrorText("No planner can be used: {reason}.", "Turn Use planner off."),
    "codes-missing": ErrorText(
        "{model} was published without its audio tokenizer, so it cannot make covers.",
        "Choose another model, such as xl-sft.",
    ),
    "brief-empty": ErrorText(
        "The brief is empty.",
        "Write what the song is about, such as: leaving a small town.",
    ),
    "settings-unreadable": ErrorText(
        "The settings in {name} cannot be used: {problem}.",
        "Choose another file, such as the JSON saved beside it.",
    ),
    "settings-missing": ErrorText(
        "{name} contains no settings of this studio.",
        "Choose a file that the studio wrote and no other program has saved since.",
    ),
    "settings-elsewhere": ErrorText(
        "{name} was made with {model}, which has no tab here.",
        "Make it again on the command line: python app.py replay {name}",
    ),
    "settings-need-file": ErrorText(
        "This song used {name}, and settings contain no audio.", "Choose it as {label}."
    ),
    "settings-need-adapter": ErrorText(
        "This song used {names}, and settings contain no adapters.",
        "Choose it under Adapters (or with --adapter FILE; --without-adapters leaves it out).",
    ),
    "link-unreadable": ErrorText(
        "The settings in the link cannot be used: {problem}.",
        "Ask for the link again; the page works without it.",
    ),
    "link-needs-file": ErrorText(
        "This song used a file, and links contain no audio.", "Choose it as {label}."
    ),
    "takes-same": ErrorText("Both are the same take.", "Choose two different takes to compare."),
    "stems-missing": ErrorText(
        "{model} ({size}), which splits songs, is not on this computer.",
        "Download it with: {command}",
    ),
    "stems-memory": ErrorText(
        "The {device} ran out of memory while splitting the song.",
        "Close other programs, or start the studio with --device cpu, and split it again.",
    ),
    "writer-missing": ErrorText(
        "{model} ({size}), which writes lyrics, is not on this computer.",
        "Download it with: {command}",
    ),
    "writer-memory": ErrorText(
        "The {device} ran out of memory for {model} ({size}).",
        "Close other programs that use it, and write again.",
    ),
    "adapter-missing": ErrorText("{name} was not found.", "Choose the adapter again."),
    "adapter-unreadable": ErrorText(
        "{name} cannot be read as an adapter: {problem}.",
        "Download it again from its source, and choose the new file.",
    ),
    "adapter-refused": ErrorText("{name} cannot be applied: {problem}.", "{fix}."),
    "adapter-too-big": ErrorText(
        "{name} has {found}, and an adapter may have at most {limit}.",
        "Choose a smaller version of it.",
    ),
    "adapter-wrong-base": ErrorText(
        "{name} does not fit {model}: {problem}.",
        "Choose an adapter that was made for {model}.",
    ),
    "backend-missing": ErrorText(
        "{model} ({size}) is not on this computer.",
        'Download it with download_backend and {{"backend": "{backend}"}}.',
    ),
    "track-unknown": ErrorText(
        "There is no track called {track!r}.", "Use the track_id that generate returned."
    ),
    "track-complete": ErrorText("{track} is already finished.", "There is nothing to cancel."),
    "take-gone": ErrorText("That take is no longer available.", "Generate it again from its JSON."),
    "internal": ErrorText(
        "An unexpected error occurred ({kind}).",
        "Try again; if it happens twice, report it with the log from the terminal.",
    ),
}


class StudioError(Exception):
    """A failure that a person can understand and act on.

    Attributes:
        code: a key of `ERRORS`.
        facts: the values in its wording.
        message: what happened, as a sentence.
        action: what to do, as a sentence.
    """

    def __init__(self, code: str, **facts: Any) -> None:
        """Word the error.

        Raises:
            KeyError: an unknown code or a missing fact, here rather than later on somebody's page.
        """
        text = ERRORS[code]
        self.code = code
        self.facts = facts
        self.message = text.sentence.format(**facts)
        self.action = text.action.format(**facts)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} {self.action}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.code, self.facts)

    def as_dict(self) -> dict[str, str]:
        """The code, the message and the action, for callers that are programs."""
        return {"code": self.code, "message": self.message, "action": self.action}


def table() -> str:
    """Every error as a row of a Markdown table, with its facts in angle quotes."""
    rows = ["| code | what happened | what to do |", "|---|---|---|"]
    for code, text in sorted(ERRORS.items()):
        rows.append(f"| `{code}` | {_with_facts(text.sentence)} | {_with_facts(text.action)} |")
    return "\n".join(rows)


def _with_facts(text: str) -> str:
    parts = Formatter().parse(text)
    return "".join(literal + (f"‹{fact}›" if fact else "") for literal, fact, *_ in parts)


def _rebuild(code: str, facts: dict[str, Any]) -> StudioError:
    return StudioError(code, **facts)


if __name__ == "__main__":
    print(table())
