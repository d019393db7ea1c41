"""Settings of the daemon: `LOFI_*` variables override config.toml, which overrides defaults.

An invalid value is reported on standard error and its default is used: a typo in an editor's
configuration must not keep the daemon from starting.
"""

from __future__ import annotations

import logging
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

log = logging.getLogger(__name__)

BackendName = Literal["musicgen", "ace_step"]


SchedulerName = Literal["euler", "heun", "pingpong"]


DeviceName = Literal["auto", "cpu", "cuda", "mps", "xpu"]


Precision = Literal["auto", "bf16", "float32", "int8", "fp8"]


Offload = Literal["auto", "none", "encoders", "blocks"]


DEVICE_ALIASES = {"metal": "mps", "coreml": "mps"}
"""Other names for Apple's GPU."""


APP_NAME = "lofi.nvim"
"""Name of the daemon's folders."""


ENV_PREFIX = "LOFI_"


def _normalized(value: Any) -> Any:
    return value.strip().lower().replace("-", "_") if isinstance(value, str) else value


def _device(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return DEVICE_ALIASES.get(_normalized(value), _normalized(value))


def _folder(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return Path(value).expanduser()
    raise ValueError("is not a folder name")


Folder = Annotated[Path, BeforeValidator(_folder)]


class Config(BaseModel):
    """The settings. A field's name is its key in config.toml, and with `LOFI_` before it in upper
    case its environment variable. None means whatever suits the model or the machine."""

    model_config = ConfigDict(frozen=True)
    backend: Annotated[BackendName, BeforeValidator(_normalized)] = "ace_step"
    ace_step_model_path: str | None = None
    model_path: Folder | None = None
    cache_path: Folder | None = None
    cache_max_mb: int = Field(500, ge=1)
    cache_max_tracks: int | None = Field(None, ge=1)
    device: Annotated[DeviceName, BeforeValidator(_device)] = "auto"
    threads: int | None = Field(None, ge=1, le=256)
    precision: Annotated[Precision | None, BeforeValidator(_normalized)] = None
    offload: Annotated[Offload | None, BeforeValidator(_normalized)] = None
    ace_step_steps: int | None = Field(None, ge=1, le=200)
    ace_step_scheduler: Annotated[SchedulerName, BeforeValidator(_normalized)] = "euler"
    ace_step_guidance: float | None = Field(None, ge=1, le=30, allow_inf_nan=False)

    @property
    def tracks_folder(self) -> Path:
        """Where finished tracks are kept."""
        return (self.cache_path or cache_folder()) / "tracks"


def read(environ: Mapping[str, str] = os.environ) -> Config:
    """The settings of this process. Invalid and unknown ones are logged and left out."""
    path = Path(environ["LOFI_CONFIG"]) if environ.get("LOFI_CONFIG") else config_file()
    given = {name: (value, str(path)) for name, value in _read_toml(path).items()}
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX) and name != "LOFI_CONFIG" and value.strip():
            given[name.removeprefix(ENV_PREFIX).lower()] = (value, "the environment")
    valid: dict[str, Any] = {}
    for name, (value, origin) in given.items():
        if name not in Config.model_fields:
            known = ", ".join(Config.model_fields)
            log.warning("%s in %s is not a setting. Known: %s.", name, origin, known)
            continue
        try:
            valid[name] = getattr(Config.model_validate({name: value}), name)
        except ValidationError as error:
            default = Config.model_fields[name].default or "automatic"
            problem = error.errors()[0]["msg"]
            text = "%s in %s is invalid (%r): %s. Using the default: %s."
            log.warning(text, name, origin, value, problem, default)
    return Config.model_construct(**valid)


def config_file() -> Path:
    """The config.toml of this user, in the system's folder for settings.

    On a Mac, ~/Library/Application Support is used when `XDG_CONFIG_HOME` names a folder that has
    no config.toml.
    """
    folder = platformdirs.user_config_path(APP_NAME, appauthor=False, roaming=True)
    file = folder / "config.toml"
    if sys.platform == "darwin" and not file.exists():
        return Path.home() / "Library" / "Application Support" / APP_NAME / "config.toml"
    return file


def cache_folder() -> Path:
    """The daemon's folder among this user's caches."""
    return platformdirs.user_cache_path(APP_NAME, appauthor=False)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))  # Windows editors may write a BOM
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read and is ignored: %s.", path, error)
        return {}
