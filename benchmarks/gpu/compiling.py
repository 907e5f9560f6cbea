"""Fills the caches of torch.compile and Triton before anything is timed, with many processes at once.

Which configuration a compiled kernel takes is measured at its first call. Here other processes are on the device at the
time, so that choice is forgotten afterwards and made anew where the kernel is timed; what was compiled for it stays.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import stages
from pool import INDUCTOR_CACHE
from stage import Context, Record, broken

SECONDS = 90.0
EXPECTED = 6.0
PARALLEL = 12
KEEPS = False  # the caches of another machine are not this one's


def items(context: Context) -> list[str]:
    """`STAGE ITEM` for whatever will run and can be compiled before; on the CPU, where nothing is, a few to try it."""
    return [
        f"{name} {item}"
        for name, pending in context.pending.items()
        if name in stages.STAGES and hasattr(stages.load(stages.STAGES[name]), "warm")
        for item in (pending[:3] if context.tiny else pending)
    ]


def run(item: str, context: Context) -> Record:
    """Compiles what one item of a later stage needs; what cannot be compiled is for that stage to say."""
    name, rest = item.split(" ", 1)
    begin, failed = time.perf_counter(), ""
    try:
        stages.load(stages.STAGES[name]).warm(rest, context)
    except Exception as error:
        if broken(context.device):
            raise
        failed = f"not compiled: {type(error).__name__}: {str(error).strip()[:300]}"
    return {"seconds": round(time.perf_counter() - begin, 2), "summary": failed}


def finish() -> None:
    """Forgets which configurations were fastest here."""
    for path in Path(os.environ[INDUCTOR_CACHE]).rglob("*.best_config"):
        path.unlink(missing_ok=True)
