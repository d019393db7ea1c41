"""Requests for what is done with a finished take. Each ends in `song.Made`."""

from __future__ import annotations

from typing import ClassVar, Literal

from knobs import File, Real, Request, knob


class Export(Request):
    """A take as a file of another kind."""

    mode: ClassVar[str] = "export"
    source: File = knob(..., "Take")
    format: Literal["wav", "flac", "mp3"] = knob("mp3", "Format")
    settings: bool = knob(True, "Settings inside")
    ai_generated: bool = knob(True, "Tagged as AI-generated")


class Master(Export):
    """A take brought to a loudness, under a true-peak ceiling, as a file."""

    mode: ClassVar[str] = "master"
    target_lufs: Real = knob(-14.0, "Loudness", -30, -8, 0.5, unit="LUFS")
    ceiling_dbtp: Real = knob(-1.0, "Ceiling", -6, 0, 0.1, unit="dBTP")


class Stems(Request):
    """A take taken apart: vocals, drums, bass and the rest."""

    mode: ClassVar[str] = "stems"
    source: File = knob(..., "Take")


FINISHES: dict[str, type[Request]] = {request.mode: request for request in (Export, Master, Stems)}
