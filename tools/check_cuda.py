"""Lists every CUDA kernel with its registers, spills, stack and shared memory; fails where a hot kernel spills or lacks
the instructions it is made for.

    python tools/check_cuda.py                    compile every .cu for sm_80 and sm_90a and check it
    python tools/check_cuda.py --library FILE     check what a built library holds
    python tools/check_cuda.py --archs 80,90a,120 --jobs 2 --json report.json

Needs nvcc (not with --library) and cuobjdump (of the CUDA toolkit, or of the triton wheel); no GPU.
Exit status: 0 all hot kernels clean, 1 a hot kernel spills, uses local memory, has the wrong instructions or, on
sm_90a, uses registers of a product in flight or registers that it gave away, 2 something is missing or wrong.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from machine_code import groups, sass

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("cuda*.cu"))
# Kernels for any width and alignment trade speed for generality: they may use local memory.
GENERAL = re.compile(r"_any_kernel")
# Sources for one target alone, by a part of their name.
ONLY_FOR = {"sm90": "90a"}


class Family(NamedTuple):
    """What the machine code of a family of kernels must and must not have, by the first letters of instructions."""

    must: tuple[str, ...]
    must_not: tuple[str, ...]
    overlap: tuple[str, str, str, int] | None = None  # from here to there at least so many of this


FAMILIES = {
    r"(?<!merge_)attention_(forward|backward|sums)_kernel": Family(("HMMA", "LDSM", "LDGSTS"), ("LDL", "STL")),
    r"match_tokens_kernelIN7cutlass": Family(("HMMA", "LDSM", "LDGSTS"), ("LDL", "STL")),  # 16-bit rows
    r"copy_rows_kernelI5uint4": Family(("LDG.E.128", "STG.E.128"), ("LDL", "STL")),
    r"sm90_forward_kernel": Family(
        ("HGMMA", "UTMALDG", "SYNCS", "USETMAXREG"),
        ("LDL", "STL", "CALL"),
        # The exponentials of a block run while one product is in flight, not after it.
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.EX2", 32),
    ),
    r"sm90_backward_kernel": Family(
        ("HGMMA", "UTMALDG", "UBLKCP", "SYNCS", "USETMAXREG", "STSM", "REDG.E.ADD.F32x4"), ("LDL", "STL", "CALL")
    ),
    r"query_gradient_kernel": Family(("LDG.E.128", "STG.E.128"), ("LDL", "STL")),
}
# ptxas says so where it puts waits between wgmma instructions.
SERIALIZED = re.compile(r"\(C75\d\d\).*'(\w+)'")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
FIELDS = re.compile(r"(\w+(?:\[\d+\])?):(\d+)")


class Missing(Exception):
    """A tool or header that the check needs is not there."""


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def find_tool(name: str) -> str:
    """Path of a CUDA tool: CUDA_HOME, PATH, then the triton wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    triton = _package("triton")
    places = [Path(home) / "bin" / name if home else None, shutil.which(name), Path("/usr/local/cuda/bin") / name]
    places.append(triton / "backends" / "nvidia" / "bin" / name if triton else None)
    for place in places:
        if place and Path(place).is_file():
            return str(place)
    raise Missing(f"{name} not found in CUDA_HOME/bin, PATH, /usr/local/cuda/bin or the triton wheel")


def compile_command(source: Path, arch: str, output: Path, nvcc: str) -> list[str]:
    """The nvcc call for one source and target, with the flags of the build that decide code generation."""
    torch, cutlass = _package("torch"), _package("cutlass_library")
    if torch is None:
        raise Missing("torch is not installed: its headers are needed")
    if cutlass is None:
        raise Missing("CUTLASS headers are not installed: pip install --no-deps -r requirements/cuda.txt")
    return [
        nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-w", "-Xptxas=-v", "-cubin", f"-arch=sm_{arch}",
        "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DMASKACCEL_SM90A",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", f"-I{torch / 'include'}",
        f"-I{cutlass / 'source' / 'include'}", "-o", str(output), str(source),
    ]  # fmt: skip


def parse_usage(text: str) -> list[dict[str, Any]]:
    """Kernels of `cuobjdump --dump-resource-usage`."""
    kernels, arch, name = [], "", ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("arch ="):
            arch = line.split("=")[1].strip()
        elif line.startswith("Function "):
            name = line.removeprefix("Function ").rstrip(":")
        elif line.startswith("REG:") and name:
            fields = {key: int(value) for key, value in FIELDS.findall(line)}
            kernels.append(
                {"arch": arch, "kernel": name, "registers": fields["REG"], "stack": fields.get("STACK", 0),
                 "local": fields.get("LOCAL", 0), "shared": fields.get("SHARED", 0)}
            )  # fmt: skip
            name = ""
    return kernels


def demangle(names: list[str]) -> dict[str, str]:
    """Readable kernel names; the mangled ones where no c++filt is there."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return {n: n for n in names}
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"^void ", "", re.sub(r"\(maskaccel::cuda::[\w:]+\)$|maskaccel::cuda::", "", o)) for o in out]
    short = [o.replace("cutlass::", "").replace("(int)", "").replace("(bool)", "") for o in short]
    return dict(zip(names, short, strict=True))


def usage(file: Path, cuobjdump: str) -> list[dict[str, Any]]:
    """Resource usage of every kernel in a cubin, object or library."""
    run = subprocess.run([cuobjdump, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise Missing(f"cuobjdump cannot read {file.name}: {run.stderr.strip()[-300:]}")
    return parse_usage(run.stdout)


def machine_code(file: Path, arch: str, cuobjdump: str) -> dict[str, str]:
    """The machine code of each kernel of one target."""
    command = [cuobjdump, "-sass", "-arch", arch, str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\S+)", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def faults(code: str, family: Family) -> list[str]:
    """What is missing in a kernel's machine code, or there against the rule of its family."""
    used = set(INSTRUCTION.findall(code))
    found = [f"no {m}" for m in family.must if not any(u.startswith(m) for u in used)]
    found += [u for u in sorted(used) if u.startswith(family.must_not)]
    if family.overlap is None:
        return found
    begin, end, what, least = family.overlap
    between = [part.split(end)[0].count(what) for part in code.split(begin)[1:]]
    return found + [f"{n} of {least} {what} before {end}" for n in between or [0] if n < least]


def check_instructions(kernels: list[dict[str, Any]], file: Path, cuobjdump: str) -> None:
    """Sets `wrong` of each kernel: the faults of its machine code."""
    code: dict[str, dict[str, str]] = {}
    for k in kernels:
        families = [family for name, family in FAMILIES.items() if re.search(name, k["kernel"])]
        if families and k["arch"] not in code:
            code[k["arch"]] = machine_code(file, k["arch"], cuobjdump)
        k["wrong"] = [fault for family in families for fault in faults(code[k["arch"]][k["kernel"]], family)]
        if any("HGMMA" in family.must for family in families):
            listing = sass.decode(code[k["arch"]][k["kernel"]])
            k["wrong"] += groups.in_flight(listing)[:3] + groups.past_window(listing)[:3]


def _compile_and_read(job: tuple[Path, str, Path, str, str]) -> tuple[list[dict[str, Any]], float]:
    source, arch, folder, nvcc, cuobjdump = job
    cubin = folder / f"{source.parent.name}_{source.stem}_{arch}.cubin"
    begin = time.perf_counter()
    run = subprocess.run(compile_command(source, arch, cubin, nvcc), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if run.returncode != 0:
        raise Missing(f"{source.relative_to(ROOT)} does not compile for sm_{arch}:\n{run.stderr[-2000:]}")
    kernels = usage(cubin, cuobjdump) if cubin.is_file() else []
    for k in kernels:
        k["source"], k["arch"] = str(source.relative_to(ROOT)), f"sm_{arch}"
    check_instructions(kernels, cubin, cuobjdump)
    serialized = set(SERIALIZED.findall(run.stdout + run.stderr))
    for k in kernels:
        k["wrong"] += ["serialized wgmma"] if k["kernel"] in serialized else []
    return kernels, seconds


def _is_for(source: Path, arch: str) -> bool:
    return all(arch == only for part, only in ONLY_FOR.items() if part in source.name)


def collect(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Kernels of the library, or of every source compiled now."""
    cuobjdump = find_tool("cuobjdump")
    if args.library:
        kernels = usage(args.library, cuobjdump)
        if not kernels:
            raise Missing(f"{args.library.name} holds no CUDA kernels: it was built without MASKACCEL_CUDA=1")
        check_instructions(kernels, args.library, cuobjdump)
        return kernels
    nvcc = find_tool("nvcc")
    sources = [s for s in SOURCES if not args.only or args.only in s.name]
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(s, a, Path(folder), nvcc, cuobjdump) for s in sources for a in args.archs if _is_for(s, a)]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for job, (found, seconds) in zip(jobs, pool.map(_compile_and_read, jobs), strict=True):
                print(
                    f"  {job[0].relative_to(ROOT)} sm_{job[1]}: {len(found)} kernels, {seconds:.0f} s", file=sys.stderr
                )
                kernels += found
    return kernels


def print_table(kernels: list[dict[str, Any]]) -> None:
    """One line for each kernel and target."""
    width = max((len(k["name"]) for k in kernels), default=6)
    print(f"{'arch':8} {'kernel':{width}} {'regs':>5} {'stack':>6} {'local':>6} {'shared':>7}")
    for k in sorted(kernels, key=lambda k: (k["arch"], k["name"])):
        mark = "" if k["clean"] else ("  SPILLS" if k["hot"] else "  (general kernel)")
        mark += "".join(f"  {w.upper()}" for w in k["wrong"])
        print(
            f"{k['arch']:8} {k['name']:{width}} {k['registers']:5} {k['stack']:6} {k['local']:6} {k['shared']:7}{mark}"
        )


def summary(kernels: list[dict[str, Any]]) -> str:
    """Registers of each kernel template on each target, least to most over its instances, as a Markdown table."""
    archs = sorted({k["arch"] for k in kernels}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    ranges: dict[str, dict[str, list[int]]] = {}
    for k in kernels:
        ranges.setdefault(k["name"].split("<")[0], {}).setdefault(k["arch"], []).append(k["registers"])
    lines = ["| kernel | instances | " + " | ".join(archs) + " |", "|---" * (len(archs) + 2) + "|"]
    for name, found in sorted(ranges.items()):
        cells = [f"{min(r)}-{max(r)}" if min(r) < max(r) else str(min(r)) for r in (found[a] for a in archs)]
        lines.append(f"| `{name}` | {len(found[archs[0]])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=["80", "90a"], help="targets, such as 80 90a or 80,90a")
    parser.add_argument("--library", type=Path, help="read a built library instead of compiling")
    parser.add_argument("--only", help="only sources whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    parser.add_argument("--summary", action="store_true", help="one line for all instances of a kernel, in Markdown")
    args = parser.parse_args()
    args.archs = [arch for word in args.archs for arch in re.split("[,;]", word) if arch]
    try:
        kernels = collect(args)
    except Missing as e:
        print(f"check_cuda: {e}", file=sys.stderr)
        return 2
    names = demangle([k["kernel"] for k in kernels])
    for k in kernels:
        k["name"] = names[k["kernel"]]
        k["hot"] = not GENERAL.search(k["name"])
        # Spilled registers live on the stack or in local memory, and so does an array that is indexed at run time.
        k["clean"] = k["stack"] == 0 and k["local"] == 0
    bad = [k for k in kernels if k["hot"] and (k["wrong"] or not k["clean"])]
    if args.summary:
        print(summary(kernels) + "\n")
    if bad or not args.summary:
        print_table(bad if args.summary else kernels)
    hot = [k for k in kernels if k["hot"]]
    print(f"{len(kernels)} kernels, {len(hot)} hot, {len(bad)} of them with spills, local memory or wrong instructions")
    if args.json:
        args.json.write_text(json.dumps(kernels, indent=1) + "\n")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
