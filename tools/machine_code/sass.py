"""Reads what `cuobjdump -sass` prints: instructions, operands, and the control bits of sm_70 to sm_90.

An instruction has 128 bits. Bits 105 to 125 tell the issue logic what to do, because the hardware does not compare
registers: stall cycles (4 bits), yield (1), the scoreboard that is freed when the result is there (3, 7: none), the
scoreboard that is freed when the operands are read (3, 7: none), the scoreboards to wait for before issue (6, a mask),
reuse of operands (4).
"""

from __future__ import annotations

import re
from typing import NamedTuple

NONE = 7  # no scoreboard
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_GUARD = re.compile(r"^@(!?)(U?P\w+)\s+")


class Instruction(NamedTuple):
    """One instruction of a kernel."""

    address: int
    opcode: str  # with its modifiers, such as LDG.E.128.CONSTANT
    operands: tuple[str, ...]
    guard: str  # the predicate that lets it run, or ""
    negated: bool
    stall: int  # cycles until the next instruction of the warp may issue
    wait: int  # mask of scoreboards that must be free before it issues
    write: int  # scoreboard that is taken until the result is written
    read: int  # scoreboard that is taken until the operands are read

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".", 1)[0]


def _split(text: str) -> tuple[str, ...]:
    """Operands: commas outside brackets part them."""
    return tuple(part.strip() for part in re.split(r",(?![^\[]*\])", text)) if text else ()


def decode(listing: str) -> list[Instruction]:
    """Instructions of one kernel of a listing.

    Raises:
        ValueError: An instruction without its second half.
    """
    found: list[Instruction] = []
    lines = iter(listing.splitlines())
    for line in lines:
        first = _LINE.match(line)
        if not first:
            continue
        second = _SECOND.match(next(lines, ""))
        if not second:
            raise ValueError(f"no second half of the instruction at 0x{first[1]}")
        text, high = first[2], int(second[1], 16)
        guard = _GUARD.match(text)
        if guard:
            text = text[guard.end() :]
        opcode, _, rest = text.partition(" ")
        found.append(
            Instruction(
                int(first[1], 16), opcode, _split(rest.strip()), guard[2] if guard else "", bool(guard and guard[1]),
                high >> 41 & 15, high >> 52 & 63, high >> 46 & 7, high >> 49 & 7,
            )
        )  # fmt: skip
    return found


def access_bytes(opcode: str) -> int:
    """Bytes that a lane moves in a load or store."""
    parts = opcode.split(".")
    for size, count in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("16", 2), ("U8", 1), ("S8", 1), ("8", 1)):
        if size in parts:
            return count
    return 4
