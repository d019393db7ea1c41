"""Draw docs/architecture.svg from the imports: a box for each group, an arrow for each import.

python docs/draw_architecture.py          write the file
python docs/draw_architecture.py --check  exit 1 if the file is not what would be written
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(__file__).parent / "architecture.svg"

GROUPS = {
    "app": ("app.py", "serve the page, or run a command"),
    "cli": ("cli.py cli_output.py", "the commands, and what they write"),
    "web": ("web/ theme.py tooltips.py", "the page and its API"),
    "lofi": ("lofi/", "the JSON-RPC daemon"),
    "backend": ("backend.py", "Studio: accept a request, run it, stop it, keep the takes"),
    "runtime": ("runtime/", "jobs, one task for each mode, queue, device, loaded models"),
    "tasks": ("pipeline.py lyrics.py post_process.py", "music, words, mastering, stems"),
    "models": ("models/", "catalog, downloads, engines, planner, adapters"),
    "audio": ("audio/", "decode, encode, tags, levels, splices, analysis"),
    "core": ("core/", "requests, results, errors, files, text"),
}
"""Group -> its files, and what they do; from the top row to the bottom row."""

SAME_ROW = {"web", "lofi"}
LEFT = {"cli", "web", "runtime", "models"}
"""Groups whose arrows over other rows pass on the left; those of all others on the right."""

WIDTH, BOX, FIRST, HEIGHT, ROW, TOP, GAP = 1000, 420, 220, 54, 88, 20, 16


def files_of(group: str) -> list[Path]:
    """The Python files of a group."""
    found = []
    for name in GROUPS[group][0].split():
        path = ROOT / name
        found += sorted(path.glob("*.py")) if path.is_dir() else [path]
    return found


def arrows() -> dict[str, list[str]]:
    """Group -> the groups that it imports, those for type checkers included."""
    group_of = {
        name.removesuffix("/").removesuffix(".py"): group
        for group, (files, _) in GROUPS.items()
        for name in files.split()
    }
    found: dict[str, list[str]] = {}
    for group in GROUPS:
        others = set()
        for file in files_of(group):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    others |= {group_of.get(alias.name.split(".")[0]) for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    others.add(group_of.get((node.module or "").split(".")[0]))
        found[group] = [other for other in GROUPS if other in others - {group}]
    return found


def places() -> dict[str, tuple[int, int, int, int]]:
    """Group -> left, top and width of its box, and its row."""
    found, row = {}, -1
    for group in GROUPS:
        second = group in SAME_ROW and any(other in found for other in SAME_ROW)
        row += not second
        width = BOX if group not in SAME_ROW else BOX - FIRST - GAP if second else FIRST
        left = (WIDTH - BOX) // 2 + second * (FIRST + GAP)
        found[group] = (left, TOP + row * ROW, width, row)
    return found


def path_between(start: str, end: str, number: int) -> str:
    """A line to the row below, or a bow at the side to a row further down."""
    place = places()
    (x1, y1, w1, row1), (x2, y2, w2, row2) = place[start], place[end]
    if row2 == row1 + 1:
        x = min(max(x1 + w1 / 2, x2), x2 + w2) if w1 <= w2 else x2 + w2 / 2
        return f"M{x:.0f} {y1 + HEIGHT:.0f}L{x:.0f} {y2:.0f}"
    left = start in LEFT
    out_x, in_x = (x1, (WIDTH - BOX) / 2) if left else (x1 + w1, (WIDTH + BOX) / 2)
    bow = (-1 if left else 1) * (26 + 26 * (row2 - row1))
    out_y, in_y = y1 + 10 + 7 * number, y2 + 10 + 4 * row1
    return (
        f"M{out_x:.0f} {out_y:.0f}C{out_x + bow:.0f} {out_y:.0f} "
        f"{in_x + bow:.0f} {in_y:.0f} {in_x:.0f} {in_y:.0f}"
    )


def draw() -> str:
    """The diagram as SVG text."""
    place, imports = places(), arrows()
    height = 2 * TOP + HEIGHT + ROW * max(row for *_, row in place.values())
    count = sum(map(len, imports.values()))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" role="img">',
        f"<title>{len(GROUPS)} groups and {count} arrows: who imports whom</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for group, others in imports.items():
        for number, other in enumerate(others):
            lines.append(
                f'<path d="{path_between(group, other, number)}" fill="none" stroke="#555" '
                f'stroke-opacity=".7" marker-end="url(#tip)"><title>{group} imports {other}'
                "</title></path>"
            )
    for group, (files, purpose) in GROUPS.items():
        left, top, width, _ = place[group]
        middle = left + width / 2
        lines += [
            f'<rect x="{left}" y="{top}" width="{width}" height="{HEIGHT}" rx="6" '
            'fill="#f4f4f4" stroke="#333"/>',
            f'<text x="{middle:.0f}" y="{top + 23}" text-anchor="middle" font-size="14" '
            f'font-weight="600" fill="#111">{files}</text>',
            f'<text x="{middle:.0f}" y="{top + 42}" text-anchor="middle" font-size="12" '
            f'fill="#333">{purpose}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> int:
    """Write the diagram, or with --check compare it."""
    text = draw()
    if "--check" in sys.argv[1:]:
        return int(not TARGET.is_file() or TARGET.read_text("utf-8") != text)
    TARGET.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
