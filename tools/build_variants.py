"""Compiles the variants of the sm_90a attention into a library of their own, and checks their machine code.

    python tools/build_variants.py                       all, into build/variants/libmaskaccel_variants.so
    python tools/build_variants.py --only d64 keys       those whose name contains one of these
    python tools/build_variants.py --emulate d64_no_turns   one for the host, thread by thread

The shipped library is not touched. The variants are listed in benchmarks/gpu/variants.py, which compares them on a GPU.
What is wrong with their machine code is printed: local memory, serialised wgmma, instructions that are missing. A
variant without all its instructions is left out; one that spills a few registers may still tell. Needs nvcc, cuobjdump
and the CUTLASS headers (--emulate: g++ and the headers). Exit status: 0 all clean, 1 not all, 2 something is missing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in ("tools", "benchmarks/gpu"):
    sys.path.insert(0, str(ROOT / folder))

import check_cuda  # noqa: E402
from variants import LIBRARY, VARIANTS  # noqa: E402

SOURCE = ROOT / "csrc" / "attention" / "variant_sm90.cu"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise check_cuda.Missing(f"{name} is not installed: its headers are needed")
    return Path(spec.submodule_search_locations[0])


def _cuda_include() -> Path:
    homes = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        str(Path(check_cuda.find_tool("nvcc")).resolve().parents[1]),
    ]
    for home in filter(None, homes):
        if (Path(home) / "include" / "cuda_runtime.h").is_file():
            return Path(home) / "include"
    raise check_cuda.Missing("no CUDA toolkit headers (cuda_runtime.h)")


def _definitions(name: str, folder: Path) -> list[str]:
    """Of the preprocessor; a namespace for each variant, since the linker joins functions of the same name."""
    header = folder / f"{name}.h"  # nvcc would take a definition with commas apart
    header.write_text(f"#define MASKACCEL_TUNING {VARIANTS[name].definition}\n")
    return [
        "-DMASKACCEL_SM90A", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY",
        f"-Dmaskaccel=maskaccel_{name}", f'-DMASKACCEL_VARIANT="{name}"',
        "-include", str(header),
        f"-I{_package('torch') / 'include'}", f"-I{_package('cutlass_library') / 'source' / 'include'}",
    ]  # fmt: skip


def _digest(name: str) -> str:
    sources = [SOURCE, *sorted((ROOT / "csrc").rglob("*.cuh")), *sorted((ROOT / "csrc").rglob("*.h"))]
    sources += [ROOT / "csrc" / "attention" / "cuda.cu", ROOT / "csrc" / "attention" / "cuda_sm90.cu"]
    text = b"".join(p.read_bytes() for p in sources) + VARIANTS[name].definition.encode()
    return hashlib.sha256(text).hexdigest()[:16]


def emulated(name: str, folder: Path) -> Path:
    """The library of one variant for the host; its op is `torch.ops.maskaccel_variants.<name>`, on CPU tensors."""
    library = folder / f"lib{name}_{_digest(name)}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    cuda = _cuda_include()
    part = library.with_suffix(f".{os.getpid()}.part")
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-DMASKACCEL_EMULATE"]
    command += [*_definitions(name, folder), f"-I{cuda}", f"-I{cuda / 'cccl'}", "-x", "c++", str(SOURCE)]
    command += ["-o", str(part), f"-L{_package('torch') / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    part.replace(library)
    return library


def _compile(name: str, folder: Path) -> tuple[Path, set[str]]:
    """The object of a variant, and its kernels whose wgmma ptxas serialises."""
    target = folder / f"{name}_{_digest(name)}.o"
    log = target.with_suffix(".log")
    if not target.is_file():
        command = [check_cuda.find_tool("nvcc"), "-std=c++17", "-O3", "-DNDEBUG", "-w", "-Xptxas=-v", "-c"]
        command += ["-gencode", "arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
        command += [
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            *_definitions(name, folder),
            "-o",
            f"{target}.part",
            str(SOURCE),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise check_cuda.Missing(f"{name} does not compile:\n{run.stderr[-2000:]}")
        log.write_text(run.stdout + run.stderr)
        Path(f"{target}.part").replace(target)
    return target, set(check_cuda.SERIALIZED.findall(log.read_text()))


def faults(target: Path, serialised: set[str]) -> list[str]:
    """What is wrong with the machine code of an object."""
    cuobjdump = check_cuda.find_tool("cuobjdump")
    kernels = check_cuda.usage(target, cuobjdump)
    check_cuda.check_instructions(kernels, target, cuobjdump)
    found = [] if kernels else ["no kernel"]
    for k in kernels:
        found += k["wrong"] + [f"{k[kind]} bytes of {kind}" for kind in ("stack", "local") if k[kind]]
        found += ["serialised wgmma"] if k["kernel"] in serialised else []
    return found


def build(names: list[str], library: Path, jobs: int) -> int:
    """Compile, check and link; the exit status."""
    folder = library.parent
    folder.mkdir(parents=True, exist_ok=True)
    good: list[Path] = []
    clean = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for name, (target, serialised) in zip(names, pool.map(lambda n: _compile(n, folder), names), strict=True):
            wrong = faults(target, serialised)
            print(f"{name}: {', '.join(wrong) or 'clean'}", flush=True)
            clean += not wrong
            if not any(fault.startswith("no ") for fault in wrong):
                good.append(target)
    if not good:
        raise check_cuda.Missing(f"nothing to link of {', '.join(names)}")
    torch = _package("torch") / "lib"
    command = [check_cuda.find_tool("nvcc"), "-shared", "-cudart=static", "-o", f"{library}.part", *map(str, good)]
    subprocess.run([*command, f"-L{torch}", "-ltorch_cpu", "-Xlinker=-s"], check=True)
    Path(f"{library}.part").replace(library)
    print(f"{library}: {len(good)} of {len(names)} variants, {library.stat().st_size / 1e6:.1f} MB")
    return 0 if clean == len(names) else 1


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="only variants whose name contains one of these")
    parser.add_argument("--emulate", choices=VARIANTS, help="build one for the host instead")
    parser.add_argument("--output", type=Path, default=LIBRARY)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    try:
        if args.emulate:
            print(emulated(args.emulate, args.output.parent))
            return 0
        names = [name for name in VARIANTS if any(part in name for part in args.only)]
        return build(names, args.output, args.jobs)
    except check_cuda.Missing as error:
        print(f"build_variants: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
