"""What limits a kernel that moves bytes, and how long one multiprocessor takes for its share of a launch.

Every warp issues in order: an instruction waits for the stall of the one before, for the scoreboards in its wait mask,
and for a free slot of its scheduler and pipe. Loads of memory share one queue with stores, which drains at the
multiprocessor's share of the bandwidth, and take the latency on top. All figures are predictions.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from .sass import NONE
from .trace import Step


class Device(NamedTuple):
    """A GPU, as far as the model knows it."""

    name: str
    multiprocessors: int = 132
    bandwidth: float = 4.3e12  # bytes a second of a copy
    clock: float = 1.7e9  # Hz, under load
    latency: float = 0.75e-6  # seconds from a load of memory to its result, loaded
    registers: int = 65536
    shared: int = 227 * 1024
    threads: int = 2048
    ctas: int = 32

    @property
    def bytes_per_cycle(self) -> float:
        """Of one multiprocessor."""
        return self.bandwidth / self.multiprocessors / self.clock

    @property
    def latency_cycles(self) -> int:
        """Latency of memory."""
        return round(self.latency * self.clock)


DEVICES = {"h200": Device("H200"), "h100": Device("H100", bandwidth=3.0e12)}


class Kind(NamedTuple):
    """A group of instructions: cycles that one holds a pipe, the pipe, cycles to its result."""

    pipe: str
    cycles: int
    latency: int


# Cycles of a warp instruction: 32 lanes over the lanes of a pipe. fma, alu, xu belong to a scheduler, lsu to all four.
_KINDS = {
    "FFMA": Kind("fma", 1, 4), "FADD": Kind("fma", 1, 4), "FMUL": Kind("fma", 1, 4), "IMAD": Kind("fma", 2, 5),
    "HFMA2": Kind("fma", 1, 5), "HADD2": Kind("fma", 1, 5), "HMUL2": Kind("fma", 1, 5), "MUFU": Kind("xu", 8, 24),
    "F2F": Kind("xu", 8, 24), "I2F": Kind("xu", 8, 24), "F2I": Kind("xu", 8, 24), "SHFL": Kind("lsu", 2, 24),
    "LDS": Kind("lsu", 1, 30), "STS": Kind("lsu", 1, 20), "LDG": Kind("lsu", 1, 38), "STG": Kind("lsu", 1, 20),
    "LD": Kind("lsu", 1, 45), "ST": Kind("lsu", 1, 20), "LDGSTS": Kind("lsu", 1, 38), "LDC": Kind("const", 4, 40),
    "S2R": Kind("xu", 8, 24), "S2UR": Kind("xu", 8, 24), "BAR": Kind("alu", 2, 20), "LDGDEPBAR": Kind("alu", 2, 4),
}  # fmt: skip
_ALU = Kind("alu", 2, 4)
_CONTROL = Kind("none", 1, 4)
_CONTROLS = (
    "BRA",
    "BSSY",
    "BSYNC",
    "EXIT",
    "NOP",
    "CALL",
    "RET",
    "WARPSYNC",
    "DEPBAR",
    "ENDCOLLECTIVE",
    "BREAK",
    "YIELD",
)
_L2_LATENCY = 280


def kind_of(name: str) -> Kind:
    """How an instruction is executed."""
    return _KINDS.get(name) or (_CONTROL if name in _CONTROLS else _ALU)


class Item(NamedTuple):
    """A step, ready for the model."""

    name: str
    pipe: str
    cycles: int
    latency: int
    stall: int
    wait: int
    write: int
    read: int
    load: int  # bytes of memory that a warp loads
    store: int  # and stores
    group: int  # DEPBAR.LE: groups of copies that may stay open, else -1


def prepare(steps: Sequence[Step], streams: Sequence[tuple[int, int]], seen: set[int]) -> list[Item]:
    """Items of a warp. The first touch of a stream is a load of memory; later ones, and small operands, hit a cache."""
    items = []
    for step in steps:
        i, (pipe, cycles, latency) = step.at, kind_of(step.at.name)
        load = store = 0
        group = -1
        size = step.size
        if not step.runs:  # takes an issue slot, no more
            pipe, cycles, latency = _CONTROL
        if i.name == "DEPBAR" and i.operands[0] == "SB0" and len(i.operands) > 1:
            group = int(i.operands[1], 16)
        if step.runs and i.name in ("LDS", "STS", "LDG", "STG", "LD", "ST", "LDGSTS"):
            wide = 4 if "128" in i.opcode else 2 if "64" in i.opcode else 1
            cycles *= wide
        if size and step.address is not None:
            stream = any(a <= step.address < b for a, b in streams)
            if i.name in ("STG", "ST"):
                store = size * 32  # results and workspaces are no operands
            elif step.address in seen:
                latency = 38
            else:
                seen.add(step.address)
                load = size * 32 if stream else 0
                latency = latency if stream else _L2_LATENCY
        stall = max(1, i.stall)
        items.append(Item(i.name, pipe, cycles, latency, stall, i.wait, i.write, i.read, load, store, group))
    return items


class Result(NamedTuple):
    """What the walk through a launch's share says."""

    cycles: int
    loaded: int
    stored: int
    in_flight: float  # bytes of loads under way, mean over the time


def simulate(ctas: Sequence[Sequence[Sequence[Item]]], resident: int, device: Device, count: int) -> Result:
    """One multiprocessor working through `count` CTAs, `resident` at a time; `ctas` are their warps, in turns."""
    rate, far = device.bytes_per_cycle, device.latency_cycles
    slots = [0, 0, 0, 0]  # of the four schedulers: when the next instruction may issue
    pipes: list[dict[str, int]] = [{} for _ in range(4)]
    load_store = 0  # the pipe that all schedulers share
    queue = 0.0
    flight = 0.0
    loaded = stored = 0
    heap: list[tuple[int, int, int]] = []  # time, order, warp
    cta_left: list[int] = []
    cta_waiting: list[list[int]] = []
    started = last = 0

    items: list[Sequence[Item]] = []
    at: list[int] = []
    boards: list[list[int]] = []
    groups: list[list[int]] = []
    open_group: list[int] = []
    home: list[int] = []
    order = 0

    def start(time: int) -> None:
        nonlocal started, order
        warps = ctas[started % len(ctas)]
        number = len(cta_left)
        cta_left.append(len(warps))
        cta_waiting.append([])
        for w in warps:
            items.append(w)
            at.append(0)
            boards.append([0] * 6)
            groups.append([])
            open_group.append(0)
            home.append(number)
            heapq.heappush(heap, (time, order, len(items) - 1))
            order += 1
        started += 1

    for _ in range(min(resident, count)):
        start(0)
    while heap:
        time, key, warp = heapq.heappop(heap)
        item = items[warp][at[warp]]
        board = boards[warp]
        if item.wait:
            ready = time
            for n in range(6):
                if item.wait >> n & 1 and board[n] > ready:
                    ready = board[n]
            if ready > time:
                heapq.heappush(heap, (ready, key, warp))
                continue
        if item.group >= 0 and len(groups[warp]) > item.group:
            ready = max(groups[warp][: len(groups[warp]) - item.group])
            groups[warp] = groups[warp][len(groups[warp]) - item.group :]
            if ready > time:
                heapq.heappush(heap, (ready, key, warp))
                continue
        scheduler = warp & 3
        when = max(time, slots[scheduler])
        if item.pipe == "lsu":
            when = max(when, load_store)
        elif item.pipe != "none":
            when = max(when, pipes[scheduler].get(item.pipe, 0))
        if when > time:  # another may go first
            heapq.heappush(heap, (when, key, warp))
            continue
        slots[scheduler] = when + 1
        if item.pipe == "lsu":
            load_store = when + item.cycles
        elif item.pipe != "none":
            pipes[scheduler][item.pipe] = when + item.cycles
        done = when + item.latency
        if item.load:
            queue = max(queue, float(when)) + item.load / rate
            done = int(queue) + far
            loaded += item.load
            flight += item.load * (done - when)
        elif item.store:
            queue = max(queue, float(when)) + item.store / rate
            stored += item.store
            last = max(last, int(queue))
            # Stores wait for nobody, unless the queue is long: then there is no buffer left.
            done = max(done, int(queue) - 2 * far)
        if item.name == "LDGSTS" and item.load:
            open_group[warp] = max(open_group[warp], done)
        elif item.name == "LDGDEPBAR":
            groups[warp].append(open_group[warp])
            open_group[warp] = 0
        elif item.write != NONE:
            board[item.write] = max(board[item.write], done)
        if item.read != NONE:
            board[item.read] = max(board[item.read], done if item.store else when + 12)
        at[warp] += 1
        last = max(last, when)
        if at[warp] == len(items[warp]):
            cta = home[warp]
            cta_left[cta] -= 1
            items[warp] = ()
            if cta_left[cta] == 0 and started < count:
                start(when + 200)  # registers and shared memory change hands
            elif cta_left[cta] and len(cta_waiting[cta]) == cta_left[cta]:
                _release(heap, cta_waiting[cta], when)
            continue
        if item.name == "BAR":
            waiting = cta_waiting[home[warp]]
            waiting.append(warp)
            if len(waiting) == cta_left[home[warp]]:
                _release(heap, waiting, when)
            continue
        heapq.heappush(heap, (when + item.stall, key, warp))
    return Result(last, loaded, stored, flight / max(1, last))


def _release(heap: list[tuple[int, int, int]], waiting: list[int], when: int) -> None:
    for warp in waiting:
        heapq.heappush(heap, (when + 20, warp, warp))
    waiting.clear()


def resident_ctas(device: Device, registers: int, shared: int, threads: int) -> int:
    """CTAs that fit into a multiprocessor: registers go to warps, 256 at a time; the system takes 1 KiB of each CTA."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        device.ctas,
        device.threads // (warps * 32),
        device.registers // (per_warp * warps),
        device.shared // (shared + 1024),
    )


def most_in_flight(items: Sequence[Item]) -> int:
    """Bytes of memory that a warp has loaded and not yet waited for, at most: from issue to the first wait."""
    open_by: dict[int, int] = {}
    groups: list[int] = []
    current = most = 0
    for item in items:
        for n in range(6):
            if item.wait >> n & 1:
                open_by.pop(n, None)
        if item.group >= 0:
            del groups[: max(0, len(groups) - item.group)]
        if item.name == "LDGDEPBAR":
            groups.append(current)
            current = 0
        if item.load and item.name == "LDGSTS":
            current += item.load
        elif item.load:
            open_by[item.write] = open_by.get(item.write, 0) + item.load
        most = max(most, sum(open_by.values()) + sum(groups) + current)
    return most
