"""What `tools/machine_code` reads in a stored listing of a small kernel: `out[i] = a[i] + b[i]` on float4."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from machine_code import groups, model, sass, trace  # noqa: E402

LISTING = (ROOT / "tests" / "data" / "add_sm90a.sass").read_text()
ROWS, DEVICE = 3, model.DEVICES["h200"]


def _run(rows: int = ROWS) -> tuple[list[trace.Step], torch.Tensor, torch.Tensor]:
    a, b = torch.zeros(rows * 32, 4), torch.zeros(rows * 32, 4)
    out = 1 << 40
    argument = struct.pack("<3Qi", a.data_ptr(), b.data_ptr(), out, rows)
    launch = trace.Launch("add", (1, 1, 1), 32, 0, argument)
    readable = [(t.data_ptr(), t.data_ptr() + t.numel() * 4) for t in (a, b)]
    steps, unknown = trace.walk(sass.decode(LISTING), trace.Thread(launch, 90, (0, 0, 0), 0, readable))
    assert unknown == 0
    return steps, a, b


def _items(rows: int = ROWS) -> list[model.Item]:
    steps, a, b = _run(rows)
    streams = [(t.data_ptr(), t.data_ptr() + t.numel() * 4) for t in (a, b)]
    return model.prepare(steps, streams, set())


def test_loads_take_the_scoreboard_that_their_first_reader_waits_for():
    """Control bits: the two loads share a scoreboard, and the first sum waits for it and for no other."""
    code = sass.decode(LISTING)
    loads = [n for n, i in enumerate(code) if i.name == "LDG"]
    assert len(loads) == 2
    for n in loads:
        taken = code[n].write
        assert taken != sass.NONE
        register = int(code[n].operands[0][1:])
        results = {f"R{register + i}" for i in range(sass.access_bytes(code[n].opcode) // 4)}
        reader = next(i for i in code[n + 1 :] if results & {o.split(".")[0] for o in i.operands[1:]})
        before = [i for i in code[n + 1 :] if i.address <= reader.address]
        assert any(i.wait >> taken & 1 for i in before), f"nothing waits for scoreboard {taken}"
    assert all(i.write == sass.NONE for i in code if i.name in ("FADD", "IADD3", "STG"))


def test_walk_follows_the_arguments():
    """As many turns as the argument says, at the addresses that it says."""
    steps, a, b = _run()
    assert [s.address for s in steps if s.at.name == "LDG"] == [
        t.data_ptr() + 512 * row for row in range(ROWS) for t in (a, b)
    ]
    assert [s.address for s in steps if s.at.name == "STG"] == [(1 << 40) + 512 * row for row in range(ROWS)]
    assert steps[-1].at.name == "EXIT"


def test_walk_refuses_to_run_for_ever():
    """A loop beyond the limit is an error, not a long wait."""
    launch = trace.Launch("add", (1, 1, 1), 32, 0, struct.pack("<3Qi", 0, 0, 0, 1 << 20))
    with pytest.raises(trace.Stuck, match="more than 100 steps"):
        trace.walk(sass.decode(LISTING), trace.Thread(launch, 90, (0, 0, 0), 0, []), limit=100)


def test_half_an_instruction_is_an_error():
    """A listing that ends too early."""
    with pytest.raises(ValueError, match="no second half"):
        sass.decode(LISTING.splitlines()[2])


def test_bytes_in_flight_are_those_of_both_loads():
    """Two loads of 16 bytes a lane are issued before the first is waited for."""
    assert model.most_in_flight(_items()) == 2 * 16 * 32


def test_one_warp_reaches_what_latency_allows():
    """Little's law: a lone warp loads 1024 bytes a latency, a multiprocessor full of them at its bandwidth."""
    alone = model.simulate([[_items(50)]], 1, DEVICE, 1)
    turn = alone.cycles / 50
    assert DEVICE.latency_cycles < turn < 1.2 * DEVICE.latency_cycles
    full = model.simulate([[_items(20)]], 32, DEVICE, 64)
    rate = (full.loaded + full.stored) / full.cycles
    assert 0.75 * DEVICE.bytes_per_cycle < rate <= DEVICE.bytes_per_cycle


def test_resident_ctas():
    """Registers, shared memory and threads each can be the limit."""
    assert model.resident_ctas(DEVICE, 32, 0, 256) == 8
    assert model.resident_ctas(DEVICE, 80, 0, 256) == 3
    assert model.resident_ctas(DEVICE, 32, 100 * 1024, 256) == 2


def _listing(*lines: str) -> list[sass.Instruction]:
    """Instructions at 0x0, 0x10, ..., with control bits of no meaning."""
    second = f"\n/* 0x{0:016x} */\n"
    return sass.decode("".join(f"/*{16 * n:04x}*/ {line} ; /* 0x{0:016x} */{second}" for n, line in enumerate(lines)))


PRODUCTS = (
    "HGMMA.64x16x16.F32.BF16 R8, gdesc[UR4], RZ, !UPT, gsb0",  # to R8 .. R15
    "HGMMA.64x16x16.F32.BF16 R24, R20, gdesc[UR8], R24, gsb0",  # from R20 .. R23 to R24 .. R31
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [("FADD R8, R9, R10", False), ("FADD R2, R31, R3", True), ("CS2R R22, SRZ", True), ("MOV R24, R2", True),
     ("STG.E.128 desc[UR6][R2.64], R18", True), ("STG.E.64 desc[UR6][R2.64], R18", False)],
)  # fmt: skip
def test_registers_of_products_in_flight(line, wrong):
    """After a wait for all but the latest of two."""
    rest = ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R2, R31, R20", "EXIT")
    found = groups.in_flight(_listing(*PRODUCTS, line, *rest))
    assert found == ([f"{line.split()[0]} at 0x30 uses registers of a product in flight"] if wrong else [])
    assert groups.in_flight(_listing("FADD R8, R24, R20", *PRODUCTS[:2], "@P0 BRA 0x0", *rest)) != []
    assert groups.in_flight(_listing("BRA 0x20", "FADD R8, R24, R20", *PRODUCTS[:2], "BRA 0x50", *rest)) == []


def test_registers_past_the_window():
    """Of the path behind `setmaxnreg` alone, branches followed."""
    code = ("@P0 BRA 0x30", "MOV R24, R2", "EXIT", "USETMAXREG.DEALLOC.CTAPOOL 0x18", "BRA 0x60", "MOV R90, R2",
            "MOV R23, R2", "LDG.E.64 R22, desc[UR6][R2.64]")  # fmt: skip
    assert groups.past_window(_listing(*code, "EXIT")) == []
    assert groups.past_window(_listing(*code, "LDG.E.128 R22, desc[UR6][R2.64]", "EXIT")) == [
        "LDG.E.128 at 0x80 uses R25 of 24 registers"
    ]
    assert groups.past_window(_listing(*code, "@P1 BRA 0x50", "EXIT")) == ["MOV at 0x50 uses R90 of 24 registers"]
