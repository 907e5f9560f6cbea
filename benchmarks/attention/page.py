"""Tables in the documentation, each between two marks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def put(page: str, name: str, text: str) -> str:
    """The page with `text` between its marks of that name; ValueError if it has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no marks {begin} and {end}")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}{end}", page, flags=re.DOTALL)


def update(path: Path, name: str, text: str) -> None:
    """Put a table into a file."""
    path.write_text(put(path.read_text(encoding="utf-8"), name, text), encoding="utf-8")


def store(data: Any, file: Path) -> None:
    """Keep what was measured as JSON."""
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def show(path: Path, name: str, text: str) -> None:
    """Print a table, and put it into a file."""
    print(text)
    update(path, name, text)
