"""The daemon's settings: environment (`LOFI_*`) over a TOML file over defaults.

A value that does not fit is named in a warning and its default stays: an editor's typo must not
keep the music from playing.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

Backend = Literal["musicgen", "ace_step"]


Scheduler = Literal["euler", "heun", "pingpong"]


DeviceName = Literal["auto", "cpu", "cuda", "mps"]


DEVICES = {"metal": "mps", "coreml": "mps"}
"""Other names for Apple's GPU."""


APP = "lofi.nvim"


PREFIX = "LOFI_"


def _plain(value: Any) -> Any:
    return value.strip().lower().replace("-", "_") if isinstance(value, str) else value


def _device(value: Any) -> Any:
    return DEVICES.get(_plain(value), _plain(value)) if isinstance(value, str) else value


def _folder(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return Path(value).expanduser()
    raise ValueError("names no folder")


Folder = Annotated[Path, BeforeValidator(_folder)]


class Config(BaseModel):
    """What may be set. A field's name in upper case behind `LOFI_` is its variable, as it stands its
    key in the TOML file. None means: whatever suits the model or the machine."""

    model_config = ConfigDict(frozen=True)
    backend: Annotated[Backend, BeforeValidator(_plain)] = "ace_step"
    ace_step_model_path: str | None = None
    model_path: Folder | None = None
    cache_path: Folder | None = None
    cache_max_mb: int = Field(500, ge=1)
    cache_max_tracks: int | None = Field(None, ge=1)
    device: Annotated[DeviceName, BeforeValidator(_device)] = "auto"
    threads: int | None = Field(None, ge=1, le=256)
    ace_step_steps: int | None = Field(None, ge=1, le=200)
    ace_step_scheduler: Annotated[Scheduler, BeforeValidator(_plain)] = "euler"
    ace_step_guidance: float | None = Field(None, ge=1, le=30, allow_inf_nan=False)

    @property
    def cache(self) -> Path:
        """Where tracks are kept."""
        return self.cache_path or cache_folder()


def read(environ: Mapping[str, str] = os.environ) -> Config:
    """The settings of this process. Says on standard error what it could not use."""
    path = Path(environ.get("LOFI_CONFIG") or config_folder() / "config.toml")
    given = {name: (value, str(path)) for name, value in _in_file(path).items()}
    for name, value in environ.items():
        if name.startswith(PREFIX) and name != "LOFI_CONFIG" and value.strip():
            given[name.removeprefix(PREFIX).lower()] = (value, "the environment")
    kept: dict[str, Any] = {}
    for name, (value, place) in given.items():
        if name not in Config.model_fields:
            _warn(f"{name} in {place} is not a setting; known: {', '.join(Config.model_fields)}.")
            continue
        try:
            kept[name] = getattr(Config.model_validate({name: value}), name)
        except ValidationError as error:
            default = Config.model_fields[name].default
            problem = error.errors()[0]["msg"]
            _warn(f"{name} in {place} is {value!r}: {problem}. It stays {default or 'automatic'}.")
    return Config.model_construct(**kept)


def config_folder() -> Path:
    """Where this system keeps a person's settings for us."""
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home()) / APP
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / APP
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / APP


def cache_folder() -> Path:
    """Where this system keeps what can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / APP / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / APP
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / APP


def _in_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(f"{path} cannot be read: {error}. It is left out.")
        return {}


def _warn(text: str) -> None:
    print(f"lofi: {text}", file=sys.stderr)
