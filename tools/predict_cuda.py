"""Predicts what part of the copy bandwidth of a GPU the memory-bound kernels can reach, from their machine code.

    python tools/predict_cuda.py                           all ops at the shapes of FLUX, SD3.5 and Wan
    python tools/predict_cuda.py --only combine --device h100
    python tools/predict_cuda.py --library maskaccel/lib/libmaskaccel.so

The launches are those of the real launch plans: the host emulation records them with their arguments.
`tools/machine_code` follows a thread of every warp through the machine code and plays one multiprocessor on the result.
Nothing is measured.
Needs nvcc (not with --library), cuobjdump and g++; no GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import check_cuda
import torch
from machine_code import cases, model, sass, trace

ROOT = check_cuda.ROOT
sys.path.insert(0, str(ROOT / "tests"))
import cuda_emulator  # noqa: E402

MOST_ITEMS = 40_000  # instructions of the simulation; longer launches are cut and their rate kept


class Kernel(NamedTuple):
    """A compiled kernel."""

    code: list[sass.Instruction]
    registers: int
    shared: int


class Prediction(NamedTuple):
    """A line of the table."""

    case: str
    kernel: str
    registers: int
    ctas: int  # resident on a multiprocessor
    threads: int
    most: float  # KiB of loads in flight at most
    mean: float  # in the simulation
    needed: float  # by Little's law
    instructions: float  # of a warp, for 512 bytes moved
    issue: float  # part of the bandwidth that the issue slots allow
    fill: float  # part of the slots of all waves that have a CTA
    reached: float  # part of the bandwidth in the simulation
    microseconds: float


class Kernels:
    """Machine code by kernel name, compiled source by source or read from a library."""

    def __init__(self, arch: str, library: Path | None, keep: Path) -> None:
        self.arch, self.library, self.keep = arch, library, keep
        self.found: dict[str, Kernel] = {}
        self.done: set[str] = set()
        self.cuobjdump = check_cuda.find_tool("cuobjdump")

    def _read(self, file: Path) -> None:
        reserved = 1024 if self.arch == "90a" else 0  # cuobjdump counts what the system takes of a CTA from sm_90 on
        used = {k["kernel"]: k for k in check_cuda.usage(file, self.cuobjdump) if k["arch"] in ("", f"sm_{self.arch}")}
        for name, text in check_cuda.machine_code(file, f"sm_{self.arch}", self.cuobjdump).items():
            self.found[name] = Kernel(
                sass.decode(text), used[name]["registers"], max(0, used[name]["shared"] - reserved)
            )

    def get(self, source: str, name: str) -> Kernel:
        """A kernel; its source is compiled at the first call."""
        if self.library and not self.done:
            self._read(self.library)
            self.done.add("library")
        if not self.library and source not in self.done:
            path = next(s for s in check_cuda.SOURCES if s.name == source)
            cubin = self.keep / f"{path.stem}.cubin"
            command = check_cuda.compile_command(path, self.arch, cubin, check_cuda.find_tool("nvcc"))
            check_cuda.subprocess.run(command, check=True, capture_output=True)
            self._read(cubin)
            self.done.add(source)
        return self.found[name]


def predict(case: cases.Case, launch: trace.Launch, kernel: Kernel, device: model.Device, arch: int) -> Prediction:
    """The prediction for one launch."""
    grid = launch.grid
    total = grid[0] * grid[1] * grid[2]
    streams = case.streams
    warps = -(-launch.threads // 32)
    ctas, counts = [], Counter[str]()
    # A few CTAs stand for all: they differ in where they begin, and in the y index (q and k).
    picks = sorted({(min(grid[0] - 1, grid[0] * part // 8), y) for y in range(grid[1]) for part in (3,)})
    for x, y in picks:
        items: list[list[model.Item]] = []
        seen: set[int] = set()
        for w in range(warps):
            thread = trace.Thread(launch, arch, (x, y, 0), min(w * 32, launch.threads - 1), case.readable)
            steps, _ = trace.walk(kernel.code, thread)
            items.append(model.prepare(steps, streams, seen))
        ctas.append(items)
    moved = [sum(i.load + i.store for w in cta for i in w) for cta in ctas]
    slots = [sum(len(w) for w in cta) for cta in ctas]
    counts.update(i.name for cta in ctas for w in cta for i in w)
    resident = model.resident_ctas(device, kernel.registers, kernel.shared + launch.shared, launch.threads)
    share = -(-total // device.multiprocessors)
    mean_slots = sum(slots) / len(slots)
    count = max(1, min(share, max(resident, int(MOST_ITEMS / mean_slots))))
    result = model.simulate(ctas, resident, device, count)
    mean_moved = sum(moved) / len(moved)
    # Of the whole launch: the last CTAs of some multiprocessors have none beside them.
    cycles = result.cycles * share / count
    ideal = case.moved / device.multiprocessors / device.bytes_per_cycle
    per_cta = [sum(model.most_in_flight(w) for w in cta) for cta in ctas]
    loads = sum(i.load for cta in ctas for w in cta for i in w)
    part_loaded = loads / max(1, sum(moved))
    issue_cycles = mean_slots * total / device.multiprocessors / 4
    waves = -(-total // (device.multiprocessors * resident))
    return Prediction(
        case.name, launch.kernel, kernel.registers, resident, launch.threads,
        min(resident, share) * sum(per_cta) / len(per_cta) / 1024, result.in_flight / 1024,
        device.bytes_per_cycle * part_loaded * device.latency_cycles / 1024,
        mean_slots * 512 / max(1.0, mean_moved), min(9.99, ideal / issue_cycles),
        total / (waves * device.multiprocessors * resident),
        ideal / cycles, cycles / device.clock * 1e6,
    )  # fmt: skip


HEADER = (
    "| op and shape | registers | CTAs x threads | KiB in flight: most, mean, needed | instructions per 512 B "
    "| issue limit | waves filled | **of copy** | us |"
)


def line(p: Prediction) -> str:
    """A row of the table."""
    return (
        f"| {p.case} | {p.registers} | {p.ctas} x {p.threads} | {p.most:.0f}, {p.mean:.0f}, {p.needed:.0f} "
        f"| {p.instructions:.0f} | {100 * p.issue:.0f} % | {100 * p.fill:.0f} % "
        f"| **{100 * p.reached:.0f} %** | {p.microseconds:.0f} |"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(model.DEVICES), default="h200")
    parser.add_argument("--groups", nargs="+", choices=sorted(cases.GROUPS), default=list(cases.GROUPS))
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--arch", default="90a", choices=["80", "90a"])
    parser.add_argument("--library", type=Path, help="read a built library instead of compiling")
    args = parser.parse_args()
    reason = cuda_emulator.missing()
    if reason:
        print(f"predict_cuda: {reason}", file=sys.stderr)
        return 2
    needed = {"cuda_device.cu", *cases.SOURCES}
    cuda_emulator.SOURCES = [s for s in cuda_emulator.SOURCES if s.name in needed]
    cuda_emulator.load(ROOT / "build" / "predicted")
    device, arch = model.DEVICES[args.device], int(args.arch.rstrip("a"))
    print(f"predicted for {device.name} ({device.bandwidth / 1e12:.1f} TB/s) from sm_{args.arch} code\n\n{HEADER}")
    print("|---" * 9 + "|")
    ops: Any = torch.ops.maskaccel_emulated
    with tempfile.TemporaryDirectory() as folder:
        kernels = Kernels(args.arch, args.library, Path(folder))
        for group in args.groups:
            for case in cases.GROUPS[group]():
                if args.only not in case.name:
                    continue
                launches = cases.record(case, ops, device.multiprocessors, arch)
                named = [entry for entry in launches if entry.kernel != "?"]
                kernel = kernels.get(case.source, named[-1].kernel)
                print(line(predict(case, named[-1], kernel, device, arch)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
