"""Registers of the warp groups of sm_90a: those that products in flight use, and those that `setmaxnreg` leaves.

wgmma reads and writes registers until it is waited for, and nothing stops other instructions from using them before;
above the count of `setmaxnreg` there are none. Both rules are ptxas's to keep. Here it is seen whether it does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .sass import Instruction, access_bytes

_REGISTER = re.compile(r"\bR(\d+)\b")
_STORES = ("ST", "STG", "STS", "STSM", "RED", "REDG")
_MOST_GROUPS = 16  # that are followed; in a loop that never waits they would grow without end


def _registers(i: Instruction) -> set[int]:
    """General registers that an instruction names, with those that follow them in a wide access."""
    memory, wide = i.name.startswith(("LD", "ST", "RED", "ATOM")), "WIDE" in i.opcode
    words = max(access_bytes(i.opcode) // 4, 1) if memory else 2 if wide else 1
    if i.name in ("LDSM", "STSM") or "F32x4" in i.opcode:
        words = 4
    if i.opcode == "CS2R":
        words = 2
    found: set[int] = set()
    for place, text in enumerate(i.operands):
        if "[" in text:
            count = 2 if ".64" in text else 1
        else:
            count = words if place == 0 or i.name in _STORES or (wide and place == 3) else 1
        for number in _REGISTER.findall(text):
            found.update(range(int(number), int(number) + count))
    return found


def _product(i: Instruction) -> set[int]:
    """Registers of an HGMMA: its result, and its first operand where that is in registers."""
    shape = re.search(r"64x(\d+)x", i.opcode)
    assert shape is not None, i.opcode
    first = int(i.operands[0][1:])
    found = set(range(first, first + int(shape[1]) // 2))
    operand = re.match(r"R(\d+)", i.operands[1])
    return found | (set(range(int(operand[1]), int(operand[1]) + 4)) if operand else set())


def _followers(code: Sequence[Instruction]) -> list[list[int]]:
    """Of each instruction, the places of those that may run next."""
    places = {i.address: n for n, i in enumerate(code)}
    meeting: dict[str, int] = {}  # where the threads of a BSSY go on after their BSYNC
    found = []
    for n, i in enumerate(code):
        targets = [places[int(o, 16)] for o in i.operands if o.startswith("0x") and int(o, 16) in places]
        after = [n + 1] if n + 1 < len(code) else []
        if i.name == "BSSY":
            meeting[i.operands[0]] = targets[0]
        if i.name == "BSYNC":
            after = [meeting.get(i.operands[0], n + 1)]
        elif i.name == "BRA":
            after = targets + (after if i.guard or len(i.operands) > 1 else [])
        elif i.name == "EXIT" and not i.guard:
            after = []
        found.append(after)
    return found


def in_flight(code: Sequence[Instruction]) -> list[str]:
    """Instructions that use registers of a product that nothing has waited for, on any path through the kernel."""
    followers, wrong = _followers(code), dict[int, str]()
    # A place, and the registers of groups there: committed ones, oldest first, and the open one.
    ahead: list[tuple[int, tuple[frozenset[int], ...]]] = [(0, (frozenset(),))]
    seen = set(ahead)
    while ahead:
        at, groups = ahead.pop()
        i, committed, started = code[at], groups[:-1], groups[-1]
        if i.name == "HGMMA":
            started |= _product(i)
            if "gsb0" in i.operands:
                committed, started = (*committed, started)[-_MOST_GROUPS:], frozenset()
        elif i.opcode == "WARPGROUP.DEPBAR.LE":
            committed = committed[max(len(committed) - int(i.operands[-1], 16), 0) :]
        elif _registers(i) & started.union(*committed):
            wrong[at] = f"{i.opcode} at {i.address:#x} uses registers of a product in flight"
        for place in followers[at]:
            state = place, (*committed, started)
            if state not in seen:
                seen.add(state)
                ahead.append(state)
    return [wrong[at] for at in sorted(wrong)]


def past_window(code: Sequence[Instruction]) -> list[str]:
    """Instructions that can follow a `setmaxnreg` and use registers above its count."""
    followers, wrong = _followers(code), dict[int, str]()
    for start, begin in enumerate(code):
        if begin.name != "USETMAXREG":
            continue
        count, seen, ahead = int(begin.operands[-1], 16), {start}, followers[start][:]
        while ahead:
            at = ahead.pop()
            if at in seen:
                continue
            seen.add(at)
            ahead += followers[at]
            i = code[at]
            used = _product(i) if i.name == "HGMMA" else _registers(i)
            if max(used, default=0) >= count:
                wrong[at] = f"{i.opcode} at {i.address:#x} uses R{max(used)} of {count} registers"
    return [wrong[at] for at in sorted(wrong)]
