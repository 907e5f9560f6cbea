"""Follows one thread through a kernel: the instructions that it really runs, for real arguments.

Branches of these kernels hang on arguments, thread and block numbers and on indices in memory, so integers are computed
and memory of the operands is read; what comes from floating-point arithmetic, shared memory or other lanes is unknown
(None).
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .sass import Instruction, access_bytes

Value = int | None
MASK = 0xFFFFFFFF
PARAMETERS = {80: 0x160, 90: 0x210}  # where the arguments of a kernel begin in constant bank 0
_OPERAND = re.compile(
    r"^([-~!|]*)(U?R\d+|U?RZ|SRZ|U?P\d|U?PT|PR|c\[0x0\]\[[^\]]*\]|-?0x[0-9a-f]+|[-+]?[\d.]+(?:e[-+]?\d+)?|[-+]?(?:INF|QNAN))"
)


class Launch(NamedTuple):
    """What a kernel was launched with: recorded by the host emulation."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    argument: bytes


class Step(NamedTuple):
    """An instruction as it ran: with the address and size of its global memory access, if it is one."""

    at: Instruction
    address: Value
    size: int
    runs: bool  # its predicate lets it


class Stuck(Exception):
    """The walk cannot go on: an instruction that decides on the way is not known."""


def signed(v: int) -> int:
    """The 32 bits as a signed number."""
    v &= MASK
    return v - (1 << 32) if v >> 31 else v


def _float_bits(v: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", v))[0])


def _bits_float(v: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", v & MASK))[0])


class Thread:
    """Registers, predicates and constants of one thread. What nothing has set counts as 0: it is masked later."""

    def __init__(self, launch: Launch, arch: int, block: tuple[int, int, int], thread: int,
                 readable: Sequence[tuple[int, int]]) -> None:  # fmt: skip
        self.r: dict[str, Value] = {"RZ": 0, "URZ": 0, "SRZ": 0}
        self.p: dict[str, bool | None] = {"PT": True, "UPT": True}
        self.special = {"SR_TID.X": thread, "SR_CTAID.X": block[0], "SR_CTAID.Y": block[1], "SR_CTAID.Z": block[2],
                        "SR_LANEID": thread & 31, "SR_CgaCtaId": 0}  # fmt: skip
        head = struct.pack("<6I", launch.threads, 1, 1, *launch.grid)
        first = PARAMETERS[arch]
        self.constants = head + bytes(first - len(head)) + launch.argument + bytes(64)
        self.readable = readable

    def constant(self, at: int, size: int = 4) -> int:
        """A word of constant bank 0."""
        return int.from_bytes(self.constants[at : at + size], "little")

    def memory(self, address: Value, size: int) -> Value:
        """What the operands hold; None outside of them."""
        if address is None or not any(a <= address and address + size <= b for a, b in self.readable):
            return None
        return int.from_bytes(ctypes.string_at(address, size), "little")

    def get(self, text: str) -> Value:
        """The value of a source operand."""
        found = _OPERAND.match(text)
        if not found:
            return None
        sign, name = found[1], found[2]
        value: Value
        if name.startswith("c["):
            inner = name[name.rindex("[") + 1 : -1]
            at = 0
            for part in inner.split("+"):
                known = int(part, 16) if part.startswith("0x") else self.r.get(part.split(".")[0], 0)
                if known is None:
                    return None
                at += known
            value = self.constant(at)
        elif name.startswith(("0x", "-0x")):
            value = int(name, 16)
        elif name[0] in "0123456789.+-" or "INF" in name or "NAN" in name:
            value = _float_bits(float(name.replace("QNAN", "nan")))
        elif "P" in name:
            known_p = self.p.get(name, False)
            return None if known_p is None else int(known_p != ("!" in sign))
        else:
            value = self.r.get(name, 0)
        if value is None:
            return None
        if ".64" in text and "[" not in text:
            value |= (self.r.get(_next(name)) or 0) << 32
        if "~" in sign:
            value = ~value
        if "-" in sign:
            value = -value
        return value & MASK

    def test(self, text: str) -> bool | None:
        """The value of a predicate operand."""
        value = self.p.get(text.lstrip("!"), False)
        return None if value is None else value != text.startswith("!")

    def put(self, name: str, value: Value, words: int = 1) -> None:
        """Sets a register, or several that follow each other."""
        name = name.split(".")[0]
        for _ in range(words):
            if name not in ("RZ", "URZ"):
                self.r[name] = None if value is None else value & MASK
            value = None if value is None else value >> 32
            name = _next(name)

    def put_predicate(self, name: str, value: bool | None) -> None:
        """Sets a predicate."""
        if name not in ("PT", "UPT"):
            self.p[name] = value

    def wide(self, text: str) -> Value:
        """A 64-bit source: a pair of registers, or a constant."""
        found = _OPERAND.match(text)
        assert found is not None
        name = found[2]
        if name.startswith("c["):
            return self.constant(int(name[name.rindex("[") + 1 : -1], 16), 8)
        if name in ("RZ", "URZ"):
            return 0
        if not name.startswith(("R", "UR")):
            return self.get(text)
        low, high = self.r.get(name, 0), self.r.get(_next(name), 0)
        return None if low is None or high is None else low | high << 32

    def address(self, text: str) -> Value:
        """The address in brackets of a memory operand."""
        inner = text[text.rindex("[") + 1 : text.rindex("]")]
        total = 0
        for part in inner.split("+"):
            name = part.split(".")[0]
            if part.startswith(("0x", "-0x")):
                total += int(part, 16)
            elif part.endswith((".64", ".U32")) or ".X" in part:
                value = self.wide(name) if part.endswith(".64") else self.r.get(name)
                if value is None:
                    return None
                total += value
            else:
                value = self.wide(name) if name.startswith("UR") else self.r.get(name)
                if value is None:
                    return None
                total += value
        return total


def _next(name: str) -> str:
    return name if name.endswith("Z") else re.sub(r"\d+$", lambda m: str(int(m[0]) + 1), name)


def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


def _table(lut: int, bits: tuple[int, int, int]) -> bool:
    return bool(lut >> (bits[0] << 2 | bits[1] << 1 | bits[2]) & 1)


def _lop3(a: int, b: int, c: int, lut: int) -> int:
    out = 0
    for row in range(8):
        if lut >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out & MASK


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
}  # fmt: skip


def _bool(op: str, a: bool | None, b: bool | None) -> bool | None:
    if op == "AND":
        return False if a is False or b is False else (None if a is None or b is None else True)
    if op == "OR":
        return True if a or b else (None if a is None or b is None else False)
    return None if a is None or b is None else a != b


def execute(t: Thread, i: Instruction) -> None:
    """The effect of an instruction that is no branch and no store on registers and predicates."""
    parts, name, o = i.opcode.split("."), i.name, i.operands
    uniform = name[0] == "U" and name not in ("USETMAXREG",)
    base = name[1:] if uniform else name
    if not o:
        return
    if base in ("ISETP",):
        a, b = t.get(o[2]), t.get(o[3])
        before = t.test(o[4])
        if a is None or b is None:
            value = None
        else:
            if "U32" not in parts:
                a, b = signed(a), signed(b)
            value = _COMPARE[parts[1]](a, b)
            if "EX" in parts and a == b:  # the low halves decide
                value = t.test(o[5])
            elif "EX" in parts and parts[1] in ("EQ", "NE"):
                value = parts[1] == "NE"
        combine = next(p for p in parts[2:] if p in ("AND", "OR", "XOR"))
        t.put_predicate(o[0], _bool(combine, value, before))
        t.put_predicate(o[1], _bool(combine, None if value is None else not value, before))
        return
    if base == "PLOP3":
        bits = [t.test(x) for x in o[2:5]]
        for place, lut in zip(o[:2], (o[5], o[6]), strict=True):
            results = {
                _table(int(lut, 16), (x, y, z))
                for x in ([0, 1] if bits[0] is None else [int(bits[0])])
                for y in ([0, 1] if bits[1] is None else [int(bits[1])])
                for z in ([0, 1] if bits[2] is None else [int(bits[2])])
            }
            t.put_predicate(place, results.pop() if len(results) == 1 else None)
        return
    if base == "LOP3":
        predicate = o[0] if _is_predicate(o[0]) else None
        rest = o[1:] if predicate else o
        sources = [t.get(x) for x in rest[1:4]]
        lut = int(rest[4], 16)
        known = [0 if s is None else s for s in sources]
        value = None
        if all(s is not None for s in sources) or _constant_where_unknown(sources, lut):
            value = _lop3(known[0], known[1], known[2], lut)
        t.put(rest[0], value)
        if predicate:
            t.put_predicate(predicate, None if value is None else value != 0)
        return
    if base in ("IADD3", "VIADD", "IADD"):
        carry_out = [x for x in o[1:3] if _is_predicate(x)] if base == "IADD3" else []
        rest = o[1 + len(carry_out) :]
        sources = [t.get(x) for x in rest if not _is_predicate(x)]
        carries = [t.test(x) for x in rest if _is_predicate(x)] if "X" in parts else []
        if any(s is None for s in sources) or any(c is None for c in carries):
            t.put(o[0], None)
            for x in carry_out:
                t.put_predicate(x, None)
            return
        # In an extended sum a minus is a complement: the +1 comes in with the carry.
        if "X" in parts:
            plain = [x.lstrip("-~") for x in rest if not _is_predicate(x)]
            sources = [
                (~(t.get(p) or 0) & MASK) if x[0] in "-~" else t.get(p)
                for x, p in zip([x for x in rest if not _is_predicate(x)], plain, strict=True)
            ]
            total = sum(s or 0 for s in sources) + sum(1 for c in carries if c)
        else:
            texts = [x for x in rest if not _is_predicate(x)]
            # -x is ~x + 1 on 33 bits, so that the carry says "no borrow".
            total = sum(
                (s or 0) + (1 << 32 if x.startswith("-") and s == 0 else 0) for s, x in zip(sources, texts, strict=True)
            )
        t.put(o[0], total)
        for n, x in enumerate(carry_out):
            t.put_predicate(x, total >> 32 > n)
        return
    if base == "IMAD":
        carry = [t.test(x) for x in o[4:] if _is_predicate(x)]
        wide = "WIDE" in parts
        places = [x for x in o if not _is_predicate(x)]
        out = [x for x in o[1:2] if _is_predicate(x)]
        if out:
            carry = []
        a, b = t.get(places[1]), t.get(places[2])
        c = t.wide(places[3]) if wide or "HI" in parts else t.get(places[3])
        if a is None or b is None or c is None or any(x is None for x in carry):
            t.put(o[0], 0 if (a == 0 or b == 0) and c == 0 else None, 2 if wide else 1)
            return
        if "U32" not in parts:
            a, b = signed(a), signed(b)
        total = a * b + c + sum(1 for x in carry if x)
        t.put(o[0], total >> 32 if "HI" in parts else total, 2 if wide else 1)
        for x in out:
            t.put_predicate(x, total >> (64 if wide else 32) > 0)
        return
    if base == "LEA":
        carry_out = [x for x in o[1:2] if _is_predicate(x)]
        rest = list(o[1 + len(carry_out) :])
        carry_in = t.test(rest.pop()) if "X" in parts and _is_predicate(rest[-1]) else False
        a, b = t.get(rest[0]), t.get(rest[1])
        if "HI" in parts:
            high = (signed(a) >> 31 & MASK if a is not None else None) if "SX32" in parts else t.get(rest[2])
            shift = int(rest[2] if "SX32" in parts else rest[3], 16)
            source = None if a is None or high is None else (high << 32 | a) << shift >> 32 & MASK
        else:
            source = None if a is None else a << int(rest[2], 16) & MASK
        if source is None or b is None or carry_in is None:
            t.put(o[0], None)
            for x in carry_out:
                t.put_predicate(x, None)
            return
        total = source + b + int(bool(carry_in))
        t.put(o[0], total)
        for x in carry_out:
            t.put_predicate(x, total >> 32 > 0)
        return
    if base == "SHF":
        low, count, high = t.get(o[1]), t.get(o[2]), t.get(o[3])
        if count is None or (low is None and "RZ" not in o[1]) or high is None:
            t.put(o[0], None)
            return
        low = low or 0
        if parts[1] == "L":
            full = (high << 32 | low) << (count & 63)
            t.put(o[0], full >> 32 if "HI" in parts else (low << count if count < 32 else 0))
        else:
            if "HI" in parts:  # of {high, low} the upper word, shifted
                value = signed(high) >> min(count, 31) if "S32" in parts else (high >> count if count < 32 else 0)
            else:
                value = (high << 32 | low) >> (count & 63)
            t.put(o[0], value)
        return
    if base in ("SEL", "FSEL"):
        which = t.test(o[3])
        t.put(o[0], None if which is None else t.get(o[1] if which else o[2]))
        return
    if base in ("MOV", "R2UR", "S2R", "S2UR", "CS2R", "IABS"):
        source = o[-1]
        value = t.special.get(source, t.get(source))
        if base == "IABS" and value is not None:
            value = abs(signed(value))
        t.put(o[0], value, 2 if base == "CS2R" and "32" not in parts else 1)
        return
    if base == "LDC":
        size = 8 if "64" in parts else (1 if "U8" in parts else 4)
        inner = o[1][o[1].rindex("[") + 1 : -1]
        at = [int(x, 16) if x.startswith("0x") else t.get(x) for x in inner.split("+")]
        value = None if None in at else t.constant(sum(x or 0 for x in at), size)
        t.put(o[0], value, 2 if size == 8 else 1)
        return
    if base in ("VIMNMX", "IMNMX"):
        a, b, least = t.get(o[1]), t.get(o[2]), t.test(o[3])
        if a is None or b is None or least is None:
            t.put(o[0], None)
        else:
            key = (lambda v: v) if "U32" in parts else signed
            t.put(o[0], (min if least else max)(a, b, key=key))
        return
    if base == "VIADDMNMX":
        a, b, c, least = t.get(o[1]), t.get(o[2]), t.get(o[3]), t.test(o[4])
        if a is None or b is None or c is None or least is None:
            t.put(o[0], None)
        else:
            t.put(o[0], (min if least else max)(a + b & MASK, c, key=signed))
        return
    if base == "PRMT":
        a, selector, b = t.get(o[1]), t.get(o[2]), t.get(o[3])
        if a is None or selector is None or b is None:
            t.put(o[0], None)
            return
        pool = (b << 32 | a).to_bytes(8, "little")
        value = 0
        for n in range(4):
            pick = selector >> 4 * n & 15
            byte = pool[pick & 7]
            value |= (0xFF * (byte >> 7) if pick & 8 else byte) << 8 * n
        t.put(o[0], value)
        return
    if base == "HFMA2" and o[1:3] == ("-RZ", "RZ"):  # a pair of constants
        halves = [struct.unpack("<H", struct.pack("<e", float(x)))[0] for x in (o[4], o[3])] if len(o) == 5 else [0, 0]
        t.put(o[0], halves[0] | halves[1] << 16)
        return
    if base in ("I2F", "I2FP"):
        source = t.wide(o[1]) if "U64" in parts else t.get(o[1])
        if source is None:
            t.put(o[0], None)
        else:
            number = source if "U32" in parts or "U64" in parts else signed(source)
            bits = _float_bits(float(number))
            if "RP" in parts and _bits_float(bits) < number:
                bits += 1
            t.put(o[0], bits)
        return
    if base == "F2I":
        source = t.get(o[1])
        words = 2 if "U64" in parts else 1
        number = None if source is None else _bits_float(source)
        t.put(
            o[0],
            None if number is None or number != number or number < 0 else min(int(number), (1 << 32 * words) - 1),
            words,
        )
        return
    if base == "MUFU" and parts[1] == "RCP":
        source = t.get(o[1])
        number = None if source is None else _bits_float(source)
        t.put(o[0], None if not number or number != number else _float_bits(1.0 / number))
        return
    if base == "P2R":
        mask, rest = int(o[3], 16), t.get(o[2])
        flags = [t.p.get(f"P{n}") for n in range(7) if mask >> n & 1]
        bits = sum(1 << n for n in range(7) if mask >> n & 1 and t.p.get(f"P{n}"))
        t.put(o[0], None if None in flags or rest is None else rest & ~mask | bits)
        return
    if base == "R2P":
        source, mask = t.get(o[1]), int(o[2], 16)
        for n in range(7):
            if mask >> n & 1:
                t.put_predicate(f"P{n}", None if source is None else bool(source >> n & 1))
        return
    if base in ("VOTE", "VOTEU") and len(o) == 2 and _is_predicate(o[0]):
        t.put_predicate(o[0], t.test(o[1]))  # all lanes go one way
        return
    if base == "LDG":
        size = access_bytes(i.opcode)
        t.put(o[0], t.memory(t.address(o[1]), size), max(1, size // 4))
        return
    # Anything else computes what no branch hangs on.
    words = max(1, access_bytes(i.opcode) // 4) if base in ("LDS", "LD", "LDL") else 1
    for x in o[:2]:
        if _is_predicate(x):
            t.put_predicate(x, None)
    if not _is_predicate(o[0]) and re.match(r"U?R\d", o[0]):
        t.put(o[0], None, words)
    elif base == "SHFL":
        t.put(o[1], None)


def _constant_where_unknown(sources: list[Value], lut: int) -> bool:
    """Whether a logic operation does not hang on what is unknown (such as an AND with 0)."""
    known = [0 if s is None else s for s in sources]
    flipped = [MASK if s is None else s for s in sources]
    return _lop3(known[0], known[1], known[2], lut) == _lop3(flipped[0], flipped[1], flipped[2], lut)


def walk(code: list[Instruction], thread: Thread, limit: int = 200_000) -> tuple[list[Step], int]:
    """The steps of the thread up to its exit, and how many branches hung on something unknown (then not taken).

    Raises:
        Stuck: A jump to an unknown place, or more than `limit` steps.
    """
    place = {i.address: n for n, i in enumerate(code)}
    steps: list[Step] = []
    unknown, at = 0, 0
    while len(steps) < limit:
        i = code[at]
        at += 1
        runs: bool | None = True
        if i.guard:
            value = thread.p.get(i.guard, False)
            runs = None if value is None else value != i.negated
        name = i.name
        address, size = None, 0
        if runs and name in ("LDG", "STG", "LD", "ST", "LDGSTS", "REDG", "ATOMG"):
            size = access_bytes(i.opcode)
            address = thread.address(next(x for x in reversed(i.operands) if "desc" in x or x.startswith("[")))
        # A predicated access whose predicate is unknown counts as if it did not run.
        steps.append(Step(i, address, size if runs else 0, runs is not False))
        if name in ("BRA", "CALL", "RET", "EXIT", "BREAK"):
            if len(i.operands) > 1 and name == "BRA" and (_is_predicate(i.operands[0])):
                extra = thread.test(i.operands[0])
                runs = _bool("AND", runs, extra)
            if runs is None:
                unknown += 1
                continue
            if not runs or name == "BREAK":
                continue
            if name == "EXIT":
                return steps, unknown
            target: Value
            if name == "RET":
                target = thread.get(i.operands[0].split()[0])
            else:
                target = int(i.operands[-1], 16)
            if "DIV" in i.opcode:
                continue  # only where lanes have parted
            if target not in place:
                raise Stuck(f"{i.opcode} to {target} at 0x{i.address:x}")
            at = place[target]
            continue
        if runs:
            execute(thread, i)
        elif runs is None:
            _forget(thread, i)
    raise Stuck(f"more than {limit} steps")


def _forget(t: Thread, i: Instruction) -> None:
    """The result of an instruction that may or may not have run."""
    for x in i.operands[:2]:
        if _is_predicate(x):
            t.put_predicate(x, None)
    if i.operands and re.match(r"U?R\d", i.operands[0]):
        t.put(i.operands[0], None, max(1, access_bytes(i.opcode) // 4) if i.name in ("LDG", "LDS") else 1)
