"""The command line: `maskaccel` and `python -m maskaccel`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point. `info` needs the standard library alone, so that it can say what is broken."""
    try:
        from .app import app
    except ImportError as error:
        if sys.argv[1:2] == ["info"]:
            from .info import print_info

            print_info(as_json="--json" in sys.argv[2:])
            return
        raise SystemExit(f"maskaccel: the command line cannot start: {error}. `maskaccel info` still works.") from error
    try:
        app()
    except ImportError as error:  # torch, or a package of an extra
        raise SystemExit(f"maskaccel: {error}") from error
