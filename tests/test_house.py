"""The layout in docs/architecture.md, held: which package may import which, and who knows whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

GROUP_OF = {
    **dict.fromkeys(("pipeline", "lyrics", "post_process"), "tasks"),
    **dict.fromkeys(("theme", "tooltips"), "web"),
    "cli_output": "cli",
}
"""Files at the root that belong to a group; any other file or package is a group of its own."""

LAYERS = (
    {"core"},
    {"audio"},
    {"models"},
    {"tasks"},
    {"runtime"},
    {"backend"},
    {"web", "lofi"},
    {"cli"},
    {"app"},
)
"""Each may import what stands to its left."""

ARROWS = {
    *("audio -> core", "models -> core", "models -> audio"),
    *("tasks -> core", "tasks -> audio", "tasks -> models"),
    *("runtime -> core", "runtime -> audio", "runtime -> models", "runtime -> tasks"),
    *("backend -> core", "backend -> models", "backend -> runtime"),
    *("web -> core", "web -> audio"),
    *("lofi -> core", "lofi -> audio", "lofi -> models", "lofi -> runtime", "lofi -> backend"),
    *("cli -> core", "cli -> audio", "cli -> models", "cli -> runtime", "cli -> backend"),
    *("cli -> web", "app -> cli", "app -> lofi", "app -> web"),
    "app -> core",
}
"""Who imports whom. The page knows the backend only through the Studio protocol it is handed."""

OUTSIDE = {
    "gradio": ("web", "theme", "app"),
    "spaces": ("runtime.device",),
    "diffusers": (
        *("models.acestep", "models.loading", "models.authors_layout"),
        "models.random_weights",
    ),
    "transformers": ("models",),
    "mlx": ("models.llm",),
    "mlx_lm": ("models.llm",),
    "huggingface_hub": ("models.hub", "models.http_download"),
    "filelock": ("models.hub", "lofi.track_cache"),
    "demucs": ("models.demucs",),
    "soundfile": ("audio.encode",),
    "soxr": ("audio",),
    "av": ("audio.decode_worker",),
}
"""Which parts may import a library, by the beginning of their names."""

LONGEST_FILE = 500
MOST_ARROWS = 30

GROUPS = set().union(*LAYERS)
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} & GROUPS
ROOT_FILES = {*GROUP_OF, "backend", "cli", "app"}
FILES = sorted(
    [ROOT / f"{name}.py" for name in ROOT_FILES]
    + [path for package in PACKAGES for path in (ROOT / package).glob("*.py")]
)
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def imports(path: Path, only_top: bool = False) -> set[str]:
    """The modules that a file imports, those for type checkers included."""
    found = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                for alias in child.names:
                    inner = f"{module}.{alias.name}"
                    found.add(inner if inner in MODULES else module)
            elif only_top and (
                isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            ):
                continue
            else:
                visit(child)

    visit(ast.parse(path.read_text("utf-8")))
    return found


def group(module: str) -> str:
    first = module.split(".")[0]
    return GROUP_OF.get(first, first)


def arrows() -> dict[str, str]:
    """Every import between groups, with a file that has it."""
    return {
        f"{group(module)} -> {group(other)}": module
        for module, path in MODULES.items()
        for other in imports(path)
        if group(other) in GROUPS and group(other) != group(module)
    }


def test_the_listed_arrows_are_the_imports_between_groups():
    found = arrows()
    assert {arrow: found[arrow] for arrow in found.keys() - ARROWS} == {}
    assert ARROWS - found.keys() == set(), "nobody needs these"
    assert len(ARROWS) <= MOST_ARROWS


def test_arrows_go_to_the_left():
    level = {name: place for place, layer in enumerate(LAYERS) for name in layer}
    for arrow in ARROWS:
        one, other = arrow.split(" -> ")
        assert level[other] < level[one], arrow


def test_no_circle_even_for_type_checkers():
    ahead = {module: imports(path) & MODULES.keys() for module, path in MODULES.items()}
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for other in ahead[module]:
                follow(other, (*way, module))
            done.add(module)

    for module in MODULES:
        follow(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_libraries_are_imported_only_where_listed(module):
    for library in {group(name) for name in imports(MODULES[module])} & OUTSIDE.keys():
        places = OUTSIDE[library]
        assert any(f"{module}.".startswith(f"{place}.") for place in places), library


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_imported_inside_functions(module):
    top = {group(name) for name in imports(MODULES[module], only_top=True)}
    assert not top & {"torch", "diffusers", "transformers"}


@pytest.mark.parametrize("module", MODULES)
def test_no_file_has_two_jobs(module):
    assert len(MODULES[module].read_text("utf-8").splitlines()) <= LONGEST_FILE


def test_the_root_stays_small():
    assert len(list(ROOT.glob("*.py"))) <= 10


@pytest.mark.slow
def test_importing_the_page_brings_no_torch():
    heavy = (
        "import sys, app, web.page; "
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, timeout=120).returncode == 0


def test_mini_is_not_imported_by_the_app():
    assert not any("mini" in map(group, imports(path)) for path in FILES)


def test_no_test_imports_another_test_file():
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert not {name for name in imports(path) if name.startswith("test_")}, path.name
