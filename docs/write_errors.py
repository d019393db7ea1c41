"""Write the table of errors into docs/errors.md."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(__file__).parent / "errors.md"


def main() -> None:
    """Replace the table, which is the end of the file."""
    sys.path.insert(0, str(ROOT))
    from core.errors import table

    text = TARGET.read_text("utf-8").partition("| code |")[0]
    TARGET.write_text(text + table() + "\n", "utf-8")


if __name__ == "__main__":
    main()
