"""The daemon's settings: where they are found on each system, and how they are read."""

from __future__ import annotations

import platformdirs
import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix
from platformdirs.windows import Windows

from lofi import config

ROAMING, LOCAL = r"C:\Users\me\AppData\Roaming", r"C:\Users\me\AppData\Local"


@pytest.mark.parametrize(
    ("system", "platform", "file", "cache"),
    [
        (Unix, "linux", "HOME/.config/lofi.nvim/config.toml", "HOME/.cache/lofi.nvim"),
        (
            MacOS,
            "darwin",
            "HOME/Library/Application Support/lofi.nvim/config.toml",
            "HOME/Library/Caches/lofi.nvim",
        ),
        (Windows, "win32", f"{ROAMING}/lofi.nvim/config.toml", f"{LOCAL}/lofi.nvim/Cache"),
    ],
)
def test_folders_are_the_same_as_before_on_each_system(
    monkeypatch, tmp_path, system, platform, file, cache
):
    monkeypatch.setattr(platformdirs, "PlatformDirs", system)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WIN_PD_OVERRIDE_APPDATA", ROAMING)
    monkeypatch.setenv("WIN_PD_OVERRIDE_LOCAL_APPDATA", LOCAL)
    assert str(config.config_file()) == file.replace("HOME", str(tmp_path))
    assert str(config.cache_folder()) == cache.replace("HOME", str(tmp_path))


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('backend = "musicgen"\n', encoding="utf-8-sig")
    assert config.read({"LOFI_CONFIG": str(file)}).backend == "musicgen"


def test_an_invalid_value_is_logged_and_its_default_used(tmp_path, caplog):
    environ = {"LOFI_CONFIG": str(tmp_path / "none"), "LOFI_THREADS": "0", "LOFI_COLOUR": "red"}
    settings = config.read(environ)
    assert settings.threads is None
    assert "threads in the environment is invalid" in caplog.text
    assert "colour in the environment is not a setting" in caplog.text
