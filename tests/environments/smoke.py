"""One path through every command and every tab, on the embedded model and random weights.

Runs without pytest, in whatever environment calls it: python tests/environments/smoke.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--inference-steps", "2", "--seed", "1"]


def main() -> None:
    """Run the commands, the daemon and the page; an assertion stops at what is wrong."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ |= {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        os.environ["ACE_MUSICGEN"] = str(folder / "musicgen")
        write_models(folder)
        versions()
        song = commands(folder)
        daemon(folder)
        page(song)
    print("smoke: all commands and tabs work")


def versions() -> None:
    """Print what was installed, for the log of a run that fails."""
    import importlib.metadata as metadata

    names = ("torch", "diffusers", "transformers", "numpy", "av", "gradio", "pydantic", "spaces")
    print(
        f"smoke: Python {sys.version.split()[0]};",
        ", ".join(f"{name} {metadata.version(name)}" for name in names),
        flush=True,
    )


def write_models(folder: Path) -> None:
    """Write a MusicGen and a songwriter of random weights, and put the latter in the catalog."""
    import tiny_musicgen
    import tiny_writer

    from models import catalog

    tiny_musicgen.write(folder / "musicgen")
    for name, writer in catalog.SONGWRITERS.items():
        if writer.engine == "torch":
            written = tiny_writer.write(folder / "songwriter")
            catalog.SONGWRITERS[name] = replace(writer, folder=written)


def command(*args: str, code: int = 0) -> str:
    """Run one command in this process; returns what it printed."""
    import app

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            got = app.main([*args, "--device", "cpu"])
        except SystemExit as end:
            got = end.code
    assert got == code, f"{args[0]} ended with {got}:\n{out.getvalue()}{err.getvalue()}"
    print(f"smoke: {args[0]}", flush=True)
    return out.getvalue() + err.getvalue()


def commands(folder: Path) -> Path:
    """Every command once; returns a song that they made."""
    mini = ["--model", "mini"]
    song, mp3 = folder / "song.wav", folder / "song.mp3"
    command(
        *("generate", "--prompt", "warm lofi piano", "--duration-s", "10", "--instrumental"),
        *(*SHORT, *mini, "--thinking", "--out", str(song)),
    )
    source = ["--source", str(song), *mini]
    for name, more in {
        "cover": ["--prompt", "house", *SHORT],
        "extend": ["--after-s", "2", *SHORT],
        "edit": ["--start-s", "2", "--end-s", "4", *SHORT],
        "master": [],
        "export": ["--format", "mp3"],
    }.items():
        out = mp3 if name == "export" else folder / f"{name}.flac"
        command(name, *source, *more, "--out", str(out))
        assert out.stat().st_size > 1000, name
    command("replay", str(mp3), *mini, "--out", str(folder / "again.wav"))
    assert "stems-missing" in command("stems", *source, "--out", str(folder / "stems"), code=1)
    command("musicgen", "--prompt", "lofi", "--duration-s", "5", "--out", str(folder / "m.wav"))
    command("lyrics", "--brief", "leaving a small town", *mini)
    command("fetch", "mini")
    return mp3


def daemon(folder: Path) -> None:
    """The daemon in a process of its own: one track."""
    lines = (
        {"id": 1, "method": "ping"},
        {"id": 2, "method": "generate", "params": {"prompt": "lofi", "duration_sec": 10}},
    )
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), "daemon", "--model", "mini", "--device", "cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "LOFI_CACHE_PATH": str(folder / "tracks"), "LOFI_ACE_STEP_STEPS": "2"},
    )
    assert child.stdin
    assert child.stdout
    for line in lines:
        child.stdin.write(json.dumps({"jsonrpc": "2.0", **line}) + "\n")
    child.stdin.flush()
    for line in child.stdout:
        message = json.loads(line)
        assert message.get("method") != "generation_error", message
        if message.get("method") == "generation_complete":
            break
    else:
        raise AssertionError("the daemon ended before the track was complete")
    child.stdin.close()
    assert child.wait(30) == 0
    print("smoke: daemon", flush=True)


def page(song: Path) -> None:
    """The page, served; its five tabs through their endpoints, with a file uploaded."""
    import backend
    from models import catalog
    from runtime import device
    from web import page

    device.reach_loopback()
    os.environ.setdefault("GRADIO_TEMP_DIR", str(song.parent / "page"))
    studio = backend.Studio(catalog.choose("mini"), device.find_device("cpu"))
    demo = page.build(studio)
    _, url, _ = demo.queue(max_size=64).launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **page.launch_options()
    )
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False, download_files=str(song.parent / "downloads"))
    short: dict[str, Any] = {"inference_steps": 2, "seed": 1, "thinking": False}
    source = handle_file(str(song))
    for name, given in {
        "generate": {"prompt": "lofi", "duration_s": 10, "instrumental": True, **short},
        "cover": {"source": source, "prompt": "house", **short},
        "extend": {"source": source, "after_s": 2, **short},
        "edit": {"source": source, "start_s": 2, "end_s": 4, **short},
    }.items():
        sound, take = client.predict(**given, api_name=f"/{name}")
        assert Path(sound).read_bytes()[:4] == b"RIFF"
        assert take["request"]["seed"] == 1
        print(f"smoke: tab {name}", flush=True)
    assert client.predict(brief="rain", api_name="/lyrics")
    print("smoke: tab lyrics", flush=True)
    demo.close()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # what libraries left running does not hold up the end
