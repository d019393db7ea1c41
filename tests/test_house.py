"""The drawing in AGENTS.md, held: imports go down, or sideways where a line here says so."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = [
    {
        *(
            "app",
            "ui",
            "writing",
            "forms",
            "rack",
            "board",
            "finish",
            "compare",
            "doors",
            "endpoints",
        ),
        *("desk", "theme", "daemon", "wire"),
    },
    {
        "backend",
        "worker",
        "thinking",
        "residents",
        "jobs",
        "sources",
        "turns",
        "replay",
        "host",
        "adapters",
        "lofi",
        "backends",
    },
    {
        *("edits", "pipeline", "planner", "grammar", "qwen", "sampler", "codec", "audio"),
        *(
            "decoding",
            "export",
            "settings",
            "post_process",
            "measure",
            "checkpoints",
            "downloads",
            "transfers",
            "tracks",
            "config",
        ),
        *("lyrics", "stanzas", "qwen2", "loras", "stack", "musicgen"),
    },
    {"song", "finishing", "knobs", "tooltips", "telling", "errors"},
]
SIDEWAYS = {
    ("loras", "decoding"),
    ("app", "daemon"),
    ("daemon", "wire"),
    ("app", "ui"),
    ("app", "theme"),
    ("ui", "theme"),
    ("ui", "writing"),
    ("writing", "theme"),
    ("writing", "forms"),
    ("writing", "board"),
    ("writing", "desk"),
    ("ui", "forms"),
    ("ui", "board"),
    ("ui", "endpoints"),
    ("ui", "desk"),
    ("forms", "theme"),
    ("forms", "rack"),
    ("rack", "theme"),
    ("rack", "desk"),
    ("forms", "desk"),
    ("board", "theme"),
    ("board", "forms"),
    ("board", "desk"),
    ("board", "finish"),
    ("board", "compare"),
    ("board", "doors"),
    ("finish", "desk"),
    ("finish", "forms"),
    ("finish", "theme"),
    ("compare", "theme"),
    ("compare", "desk"),
    ("doors", "theme"),
    ("doors", "desk"),
    ("ui", "doors"),
    ("endpoints", "desk"),
    ("lofi", "backends"),
    ("backends", "backend"),
    ("backends", "residents"),
    ("backends", "host"),
    ("backend", "host"),
    ("backend", "worker"),
    ("backend", "sources"),
    ("backend", "jobs"),
    ("backend", "residents"),
    ("backend", "turns"),
    ("backend", "adapters"),
    ("worker", "adapters"),
    ("adapters", "jobs"),
    ("adapters", "sources"),
    ("turns", "host"),
    ("replay", "host"),
    ("worker", "host"),
    ("worker", "residents"),
    ("worker", "thinking"),
    ("thinking", "residents"),
    ("thinking", "jobs"),
    ("residents", "host"),
    ("residents", "jobs"),
    ("worker", "jobs"),
    ("jobs", "host"),
    ("sources", "host"),
    ("edits", "pipeline"),
    ("edits", "sampler"),
    ("edits", "codec"),
    ("edits", "audio"),
    ("planner", "grammar"),
    ("planner", "qwen"),
    ("planner", "checkpoints"),
    ("pipeline", "sampler"),
    ("pipeline", "codec"),
    ("pipeline", "audio"),
    ("pipeline", "checkpoints"),
    ("tracks", "audio"),
    ("export", "audio"),
    ("export", "settings"),
    ("settings", "decoding"),
    ("settings", "stack"),
    ("post_process", "audio"),
    ("post_process", "checkpoints"),
    ("post_process", "measure"),
    ("lyrics", "stanzas"),
    ("lyrics", "qwen2"),
    ("lyrics", "checkpoints"),
    ("qwen2", "checkpoints"),
    ("checkpoints", "downloads"),
    ("downloads", "transfers"),
    ("musicgen", "audio"),
    ("musicgen", "checkpoints"),
    ("musicgen", "pipeline"),
    ("stack", "loras"),
    ("song", "errors"),
    ("song", "knobs"),
    ("finishing", "knobs"),
    ("knobs", "errors"),
    ("tooltips", "knobs"),
    ("tooltips", "song"),
    ("telling", "tooltips"),
    ("telling", "song"),
}
OUTSIDERS = {
    "gradio": {
        *("ui", "writing", "forms", "rack", "board", "finish", "compare", "doors", "endpoints"),
        *("desk", "theme"),
    },
    "spaces": {"host"},
    "diffusers": {"pipeline"},
    "transformers": {"pipeline", "planner", "qwen2", "musicgen"},
    "mlx": {"qwen2"},
    "mlx_lm": {"qwen2"},
    "huggingface_hub": {"downloads", "transfers"},
    "filelock": {"downloads", "tracks"},
    "torch": {
        *("edits", "pipeline", "planner", "qwen", "qwen2", "sampler", "codec", "stack", "host"),
        *("post_process", "musicgen"),
    },
    "demucs": {"post_process"},
    "scipy": {"measure", "post_process"},
    "soundfile": {"export"},
    "soxr": {"audio", "decoding"},
    "av": {"decoding"},
}
ROOMS = sorted(set().union(*FLOORS))
LONGEST_ROOM = 500


def imports(room: str, only_top: bool = False) -> set[str]:
    """The top-level names that a room imports, leaving out what is there for type checkers."""
    found = set()

    def visit(node: ast.AST, deep: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(alias.name.split(".")[0] for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.add((child.module or "").split(".")[0])
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            elif deep or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, deep)

    visit(ast.parse((ROOT / f"{room}.py").read_text()), not only_top)
    return found


def test_every_room_is_on_a_floor():
    assert sorted(p.stem for p in ROOT.glob("*.py")) == sorted([*ROOMS, "bench"])


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_or_sideways_where_listed(room):
    level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    for other in imports(room) & set(ROOMS) - {room}:
        assert level[other] > level[room] or (room, other) in SIDEWAYS, f"{room} imports {other}"


@pytest.mark.parametrize("room", ROOMS)
def test_outsiders_are_known_in_their_rooms_only(room):
    for outsider in imports(room) & OUTSIDERS.keys():
        assert room in OUTSIDERS[outsider], f"{room} imports {outsider}"


@pytest.mark.parametrize("room", ROOMS)
def test_torch_is_imported_inside_functions(room):
    assert not imports(room, only_top=True) & {"torch", "diffusers", "transformers"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_has_two_jobs(room):
    assert len((ROOT / f"{room}.py").read_text().splitlines()) <= LONGEST_ROOM


def test_the_page_imports_without_torch_and_the_page_does_not_know_the_backend():
    heavy = "import sys, app, ui, theme; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, timeout=120).returncode == 0
    assert "backend" not in imports("ui")


def test_the_mini_workshop_is_not_imported_by_the_app():
    assert not any("mini" in imports(room) for room in ROOMS)
