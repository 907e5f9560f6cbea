"""Steps of patched models, and training steps, that wait for the device where they should not.

The cases are those of the tests (`tests/_waitless.py`); on a GPU torch itself says where it waits. Without one they run
on meta tensors, of which nothing can be read.
"""

from __future__ import annotations

import paths  # noqa: F401
from stage import Context, Record

SECONDS = 60.0
EXPECTED = 2.0
PARALLEL = 6  # nothing is timed


def items(context: Context) -> list[str]:
    """The methods; a few for a dry run."""
    from _waitless import CASES

    return list(CASES)[:2] if context.tiny else list(CASES)


def run(item: str, context: Context) -> Record:
    """One method; raises where its second run waits."""
    from _waitless import CASES

    CASES[item]("cuda" if context.device == "cuda" else "meta")
    return {"summary": "waits for nothing"}


def table(records: dict[str, Record]) -> str:
    """Methods whose steps wait for nothing."""
    return f"Without waiting for the device: {', '.join(records)}." if records else ""
